"""The numbers of the demo road, each beside what is known to be true (docs/evaluation.md): loss beside the entropy floor, answers beside
the one right answer, wins judged by the rule that made the preferences. evaluate.py --task demo."""
import time
from pathlib import Path

from nanollm import checkpoint, choices, dist, evaluation, metrics, world
from nanollm.data import PreferenceRows, TokenFile, read_rows, to_messages, to_preference
from nanollm.tokenizer import render


def first(rows, cfg):
    return rows[: cfg.max_rows or None]


def measure(cfg):
    """All numbers of the road in cfg.run_dir (evaluate.py's Config), as a dict for eval.json."""
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

    rows = first([row for _, row in read_rows([raw / "chat_val.jsonl"])], cfg)
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
    numbers |= side_by_side(models, reward, tok, rows, replies, first([row for _, row in read_rows([raw / "prefs_val.jsonl"])], cfg), cfg)
    dpo = models["dpo"]

    questions = first(choices.read_choices(raw / "mc" / "demo.csv"), cfg)
    found = choices.multiple_choice(dpo, tok, questions, score="text", chat=True)
    numbers["mc"] = {"accuracy": found["acc_norm"], "low": found["norm_low"], "high": found["norm_high"],
                     **{key: found[key] for key in ("chance", "n", "scoring", "template", "prompt")}}
    print(f"mc         accuracy {found['acc_norm']:.3f} [{found['norm_low']:.3f}, {found['norm_high']:.3f}], chance {found['chance']:.3f}, "
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

    rival, found, bars = sampled(models["sft"], cfg.seed + 1)[2], {}, {}
    for k, (name, model) in enumerate(models.items(), 2):
        answers, texts, rates = sampled(model, cfg.seed + k)
        greedy = replies
        if name != "sft":
            greedy = evaluation.answers(model, tok, [to_messages(row)[:-1] for row in questions], cfg.max_new_tokens, batch_size=cfg.batch_size)
        found[name] = {"exact_match": evaluation.exact_match(questions, greedy, world.correct)["exact_match"],
                       "win_rate": evaluation.win_rate(rates, rival), "rule": sum(rates) / len(rates),
                       "stop_rate": sum(ended for _, ended in answers) / len(answers),
                       **evaluation.away_from(models["sft"], model, reward, tok, ids, answers)}
        bars[name] = metrics.mean(metrics.wins(rates, rival), "win_rate")
        found[name]["chats"] = [{"prompt": prompt[-1]["content"], "text": text} for prompt, text in list(zip(asked, texts))[:5]]
        print(f"{name + ', sampled':<13} " + ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in found[name].items() if key != "chats"))
    before = found["sft"]["win_rate"]
    print(f"           {len(rows)} prompts, answers sampled at temperature 1, only exact match is greedy; the win rate is against the SFT model, "
          f"which stands at {before:.3f} against itself")
    return {"models": found} | {name: {**bars[name], "win_rate_before": before, "n": len(rows)}
                                for name in list(models)[1:]}
