"""Raw files -> clean -> deduplicate -> tokenizer -> token files.

    python prepare_data.py build --input books/ news.jsonl.gz baike=563w_baidubaike.json --out out/mydata --vocab_size 6400

reads .txt .jsonl .json .parquet .csv .tsv .warc .wet (each also .gz) or directories of them, and leaves one directory a
stage. Each stage is a command of its own and reads the last one before it that is there (`prepare_data.py COMMAND --help`):

    clean           edits and filters; a dropped document has one reason                        docs/cleaning.md
    dedup           exact and near copies                                                       docs/deduplication.md
    sentences       lines that stand in many documents; weigh: copies weigh less (both: if you run them)
    outliers        what the corpus itself finds strange: 3 sigma, perplexity (if you run it)   docs/cleaning.md
    decontaminate   the questions of the tests to come (build: with --eval_data)                docs/decontamination.md
    score           a quality for each document, and without the worst (if you run it)          docs/data.md
    tokenizer       tokenizer.json, vocab.txt; compare: several side by side                    docs/tokenizer.md
    tokenize        train and val token files: what `train_pretrain.py --data` wants            docs/packing.md
    rejects         preference pairs from an SFT model; best of n with a reward model           docs/preference_data.md
    build           clean, dedup, tokenizer, tokenize | demo: the files of the demo world | export: documents as JSON lines

Documents lie in Parquet parts with a JSON sidecar each; report.json and report.html say what happened to them. A run that
was killed goes on where it was, and a finished stage is skipped.
"""
import dataclasses
import os
import shutil
import sys
from pathlib import Path

from nanollm import config, foreign_tokenizers, sampler, tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.corpus import adapters, bpe, columns, driver, edits, filters, foreign, io, lm, minhash, ngrams, on_ray, pack, parts, passes, pii
from nanollm.corpus import clean as cleaning, compare as comparing, decontaminate as decontamination, dedup as deduplication, wordpiece
from nanollm.corpus import outliers as outlying, readers, score as scoring, sentences as sentence_dedup, simhash, soft, train_tokenizer as training
from nanollm.corpus.options import Build, Clean, Compare, Decontaminate, Dedup, Demo, Export, Outliers, Rejects, Score, Sentences, Stage
from nanollm.corpus.options import Tokenize, Tokenizer, Weigh
from nanollm.corpus.parts import Parts, read_report
from nanollm.corpus.stage import stage

READING = [io, readers, adapters, foreign, parts]        # the code that decides what a document is
FLOW = ("score", "decontaminate", "outliers", "weigh", "sentences", "dedup", "clean", "ingest")      # a stage reads the last one that is there


def one_of(cfg, **choices):
    """UserError if an option is none of its choices."""
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed.split():
            raise UserError(f"--{name}: {getattr(cfg, name)!r} is none of {', '.join(allowed.split())}")


def raw_tasks(cfg):
    """The raw files of --input cut into tasks, and what is said about it."""
    if not cfg.input:
        raise UserError("--input: name the raw files or directories to read")
    one_of(cfg, doc_sep="auto line blank file")
    files, skipped = io.find_files(cfg.input, exclude=getattr(cfg, "out", os.devnull))
    tasks = io.plan(files, cfg.doc_sep)
    for path, sep in {task.path: task.sep for task in tasks}.items():
        print(f"  reading {io.shown(path)}" + f" (--doc_sep {sep})" * (io.kind(path) == ".txt"))
    for path, why in skipped:
        print(f"  skipped {io.shown(path)}: {why}")
    return tasks


def source_of(cfg, name):
    """The documents that stage `name` reads: --input (raw files become OUT/ingest first), or what the stage before left."""
    one_of(cfg, runner="local ray")
    if cfg.input and not (len(cfg.input) == 1 and (Path(cfg.input[0]) / "report.json").is_file()):
        plain = dataclasses.replace(cfg, shard="0/1")
        driver.run_stage(plain, "ingest", raw_tasks(cfg), lambda: [], {}, READING)
        return Parts(Path(cfg.out) / "ingest")
    before = FLOW[FLOW.index(name) + 1:] if name in FLOW else FLOW
    found = [Path(cfg.out) / s for s in before if (Path(cfg.out) / s / "report.json").is_file()]
    source = Parts(cfg.input[0] if cfg.input else found[0] if found else Path(cfg.out) / "clean")
    source.check_fresh()
    return source


def settings_of(cfg, source=None, **more):
    """What decides, beside code and input, what a stage writes: the options that its own class adds, and its source."""
    own = {f.name for f in dataclasses.fields(cfg)} - {f.name for f in dataclasses.fields(Stage)}
    settings = {name: getattr(cfg, name) for name in sorted(own)} | more
    return settings | ({"from": [io.shown(source.directory), source.signature]} if source else {})


def demo(cfg):
    """Write the raw files of the embedded demo world: documents, chats, preference pairs, a multiple-choice test."""
    one_of(cfg, size="demo smoke")
    from nanollm import world                             # only this command needs it

    def work(out):
        world.write(out, cfg.size, cfg.seed)
        files = {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
        print("\n".join(f"  {name:<18} {size:>12,} bytes" for name, size in files.items()))
        return {"files": files}
    stage(cfg, "", [], {"size": cfg.size, "seed": cfg.seed}, [world], work)


def clean(cfg):
    """Read raw files, edit the text, and drop what the recipe says."""
    recipe = cleaning.read_recipe(cfg.recipe, {"filters": {"too_short": {"chars": cfg.min_chars}}} if cfg.min_chars else {})
    code = [*READING, cleaning, edits, filters, pii]
    driver.run_stage(cfg, "clean", raw_tasks(cfg), lambda: [(cleaning.clean, recipe)], {"recipe": recipe.settings}, code)


def dedup(cfg):
    """Remove exact copies by hash, and near copies: MinHash-LSH candidates, verified by true Jaccard similarity."""
    settings = deduplication.config_of(cfg)
    source, work = source_of(cfg, "dedup"), driver.work_of(cfg, "dedup")
    found, (shard, of) = {}, driver.shard_of(cfg.shard)
    if of > 1:
        deduplication.sketch_shard(source.paths, work, settings, driver.runner_of(cfg), shard, of)
        print(f"dedup: shard {cfg.shard} is sketched; when all are, run `python prepare_data.py dedup` once without --shard")
        return

    def steps():
        join = on_ray.join if cfg.runner == "ray" else None
        found.update(deduplication.deduplicate(source.paths, work, settings, driver.runner_of(cfg), join))
        print("\n".join("  " + line for line in deduplication.lines(found)))
        return [(deduplication.drop_duplicates, deduplication.Decisions(str(work)))]

    def extra():
        return found | {"largest_clusters": deduplication.largest_clusters(source.paths, work, chars=200)}
    report = driver.run_stage(cfg, "dedup", driver.part_tasks(source), steps, settings_of(cfg, source), [deduplication, minhash, simhash], extra)
    if report:
        shutil.rmtree(work, ignore_errors=True)


def not_in_shards(cfg):
    if cfg.shard != "0/1":
        raise UserError("--shard is for clean, score and the sketches of dedup; this stage joins the whole corpus: run it once, or --runner ray")


def two_passes(cfg, name, gather, code, after=lambda source, steps: {}, **more):
    """A stage that sees the whole corpus before it decides: gather(source, work, cfg, run) -> steps. `after` adds to the report."""
    not_in_shards(cfg)
    source, work, made = source_of(cfg, name), driver.work_of(cfg, name), []
    settings, code = settings_of(cfg, source, **more), [passes, columns, ngrams, *code]

    def steps():                                          # what was gathered holds for these settings and this code only
        made.extend(gather(source, work / driver.signature_of(settings, code), cfg, driver.runner_of(cfg)))
        return made
    report = driver.run_stage(cfg, name, driver.part_tasks(source), steps, settings, code, lambda: after(source, made))
    if report:
        shutil.rmtree(work, ignore_errors=True)


def outliers(cfg):
    """Drop what the corpus itself finds strange: 3 sigma from the mean of its source, or a perplexity at either end."""
    two_passes(cfg, "outliers", passes.outlier_steps, [outlying, lm, filters])


def sentences(cfg):
    """Cut lines or sentences that stand in many documents (headers, footers, notices) from all of them but the first."""
    one_of(cfg, unit="line sentence")
    two_passes(cfg, "sentences", passes.sentence_steps, [sentence_dedup])


def weigh(cfg):
    """Soft deduplication: the more like others a document is, the less it weighs; with --thin the weight is its chance to stay."""
    one_of(cfg, by="tfidf commonness")
    two_passes(cfg, "weigh", passes.weigh_steps, [soft, deduplication, minhash])


def decontaminate(cfg):
    """Remove the questions of the evaluation files from the corpus, and say how much of each test was found in it."""
    one_of(cfg, policy="cut drop")
    if not cfg.eval_data:
        raise UserError("--eval_data: name the files of the tests that the model is to be judged by")

    def found(source, steps):
        rows = passes.contamination(source, steps[0][1], driver.runner_of(cfg))
        print(f"  {len(rows)} tests of {sum(row['items'] for row in rows):,} items, {sum(row['items_hit'] for row in rows):,} of them found")
        for row in rows:
            if row["items_hit"]:
                print(f"  {row['task']}: {row['items_hit']:,} of {row['items']:,} items found, {row['coverage']:.0%} of their n-grams on the "
                      f"average, in {row['documents']:,} documents")
        return {"tasks": rows}
    tests = [path for _, path in decontamination.evaluation_files(cfg.eval_data)]
    two_passes(cfg, "decontaminate", passes.decontamination_steps, [decontamination], found, tests=[driver.file_hash(p) for p in tests])


def score(cfg):
    """Give every document a quality, and drop those below --threshold, or by lot."""
    source = source_of(cfg, "score")
    settings = scoring.Score(cfg.scorer, cfg.select, cfg.threshold, cfg.low, cfg.high, cfg.seed)
    steps, code, more = [(scoring.score, settings)], [scoring, columns, ngrams], {}
    if cfg.scorer:
        scoring.load_scorer(cfg.scorer)                   # refused at once if it cannot be loaded
        more = {"scorer_hash": driver.file_hash(Path(cfg.scorer.rpartition(":")[0]))}
    if cfg.classifier or cfg.as_source:
        from nanollm import classify                      # only these options need torch
        judge, more = classify.judge_of(cfg)
        steps, code = [(classify.judge, judge), (scoring.select, settings)], [*code, classify]
    report = driver.run_stage(cfg, "score", driver.part_tasks(source), lambda: steps, settings_of(cfg, source, **more), code)
    if report and cfg.as_source:
        print("  sources of the kept: " + " | ".join(f"{name} {n:,}" for name, n in report.get("sources", {}).items()))


def tokenizer(cfg):
    """Train a tokenizer (or take the one given), and say how much text a token carries."""
    not_in_shards(cfg)
    documents = source_of(cfg, "tokenizer")
    given = tokenizers.load(cfg.tokenizer) if cfg.tokenizer else None

    def work(out):
        texts = io.progress(documents.texts(), total=len(documents), desc="tokenizer", unit=" docs")
        tok = given or training.train_tokenizer(cfg.kind, texts, cfg.vocab_size, cfg.han_run, cfg.sample_mb << 20,
                                                lambda line: print("  " + line.removeprefix("tokenizer: ")))
        tok.save(out)
        foreign_tokenizers.export(tok, tokenizers.chat_template(tok), out / "export")
        some = list(documents.sample(2000))
        row, = comparing.compare({"": tok}, {"all": some} | comparing.by_language(some))
        print(f"  {tok.kind}, {tok.vocab_size:,} ids")
        carried = {name: row[name] for name in comparing.languages([row])}
        for name, c in carried.items():
            print(f"    {name}: {c['bytes_per_token']:.2f} bytes, {c['chars_per_token']:.2f} characters a token")
        return {"kind": tok.kind, "vocab_size": tok.vocab_size, "hash": tok.hash, **carried.pop("all"), **carried}
    settings = {"tokenizer": given.hash} if given else settings_of(cfg)
    stage(cfg, "tokenizer", documents, settings, [tokenizers, foreign_tokenizers, training, bpe, wordpiece], work)


def compare(cfg):
    """Several tokenizers side by side: bytes and characters a token by language, speed, and what the embedding costs."""
    if not cfg.tokenizer and not cfg.vocab_size:
        raise UserError("--tokenizer or --vocab_size: name the tokenizers to compare, or sizes to train ours at")
    tasks, unread = raw_tasks(cfg), set()
    learn, measure = comparing.split(lambda: (row["text"] for task in tasks for row in io.documents(
        task, lambda line, *why: unread.add((task.path, line))) if not row["drop_reason"]))
    print(f"  {len(unread):,} rows could not be read and are left out (`prepare_data.py clean` says why)" if unread else "", end="\n" * bool(unread))
    tried = comparing.our_sizes(learn, [config.convert("vocab_size", size, 0, "command line") for size in cfg.vocab_size], cfg.han_run)
    tried |= {path: tokenizers.load(path) for path in cfg.tokenizer}
    rows = comparing.compare(tried, comparing.by_language(measure), cfg.dim, cfg.layers, cfg.hidden_dim, cfg.tied)
    print(comparing.table(rows))
    if cfg.plot:
        comparing.plot(rows, cfg.plot)


def tokenize(cfg):
    """Split off the validation documents, shuffle, encode, and write the token files."""
    not_in_shards(cfg)
    documents = source_of(cfg, "tokenize")
    path = cfg.tokenizer or (Path(cfg.out) / "tokenizer").as_posix()
    tok = tokenizers.load(path)
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"--val_fraction: {cfg.val_fraction} does not lie between 0 and 1")

    def work(out):
        found = pack.write_splits(documents.paths, out, path, cfg.val_fraction, cfg.seed, driver.runner_of(cfg), cfg.shard_tokens, cfg.by_source)
        tok.save(out / "tokenizer")
        for name, splits in (found if cfg.by_source else {"": found}).items():
            for split, m in splits.items():
                print(f"  {name} {split}: {m['n_docs']:,} documents, {m['n_tokens']:,} tokens ({m['dtype']}), "
                      f"{m['n_bytes'] / m['n_tokens']:.2f} bytes a token")
        return found
    stage(cfg, "tokens", documents, settings_of(cfg) | {"tokenizer": tok.hash}, [tokenizers, pack, sampler], work, goes_on=True)


def export(cfg):
    """Write the documents of a stage as JSON lines, beside its parts: {"id", "text"}, chats as {"messages"}, pairs as {"prompt", "chosen", "rejected"}."""
    print("{1:,} rows -> {0}".format(*parts.export(source_of(cfg, "export"), cfg.dropped)))


def rejects(cfg):
    """Preference pairs from an SFT model: a row's own answer against the model's, or with --rank_with the best of n samples against the worst."""
    from nanollm import preferences                       # only this command needs torch
    print("rejects", flush=True)
    preferences.make(cfg)


def build(cfg):
    """clean, dedup, (decontaminate,) tokenizer, tokenize: from raw files to what `train_pretrain.py --data` reads."""
    if cfg.shard != "0/1":
        raise UserError("--shard is for one stage at a time: run clean --shard i/n everywhere, then clean once, then dedup …")
    # what would be refused in an hour is refused now
    deduplication.config_of(cfg), decontamination.evaluation_files(cfg.eval_data)
    tokenizers.load(cfg.tokenizer) if cfg.tokenizer else training.check(cfg.kind, cfg.vocab_size)
    stages = [(clean, Clean), (dedup, Dedup), *[(decontaminate, Decontaminate)] * bool(cfg.eval_data), (tokenizer, Tokenizer), (tokenize, Tokenize)]
    last = None
    for function, cls in stages:
        options = cls(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(cls)})
        if last:                                          # each stage reads the one before, whatever else lies in --out
            options.input = [str(Path(cfg.out) / last)]
        if function is tokenize:
            options.tokenizer = ""                        # the one that was just made
        function(options)
        last = function.__name__ if function.__name__ in FLOW else last
    print(f"next: python train_pretrain.py --data {Path(cfg.out, 'tokens').as_posix()}")


COMMANDS = {f.__name__: (f, options) for f, options in (
    (demo, Demo), (clean, Clean), (dedup, Dedup), (sentences, Sentences), (weigh, Weigh), (outliers, Outliers), (decontaminate, Decontaminate),
    (score, Score), (tokenizer, Tokenizer), (compare, Compare), (tokenize, Tokenize), (export, Export), (rejects, Rejects), (build, Build))}


def strictly(function, cfg):
    """Run a command; with --strict, rows that could not be read make the exit code 3."""
    function(cfg)
    reports = [read_report(Path(cfg.out) / name) for name in ("clean", "ingest")] if getattr(cfg, "strict", False) else []
    if bad := sum(sum(report["quarantined"].values()) for report in reports if report):
        print(f"error: --strict: {bad:,} rows could not be read; they stand in {cfg.out}/*/quarantine.jsonl", file=sys.stderr)
        sys.exit(3)


def main(argv):
    command = argv[0] if argv else "--help"
    if command in COMMANDS:
        function, options = COMMANDS[command]
        config.run(lambda cfg: strictly(function, cfg), options, f"prepare_data.py {command}\n\n{function.__doc__}", argv[1:])
    elif command in ("--help", "-h"):
        print(__doc__.strip())
    else:
        print(f"error: {command!r} is no command of prepare_data.py; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
