"""Architecture options, each a small file that puts something else in place of one named part of the model.

    python train_pretrain.py --variants qk_norm moe:n_experts=8,top_k=2

A variant is a function `name(model, option=default, …)`. It changes the model in place; the model itself knows nothing of it
and only keeps the words in ModelArgs.variants, so that a checkpoint rebuilds what was trained.
"""
import dataclasses
import difflib
import inspect

from nanollm.config import UserError, convert
from nanollm.model import RewardModel, Transformer
from nanollm.variants.ffn import geglu, gelu, relu
from nanollm.variants.gpt2 import gpt2
from nanollm.variants.moe import add_balance, moe
from nanollm.variants.prefix_lm import mark_prefix, prefix_lm
from nanollm.variants.qk_norm import qk_norm
from nanollm.variants.qkv_bias import qkv_bias
from nanollm.variants.rope_scaling import rope_scaling
from nanollm.variants.sliding_window import sliding_window

REPLACES = {                                                 # two variants cannot replace the same part
    qk_norm: ["attention"], qkv_bias: ["attention"], relu: ["feed_forward"], gelu: ["feed_forward"], geglu: ["feed_forward"], moe: ["feed_forward"],
    rope_scaling: ["positions"], sliding_window: ["mask"], prefix_lm: ["mask"],
    gpt2: ["attention", "feed_forward", "positions", "mask"],        # it counts its positions in the causal mask
}
VARIANTS = {f.__name__: f for f in REPLACES}


def nearest(word, known):
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}" if known else "it has none"


def parse(text):
    """'moe:n_experts=4' -> ('moe', {'n_experts': 4, 'top_k': 2, …}), all its options, each value of its default's type."""
    name, _, rest = text.partition(":")
    if name not in VARIANTS:
        raise UserError(f"--variants: there is no {name!r}; {'separate them by spaces' if ',' in name else nearest(name, VARIANTS)}")
    defaults = {p.name: p.default for p in inspect.signature(VARIANTS[name]).parameters.values() if p.default is not p.empty}
    options = dict(defaults)
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if key not in defaults or not equals:
            hint = "separate variants by spaces" if key.partition(":")[0] in VARIANTS else nearest(key, defaults)
            raise UserError(f"--variants {text}: {name} has no option {key!r}; {hint}" if key not in defaults
                            else f"--variants {text}: give {key} a value, {key}={defaults[key]}")
        try:
            options[key] = convert(key, value, defaults[key], text)
        except UserError:
            raise UserError(f"--variants {text}: {key} wants {type(defaults[key]).__name__}, got {value!r}") from None
    return name, options


def build(args, head="lm"):
    """The model that `args` describes, fresh, its variants in place: a Transformer, or with head="reward" a RewardModel.
    Raises UserError for a variant, an option or a combination that does not exist, ValueError for an impossible shape."""
    args = dataclasses.replace(args, variants=list(args.variants))                        # a variant may change the context
    chosen = [parse(text) for text in args.variants]
    taken = {}
    for name, _ in chosen:
        for part in REPLACES[VARIANTS[name]]:
            if part in taken:
                raise UserError(f"--variants: {taken[part]} and {name} both replace the {part}; choose one of them")
            taken[part] = name
    model = RewardModel(args) if head == "reward" else Transformer(args)
    body = model.backbone if head == "reward" else model
    drawn = set(body.parameters())
    for name, options in chosen:
        VARIANTS[name](body, **options)
    if not drawn.issuperset(body.parameters()):
        body.init_weights()                                  # the new parts too, each matrix by its role
    return model
