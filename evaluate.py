"""Measure a checkpoint: perplexity, multiple choice, chat answers, reward accuracy, or the whole demo road.

    python evaluate.py --init_from out/demo/pretrain --task ppl --data out/demo/tokens
    python evaluate.py --init_from out/demo/dpo --task mc --data DIR            CMMLU or MMLU .csv files, or a directory
                                                                                of them, or one with dev/ and test/ inside
    python evaluate.py --init_from out/demo/sft --task chat --data rows.jsonl   answers to held-out chat rows
    python evaluate.py --init_from out/demo/rm --task rm --data pairs.jsonl     chosen against rejected
    python evaluate.py --task demo --run_dir out/demo                           all of these; writes out/demo/eval.json
"""
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanollm import checkpoint, dist, evaluation, world
from nanollm.config import UserError, arg, run
from nanollm.corpus import io
from nanollm.data import PreferenceRows, TokenFile, fit_chat, read_rows, report_bad, to_messages, to_preference
from nanollm.tokenizer import render


@dataclass
class Config:
    task: str = arg("ppl", "ppl, mc, chat, rm or demo")
    init_from: str = arg("", "checkpoint or run directory (all tasks but demo)")
    data: str = arg("", "what to measure on: a directory of token files, text, .csv questions, chat or preference rows")
    split: str = arg("val", "ppl on token files: train or val")
    max_tokens: int = arg(0, "ppl: stop after so many tokens; 0 = all", unit="tokens")
    shots: str = arg("", "mc: .csv file or directory of solved examples; empty = the dev/ beside test/, if there is one")
    n_shots: int = arg(5, "mc: solved examples in front of each question, as many as fit into the context")
    score: str = arg("letter", "mc: letter (CMMLU, MMLU) or text (log p of the option's text per byte)")
    template: str = arg("auto", "mc: chat, plain, or auto: chat for text scoring of a model that has learnt to chat, else plain")
    max_rows: int = arg(0, "mc, chat, rm, demo: only the first so many rows; 0 = all", unit="rows")
    temperature: float = arg(0.0, "chat: 0 is greedy; then two runs agree whatever the seed")
    max_new_tokens: int = arg(160, "chat and demo: longest answer (the demo's longest has 156)", unit="tokens")
    batch_size: int = arg(64, "answers written at once")
    seed: int = arg(0, "of everything sampled")
    max_bad: float = arg(0.1, "share of unusable rows above which a file is refused")
    run_dir: str = arg("out/demo", "demo: the directory with raw/, tokens/, pretrain/, sft/, rm/ and dpo/ in it")
    out: str = arg("", "directory for eval.json; empty = nowhere (demo: run_dir)")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")


def some(rows, cfg):
    return rows[: cfg.max_rows or None]


def ppl(cfg, model, tok):
    """Held-out loss: on token files, or on any text that prepare_data.py reads."""
    path = Path(cfg.data)
    if path.is_dir() and list(path.glob("*.bin")):
        data = TokenFile(path, cfg.split, model.args.max_seq_len, "documents", tok.hash)
    else:
        unread, tasks = Counter(), io.plan(io.find_files([path], exclude=os.devnull)[0])
        rows = (row for task in tasks for row in io.documents(task, lambda line, reason, *rest: unread.update([reason])))
        data = [row["text"] for row in rows if not row["drop_reason"]]
        if bad := unread.total():
            print(f"set aside {bad} of {bad + len(data)} rows: {dict(unread)}")
        if bad > cfg.max_bad * (bad + len(data)):
            raise UserError(f"--data {path}: more than --max_bad {cfg.max_bad:.0%} of its rows cannot be read")
    return evaluation.lm_loss(model, tok, data, cfg.max_tokens)


def mc(cfg, model, tok, stage):
    path, shots = Path(cfg.data), Path(cfg.shots) if cfg.shots else None
    if (path / "test").is_dir():
        shots = shots or (path / "dev" if (path / "dev").is_dir() else None)
        path = path / "test"
    if cfg.template not in ("auto", "chat", "plain"):
        raise UserError(f"--template {cfg.template} is unknown; use auto, chat or plain")
    chat = cfg.template == "chat" or (cfg.template == "auto" and cfg.score == "text" and stage != "pretrain")
    questions = some(evaluation.read_choices(path), cfg)
    return evaluation.multiple_choice(model, tok, questions, evaluation.read_choices(shots) if shots else (), cfg.score, chat, cfg.n_shots)


def chat(cfg, model, tok):
    """Exact match with the row's own last answer (rows of the demo world are judged by its rule), the share of answers
    that end by themselves, and the loss on the reference answers."""
    rows, messages, bad = [], [], []
    for where, row in read_rows([cfg.data], max_bad=cfg.max_bad):
        try:
            messages.append(to_messages(row))
            rows.append(row)
        except ValueError as e:
            bad.append((where, str(e), str(row)[:200]))
    report_bad(bad, len(rows) + len(bad), None, cfg.max_bad)
    rows, messages = some(rows, cfg), some(messages, cfg)
    replies = evaluation.answers(model, tok, [m[:-1] for m in messages], cfg.max_new_tokens, cfg.temperature, cfg.seed, cfg.batch_size)
    reference = {id(row): m[-1]["content"].strip() for row, m in zip(rows, messages)}

    def correct(row, text):
        return world.correct(row, text) if {"task", "lang", "accept", "must"} <= row.keys() else text.strip() == reference[id(row)]

    fitted = [f for m in messages if (f := fit_chat(tok, m, model.args.max_seq_len + 1))]
    losses = evaluation.continuation_losses(model, [(ids[:1], ids[1:]) for ids, _ in fitted])
    nats = sum(float(nll[i]) for (_, mask), nll in zip(fitted, losses) for i, m in enumerate(mask[1:]) if m)
    return evaluation.exact_match(rows, replies, correct) | {"loss": nats / sum(sum(mask[1:]) for _, mask in fitted)}


def demo(cfg):
    """The numbers of the demo road, each beside what is known to be true: see docs/ for what they mean."""
    root, raw, numbers, began = Path(cfg.run_dir), Path(cfg.run_dir) / "raw", {}, time.time()
    device = dist.choose_device(cfg.device)
    model, tok, _ = checkpoint.load(root / "pretrain", device, "lm")
    val = TokenFile(root / "tokens", "val", model.args.max_seq_len, "documents", tok.hash)
    whole = evaluation.lm_loss(model, tok, val)
    ends = val.ends[:].tolist()
    texts = [tok.decode(val.tokens[a : b - 1].tolist()) for a, b in zip([0, *ends], ends)]         # without the EOS
    kinds = evaluation.loss_by_kind(model, tok, texts, world.parse)
    numbers["pretrain"] = {"val_loss": whole["loss"], "entropy_floor": kinds["all"]["floor"], "by_kind": kinds, "documents": len(texts),
                           "bits_per_byte": whole["bits_per_byte"], "tokens": whole["tokens"], "tokens_parsed": kinds["all"]["tokens"]}
    print(f"pretrain   loss {whole['loss']:.4f}, floor {kinds['all']['floor']:.4f} nats a token "
          f"({100 * (whole['loss'] / kinds['all']['floor'] - 1):+.1f} %), {whole['bits_per_byte']:.4f} bits a byte")
    if kinds["all"]["tokens"] < whole["tokens"]:
        print(f"           {whole['tokens'] - kinds['all']['tokens']} of {whole['tokens']} tokens lie in documents that are not of the demo "
              f"world: the floor is over the others, whose loss is {kinds['all']['loss']:.4f}")

    rows = some([row for _, row in read_rows([raw / "chat_val.jsonl"])], cfg)
    sft, tok, _ = checkpoint.load(root / "sft", device, "lm")
    replies = evaluation.answers(sft, tok, [to_messages(row)[:-1] for row in rows], cfg.max_new_tokens, batch_size=cfg.batch_size)
    numbers["sft"] = evaluation.exact_match(rows, replies, world.correct)
    numbers["sft"]["wrong"] = [{"task": row.get("task"), "question": to_messages(row)[-2]["content"], "reply": text, "answer": row.get("answer")}
                               for row, (text, _) in zip(rows, replies) if not world.correct(row, text)][:20]
    print(f"sft        exact match {numbers['sft']['exact_match']:.3f} ± {numbers['sft']['stderr']:.3f} of {len(rows)}, "
          f"stop rate {numbers['sft']['stop_rate']:.3f}")

    reward, reward_tok, _ = checkpoint.load(root / "rm", device, "reward")
    pairs = read_rows([raw / "prefs_val.jsonl"])
    accuracy = lambda rows: evaluation.rm_accuracy(reward, PreferenceRows(rows, reward_tok, reward.args.max_seq_len))
    numbers["rm"] = accuracy(pairs)
    numbers["rm"]["by_why"] = {why: accuracy([p for p in pairs if p[1]["why"] == why]) for why in sorted({row["why"] for _, row in pairs})}
    print(f"rm         accuracy {numbers['rm']['accuracy']:.3f} ± {numbers['rm']['stderr']:.3f} of {numbers['rm']['n']} pairs")

    models = {"sft": sft, "dpo": checkpoint.load(root / "dpo", device, "lm")[0]}
    if (root / "ppo").is_dir():                              # a road of before has none
        models["ppo"] = checkpoint.load(root / "ppo", device, "lm")[0]
    numbers |= side_by_side(models, reward, tok, rows, replies, some([row for _, row in read_rows([raw / "prefs_val.jsonl"])], cfg), cfg)
    dpo = models["dpo"]

    questions = some(evaluation.read_choices(raw / "mc" / "demo.csv"), cfg)
    numbers["mc"] = evaluation.multiple_choice(dpo, tok, questions, score="text", chat=True)
    numbers["mc"].pop("scores")
    print(f"mc         accuracy {numbers['mc']['accuracy']:.3f} ± {numbers['mc']['stderr']:.3f}, chance {numbers['mc']['chance']:.3f}, "
          f"{len(questions)} questions\nmeasured in {time.time() - began:.0f} s")
    return numbers


def side_by_side(models, reward, tok, questions, replies, rows, cfg):
    """{"sft", "dpo"[, "ppo"]} models on the same prompts -> {"models": {name: numbers}, "dpo": …, "ppo": …}. replies: SFT's to the questions.

    Exact match is greedy. All else is sampled at temperature 1; the rival of the win rate is always the SFT model's sample under its
    own seed; the SFT model itself, under another seed, must come out near 0.5: that is the zero of this scale."""
    asked = [to_preference(row)[0] for row in rows]
    ids = [render(tok, prompt, add_generation_prompt=True)[0] for prompt in asked]

    def sampled(model, seed):
        answers = evaluation.answer_ids(model, tok, ids, cfg.max_new_tokens, 1.0, seed, cfg.batch_size)
        texts = [tok.decode(answer) for answer, _ in answers]
        return answers, texts, [world.rate(row, text) for row, text in zip(rows, texts)]

    rival, found = sampled(models["sft"], cfg.seed + 1)[2], {}
    for k, (name, model) in enumerate(models.items(), 2):
        answers, texts, rates = sampled(model, cfg.seed + k)
        greedy = replies
        if name != "sft":
            greedy = evaluation.answers(model, tok, [to_messages(row)[:-1] for row in questions], cfg.max_new_tokens, batch_size=cfg.batch_size)
        found[name] = {"exact_match": evaluation.exact_match(questions, greedy, world.correct)["exact_match"],
                       "win_rate": evaluation.win_rate(rates, rival), "rule": sum(rates) / len(rates),
                       "stop_rate": sum(ended for _, ended in answers) / len(answers),
                       **evaluation.away_from(models["sft"], model, reward, tok, ids, answers)}
        found[name]["chats"] = [{"prompt": prompt[-1]["content"], "text": text} for prompt, text in list(zip(asked, texts))[:5]]
        print(f"{name:<10} " + ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in found[name].items() if key != "chats"))
    before = found["sft"]["win_rate"]
    print(f"           {len(rows)} prompts; the win rate is against the SFT model, which stands at {before:.3f} against itself")
    return {"models": found} | {name: {"win_rate": found[name]["win_rate"], "win_rate_before": before, "n": len(rows)} for name in list(models)[1:]}


def table(result):
    """A flat view for the terminal: numbers first, then one line for each entry of a nested table."""
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, numbers in value.items():
                print(f"    {name:<32} " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        elif key == "prompt":
            print(f"prompt of the first question:\n{'-' * 60}\n{value}\n{'-' * 60}")
        elif not isinstance(value, list):
            print(f"{key:<36} {value:.6g}" if isinstance(value, float) else f"{key:<36} {value}")


def main(cfg):
    if cfg.task not in ("ppl", "mc", "chat", "rm", "demo"):
        raise UserError(f"--task {cfg.task} is unknown; use ppl, mc, chat, rm or demo")
    if cfg.task == "demo":
        result, out = demo(cfg), cfg.out or cfg.run_dir
    else:
        for name in ("init_from", "data"):
            if not getattr(cfg, name):
                raise UserError(f"--task {cfg.task} needs --{name}; see --help for an example")
        if not Path(cfg.data).exists():
            raise UserError(f"--data {cfg.data} does not exist")
        model, tok, meta = checkpoint.load(cfg.init_from, dist.choose_device(cfg.device), "reward" if cfg.task == "rm" else "lm")
        if cfg.task == "rm":
            pairs = PreferenceRows(read_rows([cfg.data], max_bad=cfg.max_bad), tok, model.args.max_seq_len, max_bad=cfg.max_bad)
            pairs.pairs = some(pairs.pairs, cfg)
            result = evaluation.rm_accuracy(model, pairs)
        else:
            result = (ppl(cfg, model, tok) if cfg.task == "ppl" else chat(cfg, model, tok) if cfg.task == "chat"
                      else mc(cfg, model, tok, meta["stage"]))
        result = {"task": cfg.task, "init_from": cfg.init_from, "stage": meta["stage"], "step": meta["step"], "data": cfg.data, **result}
        table(result)
        out = cfg.out
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        result.pop("scores", None)
        (Path(out) / "eval.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {Path(out) / 'eval.json'}")


if __name__ == "__main__":
    run(main, Config, __doc__)
