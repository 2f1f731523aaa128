"""What do fewer key and value heads cost, and what do they save?

    python -m learn.experiments.kv_heads                   about a minute on one core

Every query head has its own keys and values (multi-head attention), or several share them (grouped-query, Ainslie et al. 2023), or all
share one (multi-query, Shazeer 2019). The cache of a text holds keys and values only, so it shrinks with their heads; the question is
what the loss pays. Same width, layers and data; what wk and wv lose is not given back elsewhere.
"""
from learn import lab
from nanollm.model import KVCache, parameter_count

HEADS, STEPS = 8, 250
KINDS = {"MHA, 8 heads": 8, "GQA, 2 heads": 2, "MQA, 1 head": 1}


def cache_bytes(model, inputs):
    """Bytes that a real cache holds for each token of `inputs`."""
    cache = KVCache()
    model.eval()(inputs, cache=cache)
    return sum(t.nbytes for pair in cache.kv.values() for t in pair) / inputs.numel()


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, cache = {}, {}
    for name, n_kv_heads in KINDS.items():
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed, n_heads=HEADS, n_kv_heads=n_kv_heads)
            lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS))
            figures.setdefault(f"{name}, loss", []).append(lab.val_loss(model, val_ids))
        figures[f"{name}, bytes a token"] = cache[name] = cache_bytes(model, val_ids[:64][None])
        figures[f"{name}, parameters"] = parameter_count(model)["total"]
    loss = {name: figures[f"{name}, loss"] for name in KINDS}
    claims = {"the cache shrinks with the heads, 8 to 2 to 1": [cache[name] / cache["MQA, 1 head"] for name in KINDS] == [8.0, 2.0, 1.0],
              "MQA ends above MHA": lab.higher(loss["MQA, 1 head"], loss["MHA, 8 heads"]),
              "GQA ends above MHA": lab.higher(loss["GQA, 2 heads"], loss["MHA, 8 heads"])}

    def draw(plt):
        for name in KINDS:
            plt.errorbar(cache[name], lab.mean(loss[name]), yerr=lab.spread(loss[name]), fmt="o", capsize=3, label=name)
        plt.xscale("log", base=2)
        plt.xticks(list(cache.values()), [f"{b:.0f}" for b in cache.values()])
        plt.xlabel("bytes of the cache, a token")
        plt.ylabel("validation loss, nats")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
