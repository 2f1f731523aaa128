"""The likeliest text, or a text as likely as real ones? Greedy, beam search and sampling from one model.

    python -m learn.experiments.beam_or_sampling           a minute and a half on one core

Beam search looks for the whole continuation with the highest log p, greedy takes the likeliest token each time, sampling draws from the
model's distribution. Real text is not the likeliest text: its mean -log p per token is the entropy of the language, well above that of
its mode (Holtzman et al. 2020, figure 2). So what is likeliest is also blander: the same few phrases, again and again. Each method
continues the same openings of unseen documents; the model judges all of them and the real continuation, too.
"""
import torch

from learn import lab
from nanollm.beam import beam_search
from nanollm.evaluation import continuation_losses
from nanollm.generate import generate
from nanollm.metrics import distinct, repetition

STEPS, OPENING, LENGTH, PROMPTS, BEAMS = 500, 16, 46, 24, 4


def main(cfg):
    train_ids, _, tok = lab.corpus(512, "en")
    documents = [[tok.eos_id] + tok.encode(text) for text in lab.texts(300, 1, "en")]
    documents = [ids for ids in documents if len(ids) >= OPENING + LENGTH][:PROMPTS]
    openings = [ids[:OPENING] for ids in documents]
    figures = {}
    for seed in range(cfg.seeds):
        model = lab.tiny(tok.vocab_size, seed)
        lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS), 8e-3)
        model.eval()
        chance = torch.Generator().manual_seed(seed)
        ways = {"real text": lambda i: documents[i][OPENING : OPENING + LENGTH],
                "sampling": lambda i: list(generate(model, openings[i], LENGTH, generator=chance)),
                "greedy": lambda i: list(generate(model, openings[i], LENGTH, temperature=0)),
                "beam": lambda i: beam_search(model, openings[i], LENGTH, BEAMS)[0][0]}
        for way, write in ways.items():
            texts = [write(i) for i in range(len(openings))]
            losses = torch.cat(continuation_losses(model, list(zip(openings, texts))))
            figures.setdefault(way, []).append(losses.mean().item())
            figures.setdefault(f"{way} distinct", []).append(distinct(texts, 4))
            figures.setdefault(f"{way} repeated", []).append(lab.mean([repetition(text) for text in texts]))
            if seed == 0:
                print(f"  {way:<9}  …{tok.decode(texts[0])!r}")
    claims = {"beam search finds likelier texts than greedy": lab.higher([a - b for a, b in zip(figures["greedy"], figures["beam"])], [0.0]),
              "greedy is likelier than real text": lab.higher(figures["real text"], figures["greedy"]),
              "sampling has more different 4-grams than beam search": lab.higher(figures["sampling distinct"], figures["beam distinct"])}

    def draw(plt):
        for i, (what, label) in enumerate((("", "-log p a token, nats"), (" distinct", "different 4-grams, share of all"))):
            plt.subplot(1, 2, i + 1)
            lab.bars(plt, {way: figures[way + what] for way in ways}, label)
        plt.tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
