"""Measure a checkpoint: perplexity, multiple choice, chat answers, wins against another one, reward accuracy, or the whole demo road.

    python evaluate.py --init_from out/demo/pretrain --task ppl --data out/demo/tokens
    python evaluate.py --init_from out/demo/pretrain --task ppl --data wiki=wiki.txt poems=poems.jsonl    a table by domain
    python evaluate.py --init_from out/demo/dpo --task mc --data DIR            .csv files of MMLU, CMMLU or C-Eval, or a
                                                                                directory with dev/ and test/ (val/) inside
    python evaluate.py --init_from out/demo/sft --task chat --data rows.jsonl   answers to held-out chat rows
    python evaluate.py --init_from out/demo/dpo --against out/demo/sft --task win --judge out/demo/rm --data prompts.jsonl
    python evaluate.py --init_from out/demo/rm --task rm --data pairs.jsonl     chosen against rejected
    python evaluate.py --task demo --run_dir out/demo                           all of these; writes out/demo/eval.json
    python evaluate.py --compare out/a out/b out/c                              their eval.json side by side

--out DIR writes DIR/eval.json, in which each task and data set has a place of its own.
"""
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanollm import checkpoint, choices, contamination, demo, dist, evaluation, metrics, rollout, scoreboard, world
from nanollm.config import UserError, arg, run
from nanollm.corpus import io
from nanollm.data import PreferenceRows, TokenFile, fit_chat, read_rows, report_bad, to_messages
from nanollm.tokenizer import render

TASKS = ("ppl", "mc", "chat", "win", "rm", "demo")


@dataclass
class Config:
    task: str = arg("ppl", "ppl, mc, chat, win, rm or demo")
    init_from: str = arg("", "checkpoint or run directory (all tasks but demo)")
    data: list = arg([], "what to measure on: token files, text (NAME=PATH names a domain), .csv questions, chat or preference rows")
    split: str = arg("val", "ppl on token files: train or val")
    max_tokens: int = arg(0, "ppl: stop after so many tokens; 0 = all. Two tokenizers then read different documents: use max_rows", unit="tokens")
    shots: str = arg("", "mc: .csv file or directory of solved examples; empty = the dev/ beside test/, if there is one")
    n_shots: int = arg(5, "mc: solved examples in front of each question, as many as fit into the context")
    score: str = arg("letter", "mc: letter (as MMLU, CMMLU and C-Eval do) or text (log p of the option's text: acc and acc_norm)")
    template: str = arg("auto", "mc: chat, plain, or auto: chat for text scoring of a model that has learnt to chat, else plain")
    lm_eval: str = arg("", "mc: also write the same questions as a task of lm-evaluation-harness into this directory")
    corpus: list = arg([], "mc, chat: training text (files or directories) in which the questions are looked for")
    against: str = arg("", "win: the other checkpoint, which answers the same prompts")
    judge: str = arg("", "win: a reward model's directory, or FILE.py:function(row, text) -> number")
    max_rows: int = arg(0, "only the first so many rows (ppl: documents of each domain); 0 = all", unit="rows")
    temperature: float = arg(0.0, "chat, win: 0 is greedy; then two runs agree whatever the seed")
    max_new_tokens: int = arg(160, "chat, win and demo: longest answer (the demo's longest has 156)", unit="tokens", least=1)
    batch_size: int = arg(64, "answers written at once", least=1)
    seed: int = arg(0, "of everything sampled")
    max_bad: float = arg(0.1, "share of unusable rows above which a file is refused")
    run_dir: str = arg("out/demo", "demo: the directory with raw/, tokens/, pretrain/, sft/, rm/ and dpo/ in it")
    compare: list = arg([], "runs (directories with an eval.json) to put side by side, as a table and, with --out, a picture")
    out: str = arg("", "directory for eval.json (mc, chat, win: also for what is needed to go on after a kill); empty = nowhere (demo: run_dir)")
    quantize: str = arg("", "int8, int4 or nf4: weights in so many bits (docs/quantization.md); empty = as they are")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")


def log_of(cfg, what):
    """The file beside eval.json from which the same command goes on after a kill, or None."""
    return Path(cfg.out) / f"{cfg.task}-{Path(cfg.data[0]).stem}-{what}.jsonl" if cfg.out else None


def holds_tokens(word):
    """Is it (perhaps behind NAME=) a directory of token files?"""
    return any(Path(word if Path(word).exists() else word.partition("=")[2]).glob("*.bin"))


def documents(flag, words, unread):
    """(domain, text) of all documents of files and directories, one at a time; the domain is NAME in NAME=PATH, else the file's own
    name. Files that are not opened are told; what cannot be read is counted by its reason in `unread`."""
    for word in words:
        if holds_tokens(word):
            raise UserError(f"{flag} {word} holds token files; name the text that they were made of (or measure them alone: --task ppl, one --data, no NAME)")
        files, skipped = io.find_files([word], os.devnull, flag)
        for file, why in skipped:
            print(f"{flag}: {file} is not read: {why}")
        for file, source, adapter in files:
            domain = source if word.startswith(f"{source}=") else file.name.split(".")[0]
            for task in io.plan([(file, source, adapter)]):
                for row in io.documents(task, lambda line, reason, *rest: unread.update([f"{domain}: {reason}"])):
                    if not row["drop_reason"]:
                        yield domain, row["text"]


def unreadable(unread, good, cfg):
    """Say what was set aside; too much of it is a mistake."""
    if bad := unread.total():
        print(f"set aside {bad} of {bad + good} documents: {dict(unread)}")
    if not good or bad > cfg.max_bad * (bad + good):
        raise UserError(f"{bad} of {bad + good} documents cannot be read, more than --max_bad {cfg.max_bad:.0%}: {dict(unread)}" if bad else
                        "the files hold no text but blanks")


def ppl(cfg, model, tok):
    """Held-out loss on token files, or on any text that prepare_data.py reads, by domain: the same documents for every tokenizer."""
    if len(cfg.data) == 1 and Path(cfg.data[0]).exists() and holds_tokens(cfg.data[0]):
        if cfg.max_rows:
            raise UserError("--max_rows counts documents of text files; of token files take --max_tokens")
        data = TokenFile(cfg.data[0], cfg.split, model.args.max_seq_len, "documents", tok.hash)
        found = evaluation.lm_loss(model, tok, data, cfg.max_tokens)
        ends = data.ends[: found["documents"]].tolist()
        return found | {"data_hash": scoreboard.fingerprint(tok.decode(data.tokens[a:b].tolist()) for a, b in zip([0, *ends], ends))}
    domains, unread, good = defaultdict(list), Counter(), 0
    for name, text in documents("--data", cfg.data, unread):
        good += 1
        if not cfg.max_rows or len(domains[name]) < cfg.max_rows:
            domains[name].append(text)
    unreadable(unread, good, cfg)
    rows = {name: evaluation.document_losses(model, tok, texts, cfg.max_tokens) for name, texts in domains.items()}
    read = [text for name, texts in domains.items() for text in texts[: len(rows[name])]]
    lossy = sum(tok.decode(tok.encode(text)) != text for text in read)
    if lossy:
        print(f"note: {lossy} of {len(read)} documents hold characters that this tokenizer cannot write back: its bits per byte flatter")
    return evaluation.loss_table(np.concatenate(list(rows.values()))) | {
        "context": model.args.max_seq_len, "lossy": lossy, "data_hash": scoreboard.fingerprint(read),
        "by_domain": {name: evaluation.loss_table(part) for name, part in rows.items() if len(part)}}


def mc(cfg, model, tok, stage):
    if len(cfg.data) > 1:
        raise UserError("--task mc takes one --data: a .csv file or a directory of them")
    path, shots = choices.splits(cfg.data[0])
    if cfg.template not in ("auto", "chat", "plain"):
        raise UserError(f"--template {cfg.template} is unknown; use auto, chat or plain")
    chat = cfg.template == "chat" or (cfg.template == "auto" and cfg.score == "text" and stage != "pretrain")
    if chat and cfg.shots:
        raise UserError("--shots: the chat template shows no solved examples; leave them out, or take --template plain")
    questions, solved = choices.read_choices(path)[: cfg.max_rows or None], choices.read_choices(cfg.shots or shots) if cfg.shots or shots else ()
    if cfg.lm_eval:
        n = choices.write_lm_eval(cfg.lm_eval, Path(cfg.data[0]).stem, tok, questions, solved, cfg.score, cfg.n_shots, model.args.max_seq_len)
        print(f"wrote {n} questions (plain template) for lm-evaluation-harness to {cfg.lm_eval}")
    found = choices.multiple_choice(model, tok, questions, solved, cfg.score, chat, cfg.n_shots, log_of(cfg, cfg.score))
    if found["truncated"] or found["unscored"]:
        print(f"note: the context of {model.args.max_seq_len} tokens is too short: {found['truncated']} of {len(questions)} prompts lost their "
              f"beginning, {found['unscored']} questions with a longer option could not be asked and are left out")
    rows, _ = found.pop("rows"), found.pop("scores")
    if cfg.corpus:
        found |= contaminated(cfg, questions, {row["question"]: row["acc"] for row in rows}, "acc")
    return found | {"data_hash": scoreboard.fingerprint(questions)}


def contaminated(cfg, questions, hits, name):
    """How many of the questions stand in --corpus, and the score on those that do and those that do not. hits: {number: right?}"""
    unread, read = Counter(), Counter()
    covered = contamination.coverage(questions, (read.update([name]) or text for name, text in documents("--corpus", cfg.corpus, unread)))   # and counts
    unreadable(unread, read.total(), cfg)
    sides = {"found": [hit for i, hit in hits.items() if covered[i]], "not found": [hit for i, hit in hits.items() if not covered[i]]}
    worst = sorted((i for i in hits if covered[i]), key=lambda i: -covered[i])[:5]
    return {"contamination": {side: metrics.share(of, name) if of else {"n": 0} for side, of in sides.items()},
            "corpus": " ".join(cfg.corpus), "corpus_documents": read.total(), "too_short_to_look_for": sum(c is None for c in covered),
            "most_found": [{"question": questions[i]["question"], "coverage": covered[i]} for i in worst]}


def chat(cfg, model, tok):
    """Exact match with the row's own last answer (rows of the demo world are judged by its rule), the share of answers that end by
    themselves, ROUGE, BLEU and how much they repeat, and the loss on the reference answers."""
    rows, messages, bad = [], [], []
    for where, row in read_rows(cfg.data, max_bad=cfg.max_bad):
        try:
            messages.append(to_messages(row))
            rows.append(row)
        except ValueError as e:
            bad.append((where, str(e), str(row)[:200]))
    report_bad(bad, len(rows) + len(bad), None, cfg.max_bad)
    rows, messages = rows[: cfg.max_rows or None], messages[: cfg.max_rows or None]
    prompts, size = [render(tok, m[:-1], add_generation_prompt=True)[0] for m in messages], model.args.max_seq_len
    replies = evaluation.answers(model, tok, [m[:-1] for m in messages], cfg.max_new_tokens, cfg.temperature, cfg.seed, cfg.batch_size, log_of(cfg, "answers"))
    wanted = [m[-1]["content"] for m in messages]
    reference = {id(row): text.strip() for row, text in zip(rows, wanted)}

    def correct(row, text):
        return world.correct(row, text) if {"task", "lang", "accept", "must"} <= row.keys() else text.strip() == reference[id(row)]

    fitted = [f for m in messages if (f := fit_chat(tok, m, size + 1))]
    losses = evaluation.continuation_losses(model, [(ids[:1], ids[1:]) for ids, _ in fitted])
    nats = sum(float(nll[i]) for (_, mask), nll in zip(fitted, losses) for i, m in enumerate(mask[1:]) if m)        # of what the assistant says
    found = evaluation.exact_match(rows, replies, correct) | {
        "loss": nats / max(sum(sum(mask[1:]) for _, mask in fitted), 1), "generation": metrics.generation([text for text, _ in replies], wanted),
        "cut": sum(len(ids) >= size for ids in prompts), "cut_in_loss": sum(len(render(tok, m)[0]) > size + 1 for m in messages),
        "data_hash": scoreboard.fingerprint(messages)}
    if found["cut"] or found["cut_in_loss"]:
        print(f"note: the context of {size} tokens is too short: {found['cut']} of {len(rows)} prompts lost their beginning, and the loss is without "
              f"a part of {found['cut_in_loss']} rows")
    if cfg.corpus:
        asked = [{"question": m[-2]["content"], "options": [m[-1]["content"]]} for m in messages]
        found |= contaminated(cfg, asked, {i: correct(row, text) for i, (row, (text, _)) in enumerate(zip(rows, replies))}, "exact_match")
    return found


def win(cfg, model, tok):
    """Which of two checkpoints answers better, by a reward model or a rule: the share of prompts that --init_from wins, a tie
    being half a win. Both answer each prompt once, with numbers of their own where a temperature is set."""
    if not cfg.against or not cfg.judge:
        raise UserError("--task win needs --against CHECKPOINT and --judge (a reward model's directory or FILE.py:function)")
    sides = [(model, tok), checkpoint.load(cfg.against, dist.choose_device(cfg.device), "chat")[:2]]
    kept, scores = read_rows(cfg.data, max_bad=cfg.max_bad)[: cfg.max_rows or None], []
    asked = [rollout.PromptRows(kept, own, player.args.max_seq_len - cfg.max_new_tokens, max_bad=cfg.max_bad) for player, own in sides]
    fit = {id(row) for row in asked[0].rows} & {id(row) for row in asked[1].rows}            # a prompt must fit into both contexts
    if not fit:
        raise UserError(f"--data {' '.join(cfg.data)}: no prompt fits into the contexts of both models")
    for side, ((player, own), prompts) in enumerate(zip(sides, asked)):
        rows, ids = zip(*((row, ids) for row, ids in zip(prompts.rows, prompts.ids) if id(row) in fit))
        answers = evaluation.answer_ids(player, own, ids, cfg.max_new_tokens, cfg.temperature, cfg.seed + side, cfg.batch_size,
                                        log_of(cfg, f"side{side}"))
        full = [ids + [own.end_id] * ended for ids, ended in answers]
        score, size = rollout.load_reward(cfg.judge, own, player.args.max_seq_len, dist.choose_device(cfg.device), "--judge")[0], cfg.batch_size
        scores.append([s for i in range(0, len(full), size) for s in score(rows[i : i + size], ids[i : i + size], full[i : i + size])])
    if not np.isfinite(scores).all():
        raise UserError(f"--judge {cfg.judge} gave a score that is no finite number: nothing can win against that")
    wins = metrics.wins(*scores)
    return metrics.mean(wins, "win_rate") | {
        "n": len(wins), "ties": wins.count(0.5) / len(wins), "mean_score": sum(scores[0]) / len(wins), "mean_score_against": sum(scores[1]) / len(wins),
        "chance": 0.5, "against": cfg.against, "judge": cfg.judge, "data_hash": scoreboard.fingerprint(row for _, row in kept if id(row) in fit)}


def compare(cfg):
    """The runs' numbers side by side; what is better beyond its error bar has a star."""
    runs = scoreboard.read(cfg.compare)
    rows = scoreboard.compare(runs)
    print("\n".join(scoreboard.lines(rows, runs)))
    for task in scoreboard.different_texts(runs):
        print(f"note: {task} was measured on different texts: those numbers say nothing about each other")
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        (Path(cfg.out) / "compare.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        scoreboard.picture(rows, list(runs)).savefig(Path(cfg.out) / "compare.png", dpi=100)
        print(f"wrote {Path(cfg.out) / 'compare.json'} and compare.png")


def main(cfg):
    scoreboard.open_place(cfg.out or (cfg.run_dir if cfg.task == "demo" else ""))
    scoreboard.open_place(cfg.lm_eval, "--lm_eval")
    if cfg.compare:
        return compare(cfg)
    if cfg.task not in TASKS:
        raise UserError(f"--task {cfg.task} is unknown; use one of {', '.join(TASKS)}")
    if cfg.task == "demo":
        result, out = demo.measure(cfg), cfg.out or cfg.run_dir
    else:
        for name in ("init_from", "data"):
            if not getattr(cfg, name):
                raise UserError(f"--task {cfg.task} needs --{name}; see --help for an example")
        for flag, word in [*(("data", word) for word in cfg.data), *(("corpus", word) for word in cfg.corpus)]:
            if not Path(word).exists() and not Path(word.partition("=")[2] or word).exists():
                raise UserError(f"--{flag} {word} does not exist")
        expect = {"rm": "reward", "win": "chat"}.get(cfg.task, "lm")
        model, tok, meta = checkpoint.load(cfg.init_from, dist.choose_device(cfg.device), expect, quantize=cfg.quantize)
        if cfg.task == "rm":
            pairs = PreferenceRows(read_rows(cfg.data, max_bad=cfg.max_bad), tok, model.args.max_seq_len, max_bad=cfg.max_bad)
            pairs.pairs = pairs.pairs[: cfg.max_rows or None]
            result = evaluation.rm_accuracy(model, pairs) | {"data_hash": scoreboard.fingerprint([tok.decode(ids) for ids in pair] for pair in pairs.pairs)}
        else:
            result = mc(cfg, model, tok, meta["stage"]) if cfg.task == "mc" else {"ppl": ppl, "chat": chat, "win": win}[cfg.task](cfg, model, tok)
        result = {"task": cfg.task, "init_from": cfg.init_from, "stage": meta["stage"], "step": meta["step"], "data": " ".join(cfg.data), **result}
        scoreboard.show(result)
        what = f"{cfg.task}/{'+'.join(Path(word).name.rpartition('=')[2] for word in cfg.data)}" + (" text" if cfg.task == "mc" and cfg.score == "text" else "")
        result, out = {what + f" against {Path(cfg.against).name}" * (cfg.task == "win"): result}, cfg.out
    if out:
        scoreboard.store(out, result)


if __name__ == "__main__":
    run(main, Config, __doc__)
