"""Talk to a checkpoint: in the terminal, or as a server with a page that shows what the model does.

    python chat.py --init_from out/demo/dpo
    python chat.py --init_from out/demo/dpo --prompt "你会从3数到7吗？"      answer this and leave
    python chat.py --init_from out/demo/sft out/demo/dpo --serve             a page in the browser, and OpenAI's API

/reset forgets the conversation, /regenerate answers again, /probs shows what the last answer might have been, /save and /load keep
a conversation, /system TEXT sets the system prompt, /adapter NAME puts on another of --adapters, /exit or Ctrl-D leaves, Ctrl-C stops
an answer. A checkpoint that has only been pretrained cannot answer; it goes on with the text instead.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import adapter_files, checkpoint, dist
from nanollm.beam import beam_search
from nanollm.config import UserError, arg, run
from nanollm.data import messages_from
from nanollm.generate import StopStrings, show_step, steps
from nanollm.tokenizer import StreamDecoder, render

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram")
HELP = ("[/reset forgets the conversation, /regenerate answers again, /probs shows the last answer's probabilities, /save FILE and /load FILE, "
        "/system TEXT, /adapter NAME, /exit ends; Ctrl-C stops an answer]")


@dataclass
class Config:
    init_from: list = arg(["out/demo/dpo"], "checkpoint or run directory; with --serve one or several, to be compared")
    prompt: list = arg([], "one or more messages to answer one by one, each in a fresh conversation, without a dialogue")
    system: str = arg("", "system prompt; empty = none, as in training")
    temperature: float = arg(0.7, "0 = greedy; 1 = the model's own distribution")
    top_p: float = arg(0.9, "sample from the smallest set of tokens with this probability")
    top_k: int = arg(0, "sample from the k likeliest tokens; 0 = all")
    min_p: float = arg(0.0, "sample only from tokens at least this many times as likely as the likeliest; 0 = all")
    repetition_penalty: float = arg(1.0, "above 1 makes tokens already in the context less likely; 1 = off")
    no_repeat_ngram: int = arg(0, "no so many tokens in a row may come twice; 0 = off")
    max_new_tokens: int = arg(256, "longest answer", unit="tokens", least=1)
    stop: list = arg([], "strings at which an answer ends; they are not shown")
    beams: int = arg(1, "above 1: a beam search of this width in place of sampling; the best answer is shown when it is whole", least=1)
    length_penalty: float = arg(1.0, "with --beams: 0 prefers short answers, more than 1 long ones")
    show_probs: bool = arg(False, "after each answer, the likeliest tokens of each step")
    seed: int = arg(0, "of the sampling; the same seed and messages give the same answers")
    variants: list = arg([], "architecture options to put on the model; sliding_window: answers may outgrow the context")
    adapters: list = arg([], "--peft runs of this very model, or directories of the peft library: /adapter puts one on (docs/peft.md)")
    quantize: str = arg("", "int8, int4 or nf4: weights in so many bits (docs/quantization.md); empty = as they are")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")
    serve: bool = arg(False, "serve a page and OpenAI's API instead of a dialogue (extra: web)")
    host: str = arg("127.0.0.1", "address to serve on; 0.0.0.0 = whoever can reach this machine")
    port: int = arg(8000, "port to serve on; 0 = any that is free")
    together: int = arg(4, "answers in the making at once, when serving", least=1)
    queue: int = arg(32, "requests that may wait for their turn, 0 = none; more get the error 429")
    max_request_bytes: int = arg(250_000, "longest request", unit="bytes", least=1)


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
        self.model, self.tok, self.cfg, self.completion, self.told, self.adapters = model, tok, cfg, completion, False, {}
        self.generator = torch.Generator(next(model.parameters()).device).manual_seed(cfg.seed)
        self.system = cfg.system
        self.reset()

    def reset(self):
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.steps = []                                      # of the last answer

    def ids(self):
        """What the model reads: the newest part of the conversation, up to where the answer begins."""
        room = self.model.args.max_seq_len
        most = room - min(self.cfg.max_new_tokens, room // 4)
        if self.completion:
            ids = [self.tok.eos_id] + self.tok.encode(self.messages[-1]["content"])        # a document begins after <|endoftext|>
        else:
            messages, dropped = fit_history(self.tok, self.messages, most)
            if dropped and not self.told:
                self.told = True
                print(f"[the conversation outgrew the context of {room} tokens: the oldest exchanges are not read from here on]", flush=True)
            ids = render(self.tok, messages, add_generation_prompt=True)[0]
        if len(ids) > most and not self.model.cache.endless:
            print(f"[{len(ids)} tokens are more than the context of {room} holds beside an answer: only the last {most} are read]", flush=True)
            ids = ids[-most:]
        return ids

    def pieces(self, ids):
        """The answer's text as it is made; a beam search's comes in one piece."""
        cfg, tok, decoder = self.cfg, self.tok, StreamDecoder(self.tok)
        if cfg.beams > 1:
            answers = beam_search(self.model, ids, cfg.max_new_tokens, cfg.beams, cfg.length_penalty, tok.stop_ids, cfg.repetition_penalty, cfg.no_repeat_ngram)
            yield tok.decode(answers[0][0])
            return
        for step in steps(self.model, ids, cfg.max_new_tokens, stop_ids=tok.stop_ids, generator=self.generator, top=5,
                          **{name: getattr(cfg, name) for name in SAMPLING}):
            self.steps.append(step)
            yield decoder.feed(step.token)
        yield decoder.flush()

    def answer(self, text):
        """Print the answer to `text` as it is made and return it. Ctrl-C ends it early; what was said stays said."""
        self.messages.append({"role": "user", "content": text})
        stops, said, self.steps = StopStrings(self.cfg.stop), [], []

        def show(piece):
            said.append(piece)
            print(piece, end="", flush=True)

        try:
            for piece in self.pieces(self.ids()):
                show(stops.feed(piece))
                if stops.done:
                    break
        except KeyboardInterrupt:
            print(" [interrupted]", end="")
        show(stops.flush())
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(said)})
        if self.cfg.show_probs:
            self.show_probs()
        return self.messages[-1]["content"]

    def show_probs(self):
        none = "[no token has been sampled yet]" if self.cfg.beams == 1 else "[a beam search samples no token]"
        print("\n\n".join(show_step(step, self.tok.decode) for step in self.steps) or none, flush=True)

    def regenerate(self):
        """Another answer to the last question; at temperature 0 the same one."""
        if self.messages[-1:] and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            self.answer(self.messages.pop()["content"])
        else:
            print("[no answer yet]")

    def save(self, path):
        """Append the conversation to a file as a row that train_sft.py reads: one corrected by hand is an example to learn from."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return print("[nothing to save yet]")
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        print(f"[{len(self.messages)} messages appended to {path}]")

    def load(self, path):
        """Go on with the last conversation of a file."""
        last = Path(path).read_text(encoding="utf-8").strip().split("\n")[-1]            # and not splitlines(): U+2028 may stand in a text
        messages = messages_from(json.loads(last)["messages"])
        if messages[-1]["role"] != "assistant":
            raise ValueError("its last conversation ends without an answer")
        self.messages, self.steps, self.system = messages, [], messages[0]["content"] * (messages[0]["role"] == "system")
        print("\n".join(f"{m['role']}: {m['content']}" for m in messages))

    def command(self, line):
        """A line that begins with /."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.reset()
            print("[forgotten]")
        elif name == "/system":
            self.system = rest.strip()
            self.reset()
            print(f"[the system prompt is {'set' if self.system else 'gone'}, the conversation forgotten]")
        elif name == "/adapter":
            adapter_files.switch(self, rest.strip())
        elif name == "/probs":
            self.show_probs()
        elif name == "/regenerate":
            self.regenerate()
        elif name in ("/save", "/load") and rest.strip():
            try:
                (self.save if name == "/save" else self.load)(rest.strip())
            except (OSError, ValueError, KeyError, TypeError) as e:
                print(f"[{name} {rest.strip()}: {e}]")
        else:
            print(HELP)


def main(cfg):
    for name, ok, wants in (("temperature", cfg.temperature >= 0, "at least 0"), ("top_p", 0 < cfg.top_p <= 1, "above 0 and at most 1"),
                            ("top_k", cfg.top_k >= 0, "at least 0"), ("min_p", cfg.min_p <= 1, "at most 1"),
                            ("repetition_penalty", cfg.repetition_penalty > 0, "above 0"),
                            ("length_penalty", cfg.length_penalty == 1 or cfg.beams > 1, "left out, or --beams above 1")):
        if not ok:
            raise UserError(f"--{name} must be {wants}, got {getattr(cfg, name)}")
    if len(cfg.init_from) != 1 and not (cfg.init_from and cfg.serve):
        raise UserError(f"--init_from names {len(cfg.init_from)} checkpoints: in the terminal one talks to one; several are compared with --serve")
    unused = [f"--{name}" for name in ("prompt", "system", "stop", "beams", "show_probs", "seed", "adapters") if getattr(cfg, name) != getattr(Config(), name)]
    if cfg.serve and unused:
        raise UserError(f"--serve takes no {', '.join(unused)}: each request, and the page, says for itself what it wants; leave it out")
    device = dist.choose_device(cfg.device)
    loaded = [(path, *checkpoint.load(path, device, "lm", cfg.variants, quantize=cfg.quantize)) for path in dict.fromkeys(cfg.init_from)]
    if cfg.serve:
        from nanollm.serve.app import serve
        return serve(loaded, cfg, {name: getattr(cfg, name) for name in SAMPLING})
    [(_, model, tok, meta)] = loaded
    chat = Chat(model, tok, cfg, completion=meta["stage"] == "pretrain")
    if cfg.adapters:
        chat.adapters = adapter_files.bank(model, tok, cfg.adapters, chat.completion)
        adapter_files.switch(chat, list(chat.adapters)[1])   # the first one; [0] is the base
    if chat.completion:
        print("note: this checkpoint is only pretrained: it continues text and answers no questions; "
              "train_sft.py teaches it to chat" + ("; --system is ignored" if cfg.system else ""))
    for prompt in cfg.prompt:
        print(f"> {prompt}", flush=True)
        chat.reset()
        chat.answer(prompt)
    if cfg.prompt:
        return
    print(f"{meta['stage']} model, step {meta['step']}, {model.args.max_seq_len} tokens of context. /help")
    while True:
        try:
            text = input("> ").strip()
            if text == "/exit":
                return
            if text.startswith("/"):
                chat.command(text)
            elif text:
                chat.answer(text)
        except EOFError:                                     # Ctrl-D
            return print()
        except KeyboardInterrupt:                            # Ctrl-C at the prompt or while probabilities are shown: a fresh line
            print()


if __name__ == "__main__":
    run(main, Config, __doc__)
