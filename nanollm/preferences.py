"""Preference pairs from a model: the notes' recipe, and best-of-n with a reward model.

A share of the SFT rows (25 % in the notes) is kept away from SFT. For each of these the SFT model answers the question: the row's own
answer becomes `chosen`, the model's `rejected`. What that teaches is "write like the data, not like yourself": the label comes from
the source of an answer, not from its quality. With a reward model both come from the model: of n samples the best and the worst by
its score (Stiennon et al. 2020, section 4.1: best-of-n).

Each row draws from a stream of random numbers of its own, which hangs on the seed and its text, so the pairs are the same for any
batch size, order of the rows and number of tries: rows are done in parts of 256, each written aside and renamed.
"""
import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path

from nanollm import checkpoint, dist
from nanollm.config import UserError
from nanollm.corpus import driver, parts
from nanollm.corpus.io import progress, shown
from nanollm.data import read_rows, report_bad, to_messages
from nanollm.evaluation import continuation_losses
from nanollm.rollout import load_reward, write_answers
from nanollm.tokenizer import render

PART = 256                                                       # rows that are done or not done together, whatever the batch


def number_of(*what):
    """A number of 40 bits for any JSON values, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(json.dumps(what, ensure_ascii=False).encode("utf-8", "backslashreplace"), digest_size=5).digest(), "big")


def texts(messages):
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def reserved(messages, share):
    """Is this chat one of the `share` that SFT must not see? By all before its last answer, so the same question is never on both sides."""
    return number_of(texts(messages[:-1])) < share * 2**40


def read_chats(paths, max_bad):
    """All rows of chat files as [(row, messages)] that end with an answer; others are counted and shown (data.report_bad)."""
    chats, bad, rows = [], [], read_rows(paths, max_bad=max_bad)
    for where, row in rows:
        try:
            chats.append((row, to_messages(row)))
        except ValueError as e:
            bad.append((where, str(e), json.dumps(row, ensure_ascii=False, default=str)[:200]))
    report_bad(bad, len(rows), None, max_bad)
    return chats


def scored(score, rows, prompts, answers, cfg, tok):
    """rollout.load_reward's score of answers (ids, <|im_end|> included) to prompts, like lengths in one batch. -> list of float."""
    scores, order = [0.0] * len(rows), sorted(range(len(rows)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for start in range(0, len(order), cfg.batch_size):
        batch = order[start : start + cfg.batch_size]
        for i, value in zip(batch, score(*([of[i] for i in batch] for of in (rows, prompts, answers)))):
            scores[i] = value
    for answer, value in zip(answers, scores):
        if not math.isfinite(value):
            raise UserError(f"--rank_with {cfg.rank_with} gave {value} for {tok.decode(answer[:-1])!r}: a score must be a finite number")
    return scores


def sampled(model, tok, prompts, numbers, cfg, moved):
    """One answer for each prompt (ids), drawn with the numbers of its own stream: [(text, its ids, whether it ended by itself)].
    The ids are those of the text, as training will read it, not always those that were drawn. Like lengths share a batch."""
    out, order = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), cfg.batch_size):
        batch = order[start : start + cfg.batch_size]
        new = write_answers(model, [prompts[i] for i in batch], [numbers[i] for i in batch], cfg.seed, cfg.max_new_tokens, cfg.temperature, tok)
        for i, ids in zip(batch, new):
            text = tok.decode(ids)                               # without the end token; unstripped, as the data's own answers are
            out[i] = (text, tok.encode(text), bool(ids) and ids[-1] in tok.stop_ids)
        moved(len(batch))
    return out


def judged(own, samples):
    """(chosen, rejected) of the data's answer (text, ids) and one sample, or a reason why there is no pair."""
    text, ids, ended = samples[0]
    if not ended or not text.strip():
        return "empty" if ended else "unfinished"
    return "equal" if text.strip() == own[0].strip() else (own, (text, ids))


def ranked(samples, scores):
    """(chosen, rejected): the samples with the highest and the lowest score, or a reason why there is no pair."""
    if len(samples) < 2:
        return "unfinished"
    best, worst = max(range(len(samples)), key=scores.__getitem__), min(range(len(samples)), key=scores.__getitem__)
    if samples[best][0].strip() == samples[worst][0].strip():
        return "equal"
    return "tied" if scores[best] == scores[worst] else (samples[best][:2], samples[worst][:2])


def pairs_of(chats, model, tok, score, cfg, moved):
    """Pairs for a list of (row, messages): {"rows": [{"prompt", "chosen", "rejected"}], "counts": {reason: rows}, "sums": {…}}.

    A row is left out, and counted, if its answer or a sample is too long for the context, if the model did not end by itself, if
    both answers are the same, or with a reward model if all that is left of the n samples scores the same."""
    limit, n, counts, sums, rows, todo = cfg.max_seq_len or model.args.max_seq_len, cfg.n if score else 1, Counter(), Counter(), [], []
    fits = lambda prompt, ids: len(prompt) + len(ids) + 1 <= limit
    for row, messages in chats:
        prompt, own = render(tok, messages[:-1], add_generation_prompt=True)[0], tok.encode(messages[-1]["content"])
        if fits(prompt, [] if score else own):
            todo.append((row, messages, prompt, (messages[-1]["content"], own)))
        else:
            counts["too_long"] += 1
            moved(n)
    numbers = [number_of(j, texts(messages)) for _, messages, _, _ in todo for j in range(n)]
    samples = sampled(model, tok, [prompt for _, _, prompt, _ in todo for _ in range(n)], numbers, cfg, moved)
    samples = [samples[i : i + n] for i in range(0, len(samples), n)]
    if score:
        some = [[s for s in of if s[2] and s[0].strip() and fits(prompt, s[1])] for (_, _, prompt, _), of in zip(todo, samples)]
        flat = [(row, prompt, s[1] + [tok.end_id]) for (row, _, prompt, _), of in zip(todo, some) for s in of]
        values = iter(scored(score, *([x[k] for x in flat] for k in range(3)), cfg, tok))
        scores = [[next(values) for _ in of] for of in some]
        found = [ranked(of, of_scores) for of, of_scores in zip(some, scores)]
        for of_scores, pair in zip(scores, found):
            if not isinstance(pair, str):
                sums.update({"score_chosen": max(of_scores), "score_rejected": min(of_scores), "score_mean": sum(of_scores) / len(of_scores)})
    else:
        found = [judged(own, of) for (*_, own), of in zip(todo, samples)]
        found = [pair if isinstance(pair, str) or fits(prompt, pair[1][1]) else "too_long" for (_, _, prompt, _), pair in zip(todo, found)]
    good = [(messages, prompt, pair) for (_, messages, prompt, _), pair in zip(todo, found) if not isinstance(pair, str)]
    counts.update(pair for pair in found if isinstance(pair, str))
    # what the model itself thinks of both: without a reward model its own answer is the likelier one nearly by definition
    losses = continuation_losses(model, [(prompt, side[1] + [tok.end_id]) for _, prompt, pair in good for side in pair])
    for k, (messages, _, pair) in enumerate(good):
        rows.append({"prompt": texts(messages[:-1]), "chosen": pair[0][0], "rejected": pair[1][0]})
        for name, (_, ids), nll in zip(("chosen", "rejected"), pair, losses[2 * k : 2 * k + 2]):
            sums.update({f"tokens_{name}": len(ids) + 1, f"logp_{name}": -nll.sum().item()})
        sums["longer_chosen"] += len(pair[0][1]) > len(pair[1][1])
    return {"rows": rows, "counts": dict(counts), "sums": dict(sums)}


def load_models(cfg, device):
    """(SFT model, its tokenizer, what scores answers or None, what identifies them). Raises UserError for what cannot do this work."""
    model, tok, meta = checkpoint.load(cfg.init_from, device, "chat")
    known, score = [meta["files"]["model.pt"]["sha256"], tok.hash], None
    if (cfg.max_seq_len or 1) > model.args.max_seq_len:
        raise UserError(f"--max_seq_len {cfg.max_seq_len} is longer than the model's context of {model.args.max_seq_len}")
    if cfg.rank_with:
        if cfg.n < 2:
            raise UserError(f"--n {cfg.n}: --rank_with chooses among samples of one question; give 2 or more")
        score, judge = load_reward(cfg.rank_with, tok, cfg.max_seq_len or model.args.max_seq_len, device, "--rank_with")
        file = checkpoint.find(cfg.rank_with) / "model.pt" if judge else cfg.rank_with.rpartition(":")[0]
        known.append([driver.file_hash(file), cfg.rank_with.rpartition(":")[2] * (not judge)])
    return model, tok, score, known


def write_lines(path, rows):
    """Rows as JSON lines, aside and renamed."""
    path, aside = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as f:     # half an emoji (\ud83d) stays an escape
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        parts.publish(aside, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; free some space or choose another place, and run the same command again") from None


def report_of(done, cfg, rows):
    """The numbers of a finished run from its parts."""
    add = lambda key: {name: sum(part[key].get(name, 0) for part in done) for name in sorted({name for part in done for name in part[key]})}
    n, sums = sum(len(part["rows"]) for part in done), add("sums")
    report = {"questions": rows, "pairs": n, "dropped": add("counts")}
    if n:
        report |= {f"{what}_{side}": sums[f"{what}_{side}"] / n for what in ("tokens", "score")[: 1 + bool(cfg.rank_with)] for side in ("chosen", "rejected")}
        report |= {f"logp_per_token_{side}": sums[f"logp_{side}"] / sums[f"tokens_{side}"] for side in ("chosen", "rejected")}
        report |= {"chosen_is_longer": sums["longer_chosen"] / n} | ({"score_mean": sums["score_mean"] / n} if cfg.rank_with else {})
    return report


def make(cfg):
    """What `prepare_data.py rejects` does; see its options. Returns the report, None if only the split was made. Under torchrun the
    ranks answer different parts, and rank 0 joins them."""
    ctx = dist.init(cfg.device, listen=False)                    # nothing to save: a part that is cut off is made again
    report = split_and_answer(cfg, ctx)
    dist.finish(ctx)
    return report


def split_and_answer(cfg, ctx):
    if not 0 < cfg.share <= 1:
        raise UserError(f"--share {cfg.share} does not lie between 0 and 1; the notes reserve 0.25")
    if not cfg.init_from and not cfg.sft_out:
        raise UserError("--init_from: name the SFT model that answers (or --sft_out FILE, to split off the rows that SFT may see)")
    if any(Path(cfg.sft_out).resolve() == Path(path).resolve() for path in [*cfg.data, *cfg.exclude, cfg.out] if cfg.sft_out):
        raise UserError(f"--sft_out {cfg.sft_out} is one of the other files; choose another name")
    chats = read_chats(cfg.data, cfg.max_bad)
    if cfg.exclude:                                              # the questions of a validation file must not teach
        held_out = {number_of(texts(messages[:-1])) for _, messages in read_chats(cfg.exclude, cfg.max_bad)}
        before, chats = len(chats), [(row, messages) for row, messages in chats if number_of(texts(messages[:-1])) not in held_out]
        print(f"  {before - len(chats):,} chats are left out: their question stands in --exclude")
    mine, others = [], []
    for row, messages in chats:
        (mine if reserved(messages, cfg.share) else others).append((row, messages))
    print(f"  {len(mine):,} of {len(chats):,} chats ({len(mine) / max(len(chats), 1):.1%}) are reserved for pairs, {len(others):,} are for SFT", flush=True)
    if cfg.sft_out:
        if not others:
            raise UserError(f"--sft_out {cfg.sft_out}: --share {cfg.share} leaves no row for SFT")
        if ctx.main:
            write_lines(cfg.sft_out, (row for row, _ in others))
        print(f"  -> {shown(cfg.sft_out)}: what train_sft.py may read")
    if not cfg.init_from:
        return None
    if not mine:
        raise UserError(f"--data: none of {len(chats):,} chats falls into --share {cfg.share}; give more rows or a larger share")
    mine = mine[: cfg.max_rows or None]
    return answer(cfg, ctx, mine)


def answer(cfg, ctx, chats):
    """Generate, part by part, what is not there yet, every rank its share; then join the parts to --out."""
    model, tok, score, known = load_models(cfg, ctx.device)
    own = {k: getattr(cfg, k) for k in ("max_seq_len", "max_new_tokens", "temperature", "seed")} | {"n": cfg.n if score else 1}
    signature = driver.signature_of([known, own], [], [texts(messages) for _, messages in chats])
    out, work = Path(cfg.out), Path(f"{cfg.out}.work")
    report_path = Path(f"{cfg.out}.report.json")
    before = json.loads(report_path.read_text(encoding="utf-8")) if report_path.is_file() else None
    if out.exists() and before is None:
        raise UserError(f"--out {out} is there and no {report_path.name} beside it, so prepare_data.py did not write it; choose another name")
    if out.exists() and before["signature"] == signature and not cfg.force:
        print(f"rejects: {shown(out)} is complete, skipped (--force redoes it)")
        shutil.rmtree(work, ignore_errors=True)
        return before
    here = work / signature
    if ctx.main and (cfg.force or not here.is_dir()):
        shutil.rmtree(work, ignore_errors=True)                  # of other settings
    try:
        here.mkdir(parents=True, exist_ok=True) if ctx.main else None
    except OSError as e:
        raise UserError(f"--out {out}: cannot make {work}: {e.strerror}; choose another place") from None
    spans = [chats[i : i + PART] for i in range(0, len(chats), PART)]
    path = lambda k: here / f"part-{k:05d}.json"
    todo = ctx.gather([k for k in range(len(spans)) if not path(k).exists()])[0]           # as rank 0 sees them, which has cleared the place
    if len(todo) < len(spans):
        print(f"  {len(spans) - len(todo)} of {len(spans)} parts were done before", flush=True)
    bar = progress(total=sum(len(spans[k]) for k in todo[ctx.rank :: ctx.world_size]) * own["n"], desc="rejects", unit=" answers", disable=not ctx.main)
    for k in todo[ctx.rank :: ctx.world_size]:
        parts.write_json(path(k), pairs_of(spans[k], model, tok, score, cfg, bar.update))
    bar.close()
    ctx.barrier()
    if not ctx.main:
        return None
    if missing := [k for k in range(len(spans)) if not path(k).exists()]:
        raise UserError(f"{path(missing[0])} is not there: all processes must see the same --out, on a disk that they share")
    done = [json.loads(path(k).read_text(encoding="utf-8")) for k in range(len(spans))]
    report = report_of(done, cfg, len(chats)) | {"settings": own | {"init_from": str(cfg.init_from), "rank_with": str(cfg.rank_with)}, "signature": signature}
    if not report["pairs"]:
        raise UserError(f"no pair is left of {len(chats):,} questions: {report['dropped']}; "
                        f"{'raise --max_new_tokens, or' if report['dropped'].get('unfinished') else 'raise --temperature, or'} use more rows")
    rows = [row for part in done for row in part["rows"]]
    out.unlink(missing_ok=True)                                  # then the report, then the file: killed in between, the next run joins again
    parts.write_json(report_path, report)
    write_lines(out, rows)
    shutil.rmtree(work, ignore_errors=True)
    show(report, rows, out)
    return report


def show(report, rows, out):
    dropped = ", ".join(f"{n:,} {why}" for why, n in report["dropped"].items()) or "none"
    print(f"  {report['pairs']:,} pairs of {report['questions']:,} questions; left out: {dropped}")
    for name in ("tokens", "logp_per_token", "score"):
        if f"{name}_chosen" in report:
            print(f"  {name:<16} chosen {report[f'{name}_chosen']:.3f}, rejected {report[f'{name}_rejected']:.3f}")
    print(f"  the chosen answer is the longer one in {report['chosen_is_longer']:.1%}")
    for row in rows[:3]:
        print(f"    {row['prompt'][-1]['content'][:60]!r}: {row['chosen'][:60]!r} rather than {row['rejected'][:60]!r}")
    print(f"  -> {shown(out)}: python train_dpo.py --data {out.as_posix()}", flush=True)
