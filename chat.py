"""Talk to a checkpoint in the terminal.

    python chat.py --init_from out/demo/dpo
    python chat.py --init_from out/demo/dpo --prompt "你会从3数到7吗？"      answer this and leave

/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer. A checkpoint that has only been
pretrained cannot answer; it goes on with the text instead.
"""
from dataclasses import dataclass

import torch

from nanollm import checkpoint, dist
from nanollm.config import UserError, arg, run
from nanollm.generate import generate
from nanollm.tokenizer import StreamDecoder, render


@dataclass
class Config:
    init_from: str = arg("out/demo/dpo", "checkpoint or run directory")
    prompt: list = arg([], "one or more messages to answer one by one, each in a fresh conversation, without a dialogue")
    system: str = arg("", "system prompt; empty = none, as in training")
    temperature: float = arg(0.7, "0 = greedy; 1 = the model's own distribution")
    top_p: float = arg(0.9, "sample from the smallest set of tokens with this probability")
    top_k: int = arg(0, "sample from the k likeliest tokens; 0 = all")
    repetition_penalty: float = arg(1.05, "above 1 makes tokens already in the context less likely; 1 = off")
    max_new_tokens: int = arg(256, "longest answer", unit="tokens")
    seed: int = arg(0, "of the sampling; the same seed and messages give the same answers")
    variants: list = arg([], "architecture options to put on the model; sliding_window: answers may outgrow the context")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")


def fit_history(tok, messages, room):
    """The newest part of a conversation that renders to at most `room` tokens: (messages, number of messages dropped).

    Whole exchanges go, oldest first; a system prompt stays. Half an exchange would leave an answer without its
    question, which no training row looks like. The last message always stays, however long."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = kept = messages[len(system):]
    while len(kept) > 1 and len(render(tok, system + kept, True)[0]) > room:
        kept = kept[2:]
    return system + kept, len(turns) - len(kept)


class Chat:
    """One conversation: remembers the messages and streams the next answer."""

    def __init__(self, model, tok, cfg, completion):
        self.model, self.tok, self.cfg, self.completion, self.told = model, tok, cfg, completion, False
        self.generator = torch.Generator(next(model.parameters()).device).manual_seed(cfg.seed)
        self.reset()

    def reset(self):
        self.messages = [{"role": "system", "content": self.cfg.system}] if self.cfg.system else []

    def answer(self, text):
        """Print the answer to `text` as it is made and return it. Ctrl-C ends it early; what was said stays said."""
        cfg, tok = self.cfg, self.tok
        if self.completion:
            ids = [tok.eos_id] + tok.encode(text)            # a document begins after <|endoftext|>
        else:
            reserve = min(cfg.max_new_tokens, self.model.args.max_seq_len // 4)
            self.messages, dropped = fit_history(tok, [*self.messages, {"role": "user", "content": text}],
                                                 self.model.args.max_seq_len - reserve)
            if dropped and not self.told:
                self.told = True
                print(f"[the conversation outgrew the context of {self.model.args.max_seq_len} tokens: "
                      f"the oldest exchanges are forgotten from here on]", flush=True)
            ids = render(tok, self.messages, add_generation_prompt=True)[0]
        decoder, said = StreamDecoder(tok), []

        def show(piece):
            said.append(piece)
            print(piece, end="", flush=True)

        try:
            for token in generate(self.model, ids, cfg.max_new_tokens, stop_ids=tok.stop_ids, generator=self.generator,
                                  temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, repetition_penalty=cfg.repetition_penalty):
                show(decoder.feed(token))
        except KeyboardInterrupt:
            print(" [interrupted]", end="")
        show(decoder.flush())
        print(flush=True)
        reply = "".join(said)
        if not self.completion:
            self.messages.append({"role": "assistant", "content": reply})
        return reply


def main(cfg):
    for name, ok in (("temperature", cfg.temperature >= 0), ("top_p", 0 < cfg.top_p <= 1), ("top_k", cfg.top_k >= 0),
                     ("repetition_penalty", cfg.repetition_penalty > 0), ("max_new_tokens", cfg.max_new_tokens > 0)):
        if not ok:
            raise UserError(f"--{name} {getattr(cfg, name)} makes no sense; see --help for the range")
    model, tok, meta = checkpoint.load(cfg.init_from, dist.choose_device(cfg.device), "lm", cfg.variants)
    chat = Chat(model, tok, cfg, completion=meta["stage"] == "pretrain")
    if chat.completion:
        print("note: this checkpoint is only pretrained: it continues text and answers no questions; "
              "train_sft.py teaches it to chat" + ("; --system is ignored" if cfg.system else ""))
    for prompt in cfg.prompt:
        print(f"> {prompt}", flush=True)
        chat.reset()
        chat.answer(prompt)
    if cfg.prompt:
        return
    print(f"{meta['stage']} model, step {meta['step']}, {model.args.max_seq_len} tokens of context. /reset /exit")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:                                     # Ctrl-D
            print()
            return
        except KeyboardInterrupt:                            # Ctrl-C at the prompt: a fresh line
            print()
            continue
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
            print("[forgotten]")
        elif text in ("/help", "/?", "/quit"):
            print("[/reset forgets the conversation, /exit ends; Ctrl-C stops an answer]")
        elif text:
            chat.answer(text)


if __name__ == "__main__":
    run(main, Config, __doc__)
