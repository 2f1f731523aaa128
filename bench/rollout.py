"""Rollouts: sampled answers to a batch of prompts, ours beside transformers' generate; same weights, same prompts, same number of tokens.

    python bench/rollout.py                                        the demo's model and one of 28 M, 16 prompts
    python bench/rollout.py --shapes 512x8 --new_tokens 128        width x layers

Both sides sample at temperature 1 from the whole vocabulary and go on to the last token (no end token), transformers with its
cache and its own defaults otherwise. They take turns (A B A B …) in one process after a warm-up; a ratio is the median of the
rounds' own ratios. That both are the same model is checked first: greedy answers must be equal.
"""
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.peers import need
from nanollm import env
from nanollm.config import arg, run
from nanollm.generate import generate_batch
from nanollm.hf import from_hf_state
from nanollm.model import ModelArgs, Transformer, parameter_count
from nanollm.rollout import write_answers

VOCAB = {"128x2": 1280}                                      # the demo's; 6400 otherwise


@dataclass
class Config:
    shapes: list = arg(["128x2", "512x8"], "width x layers, heads of 64 (the demo's of 32)")
    batch_size: int = arg(16, "prompts", least=1)
    prompt_tokens: int = arg(32, "longest prompt; the others are shorter, down to half", unit="tokens", least=2)
    new_tokens: int = arg(64, "length of the answers", unit="tokens", least=1)
    rounds: int = arg(5, "turns of both sides", least=1)
    threads: int = arg(2, "CPU threads", least=1)
    out: str = arg("out/bench/rollout.json", "the results")


def both(dim, layers, vocab, room, n_kv_heads=0):
    """The same random weights as a transformers Llama and as ours."""
    from transformers import LlamaConfig, LlamaForCausalLM
    args = ModelArgs(dim=dim, n_layers=layers, n_heads=dim // (32 if dim < 256 else 64), n_kv_heads=n_kv_heads, vocab_size=vocab,
                     max_seq_len=room, tie_embeddings=True)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=args.ffn_dim, num_hidden_layers=layers, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads, max_position_embeddings=room, tie_word_embeddings=True, rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta}, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    ours = Transformer(args).eval()
    ours.load_state_dict(from_hf_state(theirs.state_dict(), args))
    return theirs, ours


def main(cfg):
    need("transformers")
    torch.set_num_threads(cfg.threads)
    tok, results = type("Tok", (), {"pad_id": 0, "stop_ids": ()}), {}
    for shape in cfg.shapes:
        dim, layers = map(int, shape.split("x"))
        vocab = VOCAB.get(shape, 6400)
        theirs, ours = both(dim, layers, vocab, cfg.prompt_tokens + cfg.new_tokens)
        g, width, n = torch.Generator().manual_seed(0), cfg.prompt_tokens, cfg.new_tokens
        lengths = torch.randint(width // 2, width + 1, (cfg.batch_size,), generator=g).tolist()
        prompts = [torch.randint(1, vocab, (length,), generator=g).tolist() for length in lengths]
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])[:, width - max(lengths) :]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])[:, width - max(lengths) :]

        def side_a(**how):
            with torch.no_grad():
                return theirs.generate(ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, pad_token_id=0, **how)[:, ids.size(1) :]

        greedy, _ = generate_batch(ours, prompts, n, 0, temperature=0)
        same = (torch.tensor(greedy) == side_a(do_sample=False)).float().mean().item()
        times = {"transformers": [], "ours": []}
        for round in range(cfg.rounds + 1):
            for name, work in (("transformers", lambda: side_a(do_sample=True, top_k=0, temperature=1.0)),
                               ("ours", lambda: write_answers(ours, prompts, range(cfg.batch_size), round, n, 1.0, tok))):
                began = time.perf_counter()
                work()
                times[name] += [time.perf_counter() - began] if round else []              # the first turn warms up
        tokens = cfg.batch_size * n
        ratio = statistics.median(a / b for a, b in zip(times["transformers"], times["ours"]))
        results[shape] = {"parameters": parameter_count(ours)["total"], "vocab": vocab, "greedy_tokens_equal": same, "ratio": ratio,
                          **{f"{k}_tokens_per_s": tokens / statistics.median(v) for k, v in times.items()}}
        r = results[shape]
        print(f"{shape:>8}  {r['parameters'] / 1e6:6.1f} M  transformers {r['transformers_tokens_per_s']:8,.0f} tokens/s   "
              f"ours {r['ours_tokens_per_s']:8,.0f} tokens/s   ratio {ratio:.2f}   greedy tokens equal {same:.1%}", flush=True)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(json.dumps({"config": vars(cfg), **env.stamp(), "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
