"""The options of prepare_data.py, one dataclass a command: --key value, or key = value in the TOML file of --config."""
import math
from dataclasses import dataclass

from nanollm.config import arg

OUT = "output directory of all stages"


@dataclass
class Stage:                                              # what every stage on documents has
    input: list = arg([], "raw files or directories, each perhaps NAME=PATH, or the directory of a stage (default: the stage before)")
    out: str = arg("out/data", OUT)
    doc_sep: str = arg("auto", "what ends a document in .txt: line | blank | file | auto (blank lines if any)")
    max_bad: float = arg(0.01, "stop if more than this share of the rows, or of the files, cannot be read")
    strict: bool = arg(False, "exit with code 3 if any row could not be read")
    fail_fast: bool = arg(False, "stop at the first row that cannot be read")
    keep_dropped: bool = arg(True, "write dropped documents, with the reason, to part-….dropped.parquet")
    show: int = arg(3, "examples to show for each reason")
    workers: int = arg(0, "processes; 0 = one a core")
    runner: str = arg("local", "local | ray: processes of this machine, or a Ray cluster (extra: ray)")
    shard: str = arg("0/1", "i/n: do only every n-th task from the i-th; the plain command then finishes the stage")
    force: bool = arg(False, "redo what is already there")


@dataclass
class Clean(Stage):
    input: list = arg([], "raw files or directories, each perhaps NAME=PATH")
    recipe: str = arg("default", "edits and filters: a file, or a name from recipes/ (default, web, encyclopedia, chat, verse)")
    min_chars: int = arg(0, "shorter documents are dropped; 0 = what the recipe says", unit="characters")


@dataclass
class Dedup(Stage):
    threshold: float = arg(0.7, "a document goes if its Jaccard similarity with a kept one reaches this")
    sketch: str = arg("numpy", "numpy: our MinHash | oph: one permutation, faster | datasketch: in memory, small corpora | simhash")
    shingle: str = arg("char", "a document is the set of its runs of --ngram: char | word | jieba (extra: jieba)")
    ngram: int = arg(5, "length of a run", unit="characters or words")
    num_perm: int = arg(256, "permutations of MinHash")
    bands: int = arg(0, "bands of LSH; 0 = chosen for --threshold")
    rows: int = arg(0, "rows of a band; 0 = chosen for --threshold")
    fn_weight: float = arg(0.5, "weight of an overlooked pair in that choice, against a false candidate")
    cluster: str = arg("greedy", "greedy: gone only if like a kept one | cc: whole connected components")
    keep: str = arg("first", "which of several stays: first | longest | best (by quality)")
    verify: bool = arg(True, "compute the true similarity of every candidate pair")
    min_units: int = arg(20, "shorter documents go only if equal", unit="characters or words")
    hamming: int = arg(3, "simhash: candidates differ in at most so many bits", unit="of 64 bits")
    hash_seed: int = arg(1, "of the permutations")


@dataclass
class Outliers(Stage):
    sigmas: float = arg(3.0, "dropped if further than this from the mean of its source", unit="standard deviations")
    ppl_low: float = arg(0.005, "dropped if its perplexity is below this quantile of its source (boilerplate)")
    ppl_high: float = arg(0.99, "… or above this one (noise)")
    order: int = arg(3, "of the character model: 1 unigrams, 2 bigrams, 3 trigrams", least=1)


@dataclass
class Sentences(Stage):
    unit: str = arg("line", "line | sentence")
    span: int = arg(1, "so many of them in a row (C4: 3 sentences)", least=1)
    min_segment: int = arg(30, "shorter ones are left alone", unit="characters")
    min_documents: int = arg(10, "cut from all documents but the first if it stands in so many", least=2)


@dataclass
class Weigh(Stage):
    by: str = arg("tfidf", "tfidf: cosine to the nearest earlier document | commonness: how probable its n-grams are (SoftDedup)")
    threshold: float = arg(0.5, "tfidf: LSH looks for neighbours from this Jaccard similarity on")
    thin: bool = arg(True, "drop documents by lot, with their weight as the probability to stay")
    seed: int = arg(1234, "of that lottery")


@dataclass
class Decontaminate(Stage):
    eval_data: list = arg([], "evaluation files or directories: .csv with Question,A,B,C,D,Answer, .jsonl, .txt")
    n: int = arg(13, "a run of so many units in common is a hit", unit="characters or words")
    policy: str = arg("cut", "cut: the hit and 200 characters around it | drop: the document")


@dataclass
class Score(Stage):
    scorer: str = arg("", "FILE.py:function (text -> float); empty: the rules of score.py")
    classifier: str = arg("", "RUN:LABEL: the probability of LABEL by a classifier of train_classify.py is the quality")
    as_source: bool = arg(False, "with a classifier: a document's likeliest label becomes its source (tokenize --by_source, --mix)")
    select: str = arg("none", "none: only the column | threshold | sample: by lot between --low and --high")
    threshold: float = arg(0.5, "threshold: documents below are dropped", least=-math.inf)
    low: float = arg(0.2, "sample: never kept at or below", least=-math.inf)
    high: float = arg(0.8, "sample: always kept at or above", least=-math.inf)
    seed: int = arg(1234, "of that lottery")


@dataclass
class Tokenizer(Stage):
    vocab_size: int = arg(6400, "size of the vocabulary to train, control tokens included", unit="tokens")
    kind: str = arg("bpe", "bpe: byte-level BPE | sp_bpe, sp_unigram: SentencePiece | wordpiece, char: they lose what they do not know")
    han_run: int = arg(16, "most Han characters that may become one token; 1 = Chinese by character", least=1)
    sample_mb: int = arg(16, "text to learn from, chosen by its hash; takes about 60 times as much memory", unit="MiB", least=1)
    tokenizer: str = arg("", "use this one instead of training: a directory, .model, tokenizer.json or .tiktoken")


@dataclass
class Tokenize(Stage):
    tokenizer: str = arg("", "a directory, .model, tokenizer.json or .tiktoken; empty: OUT/tokenizer")
    val_fraction: float = arg(0.02, "share of documents held out for validation, chosen by a hash of their text")
    seed: int = arg(1234, "order of the documents in the token files")
    shard_tokens: int = arg(1 << 28, "most tokens of one file", least=1)
    by_source: bool = arg(False, "a directory of token files for each source, to be mixed by weight: train_pretrain.py --mix")


@dataclass
class Compare:
    tokenizer: list = arg([], "directories, .model, tokenizer.json or .tiktoken files")
    vocab_size: list = arg([], "also train our BPE at these sizes, on nine tenths of the text")
    input: list = arg([], "raw files or directories to measure them on")
    han_run: int = arg(16, "of ours: most Han characters that may become one token", least=1)
    dim: int = arg(512, "width of the model whose embedding is counted")
    layers: int = arg(8, "its layers")
    hidden_dim: int = arg(1376, "width of its feed-forward layers")
    tied: bool = arg(False, "whether it shares input and output embedding")
    plot: str = arg("", "also draw bytes a token over vocabulary size into this .png (extra: plot)")
    doc_sep: str = arg("auto", "what ends a document in .txt: line | blank | file | auto (blank lines if any)")


@dataclass
class Build(Tokenize, Tokenizer, Decontaminate, Dedup, Clean):                         # only to have the options of all
    """clean, dedup, decontaminate if --eval_data is given, tokenizer, tokenize."""
    input: list = arg([], "raw files or directories, each perhaps NAME=PATH")
    tokenizer: str = arg("", "use this one instead of training: a directory, .model, tokenizer.json or .tiktoken")


@dataclass
class Export(Stage):
    dropped: bool = arg(False, "the dropped documents instead of the kept ones")


@dataclass
class Demo:
    out: str = arg("out/demo/raw", "where the raw files of the embedded demo world go")
    size: str = arg("demo", "demo | smoke: minutes or seconds of training")
    seed: int = arg(0, "another seed, another world")
    force: bool = arg(False, "redo what is already there")


@dataclass
class Rejects:
    init_from: str = arg("", "the SFT model that answers; empty = only split the rows off, with --sft_out")
    data: list = arg(["out/demo/raw/chat_train.jsonl"], "chat files: .jsonl, .json, .parquet")
    exclude: list = arg([], "held-out chat files: rows whose question stands there are left out")
    out: str = arg("out/prefs.jsonl", "the pairs; a report stands beside it")
    share: float = arg(0.25, "share of the questions that SFT must not see and that get a rejected answer; 1 = all rows")
    sft_out: str = arg("", "also write the other rows here: what train_sft.py may read")
    rank_with: str = arg("", "a reward model, or a rule FILE.py:function(row, text): chosen and rejected are the best and worst of --n samples")
    n: int = arg(4, "samples a question, with --rank_with", least=1)
    temperature: float = arg(1.0, "1 = as the model is; lower is likelier and more often equal to the row's own answer")
    max_seq_len: int = arg(0, "longest question and answer together; 0 = the model's context", unit="tokens")
    max_new_tokens: int = arg(128, "an answer that has not ended here is left out", unit="tokens", least=1)
    max_rows: int = arg(0, "only so many of the reserved rows; 0 = all")
    batch_size: int = arg(64, "answers that are generated together; changes the speed, not the pairs", least=1)
    seed: int = arg(0, "of the samples")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")
    max_bad: float = arg(0.1, "largest share of unusable rows before the run refuses to start")
    force: bool = arg(False, "redo what is already there")
