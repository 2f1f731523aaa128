"""What happens in reinforcement learning without the KL leash?

    python -m learn.experiments.reward_hacking             a minute on one core

A reward is a stand-in for what one means. Here we mean "mention the colour red in a good text", and the reward counts the token
" red". A small language model goes on with openings of held-out texts; REINFORCE raises the expected reward minus beta times the KL to
the model it started from (Ziegler et al. 2019, eq. 2):

    r_t = [token t is " red"] - beta * (log pi(t) - log ref(t))        A_t = r_t + r_(t+1) + … - the batch's mean at t

Two judges look on and are not optimised: another language model, trained from another seed, says how likely the text is (nats a
token), and repeated 4-grams are counted. One should see: with beta 0 the reward goes towards its maximum and the text is "red red red …"
(reward hacking: the stand-in is served, the wish is not). With beta the optimum is ref * exp(reward / beta) / Z: a word more costs
likelihood. What the run shows is that the leash holds: a little more reward, and the text stays a text. Whether it reaches that optimum it does
not show (Q196 does, in a toy).
"""
import torch

from learn import lab
from nanollm.generate import generate_batch
from nanollm.metrics import repetition
from nanollm.optim import get_lr, make_optimizer
from nanollm.rl import kl_k1

WORD, BETAS = " red", (0.0, 0.5)
ROLLOUTS, ANSWERS, LENGTH, RATE = 45, 64, 24, 1.5e-3         # the rate falls to 0: with a constant one Adam's steps keep the policy away from ref
OPENING = 8


def log_probs(model, ids):
    """log p of each of the LENGTH tokens after the opening: ids (B, OPENING + LENGTH) -> (B, LENGTH)."""
    logps = model(ids[:, :-1])[:, OPENING - 1 :].log_softmax(-1)
    return logps.gather(-1, ids[:, OPENING:, None]).squeeze(-1)


def write(model, openings, tok, seed):
    """Openings with LENGTH tokens drawn from the model, at temperature 1 from the whole vocabulary: (B, OPENING + LENGTH)."""
    answers, _ = generate_batch(model, openings, LENGTH, tok.pad_id, (), torch.Generator().manual_seed(seed))
    return torch.tensor([o + a for o, a in zip(openings, answers)])


def main(cfg):
    train_ids, val_ids, tok = lab.corpus(512, "en")
    word, = tok.encode(WORD)                                 # one token of this vocabulary
    start, judge = (lab.tiny(tok.vocab_size, seed) for seed in (0, 99))
    for seed, model in ((0, start), (99, judge)):
        lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(450))
        model.eval().requires_grad_(False)
    figures, curves, shown = {}, {}, {}

    def look(name, policy, seed):
        openings = [val_ids[i : i + OPENING].tolist() for i in range(1000, 1000 + 97 * 128, 97)]
        ids = write(policy, openings, tok, seed)
        with torch.no_grad():
            found = {"reward": (ids[:, OPENING:] == word).float().sum(1).mean().item(), "judge's nats a token": -log_probs(judge, ids).mean().item(),
                     "KL": kl_k1(log_probs(policy, ids), log_probs(start, ids)).sum(1).mean().item(),
                     "repeated 4-grams": lab.mean([repetition(row) for row in ids[:, OPENING:].tolist()])}
        for what, value in found.items():
            figures.setdefault(f"{what}, {name}", []).append(value)
        shown.setdefault(name, tok.decode(ids[3].tolist()))

    for seed in range(cfg.seeds):
        look("at the start", start, 10_000 + seed)
    for beta in BETAS:
        name = f"beta {beta:g}"
        for seed in range(cfg.seeds):
            policy = lab.tiny(tok.vocab_size)
            policy.load_state_dict(start.state_dict())
            policy.eval()                                    # no dropout; it is trained all the same
            optimizer = make_optimizer(policy, "adamw", RATE)
            for step in range(steps := cfg.steps(ROLLOUTS)):
                for group in optimizer.param_groups:
                    group["lr"] = get_lr(step, RATE, 0.0, 0, steps)
                at = torch.randint(len(train_ids) - OPENING, (ANSWERS,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
                ids = write(policy, [train_ids[i : i + OPENING].tolist() for i in at], tok, 1_000_003 * seed + step)
                logps = log_probs(policy, ids)                                                        # (B, LENGTH)
                hit = (ids[:, OPENING:] == word).float()
                with torch.no_grad():
                    rewards = hit - beta * kl_k1(logps, log_probs(start, ids))
                    later = rewards.flip(1).cumsum(1).flip(1)                                         # what follows from t on
                    better = (later - later.mean(0)) / (later.std() + 1e-6)
                (-(better * logps).sum() / logps.numel()).backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if not seed:
                    curves.setdefault(name, []).append((hit.sum(1).mean().item(), -log_probs(judge, ids).mean().item()))
            look(name, policy, 10_000 + seed)
    for name, text in shown.items():
        print(f"  {name}: {text!r}")
    free, held = f"beta {BETAS[0]:g}", f"beta {BETAS[1]:g}"
    claims = {"both raise the reward": all(lab.higher(figures[f"reward, {name}"], figures["reward, at the start"]) for name in (free, held)),
              "without the leash the reward is higher": lab.higher(figures[f"reward, {free}"], figures[f"reward, {held}"]),
              "without the leash the judge finds the text less likely":
                  lab.higher(figures[f"judge's nats a token, {free}"], figures[f"judge's nats a token, {held}"]),
              "without the leash the text repeats itself more":
                  lab.higher(figures[f"repeated 4-grams, {free}"], figures[f"repeated 4-grams, {held}"])}

    def draw(plt):
        for i, label in enumerate((f'reward: "{WORD}" in {LENGTH} tokens', "independent judge, nats a token")):
            plt.subplot(1, 2, i + 1)
            for name, points in curves.items():
                plt.plot([p[i] for p in points], label=name)
            plt.xlabel("rollout")
            plt.ylabel(label)
        plt.legend()
        plt.tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
