"""Small demonstrations behind answers of docs/questions/08_sft.toml and 09_reward.toml that no other test gives: each is named
after its claim, takes a fraction of a second and fails if the claim were false."""
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import pairs, tiny_lm
from nanollm.data import ChatRows, PreferenceRows, fit_chat
from nanollm.generate import generate_batch
from nanollm.losses import IGNORE_INDEX, cross_entropy, divergence_loss, reward_loss
from nanollm.model import ModelArgs, RewardModel, Transformer, parameter_count
from nanollm.optim import make_optimizer
from nanollm.tokenizer import render


def chat(*texts):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts)]


def fit(model, batches, learning_rate):
    """One update a batch (inputs, targets) at a constant rate."""
    optimizer = make_optimizer(model, "adamw", learning_rate)
    for inputs, targets in batches:
        loss, count, _ = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()


# ---- SFT -------------------------------------------------------------------------------------------------------------

def printed_row(prompt, answer, pad, prompt_max, answer_max, max_length):
    """The row builder that the notes print (001:1511-1531), on ids: input and labels, which the model shifts later."""
    prompt = prompt[:prompt_max]
    answer = answer if len(answer) <= answer_max else prompt[:prompt_max]
    ids, labels = prompt + answer, [pad] * len(prompt) + answer
    fill = [pad] * (max_length - len(ids))
    return ids + fill, [IGNORE_INDEX if label == pad else label for label in labels + fill]


def test_the_printed_row_builder_teaches_the_question_and_loses_header_end_and_length(tok):
    """Q187: five faults of the listing, each beside what fit_chat makes of the same chat."""
    def parts(question, answer):
        return render(tok, chat(question), True)[0], [*tok.encode(answer), tok.end_id]
    header = render(tok, chat("x"), True)[0][-4:]            # what stands before every answer
    # 1. a long answer is replaced by the prompt: the model is taught to repeat the question
    prompt, answer = parts("Who?", "so " * 60)
    _, labels = printed_row(prompt, answer, tok.pad_id, 40, 40, 100)
    assert [t for t in labels if t != IGNORE_INDEX] == prompt
    ids, mask = fit_chat(tok, chat("Who?", "so " * 60), 60)
    assert [i for i, m in zip(ids, mask) if m] == answer[: sum(mask)]
    # 2. a long prompt loses its end, the assistant's header
    prompt, answer = parts("why " * 60, "So.")
    ids, _ = printed_row(prompt, answer, tok.pad_id, 40, 40, 100)
    assert ids[36:40] != header and ids[40 : 40 + len(answer)] == answer
    ids, mask = fit_chat(tok, chat("why " * 60, "So."), 60)
    assert ids[mask.index(1) - 4 : mask.index(1)] == header
    # 3. where the pad id is the end id, the end carries no label
    prompt, answer = parts("Who?", "Me.")
    _, labels = printed_row(prompt, answer, tok.end_id, 40, 40, 100)
    assert tok.end_id not in labels and labels[len(prompt) : len(prompt) + len(answer) - 1] == answer[:-1]
    # 4. a label whose value is the pad id is wiped out, wherever it stands
    _, labels = printed_row(prompt, answer, answer[0], 40, 40, 100)
    assert labels[len(prompt)] == IGNORE_INDEX and labels[len(prompt) + 1] == answer[1]
    # 5. prompt and answer that each fit may be too long together: padding by a negative number does nothing
    prompt, answer = parts("why " * 20, "so " * 20)
    ids, _ = printed_row(prompt, answer, tok.pad_id, 100, 100, 50)
    assert len(ids) > 50 >= len(fit_chat(tok, chat("why " * 20, "so " * 20), 50)[0])


@pytest.mark.parametrize("n", [2, 4, 8])
def test_splitting_n_turns_into_n_samples_costs_n_plus_1_halves_of_the_tokens(tok, n):
    """Q188: sample k repeats the turns before it. Turns of equal length: 1 + 2 + … + n over n, exactly."""
    turns = chat(*["same words"] * (2 * n))
    whole = len(render(tok, turns)[0])
    assert sum(len(render(tok, turns[: 2 * k])[0]) for k in range(1, n + 1)) / whole == (n + 1) / 2


def test_blocks_with_an_end_each_put_ends_into_the_middle_of_texts(tok):
    """Q190: the notes' cut, an <|endoftext|> behind every 63 tokens whatever stands there. Five texts end five times; here almost every end
    stands inside one of them, and four of the five real ends get none."""
    texts = [[*tok.encode(f"one text, number {i}. " * 20)] for i in range(5)]
    stream = sum(texts, [])
    real = {sum(map(len, texts[: i + 1])) for i in range(5)}                               # an end belongs in front of these tokens
    placed = set(range(63, len(stream) + 1, 63))
    assert len(placed) > 10 and len(placed & real) <= 1
    assert len(stream) % 63                                  # the rest is deleted: text is lost, too


def test_shifting_twice_trains_the_token_after_next():
    """Q191: a model that knows the next token for certain has loss 0 with one shift, and is wrong throughout with two."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
    logits = 50.0 * F.one_hot(ids.roll(-1, 1), 10)           # at t: token t + 1
    once = cross_entropy(logits[:, :-1], ids[:, 1:])
    twice = cross_entropy(logits[:, :-2], ids[:, 2:])
    assert (once[0] / once[1]).item() < 1e-6 and (twice[0] / twice[1]).item() > 40


def test_sft_gives_answers_the_manners_of_its_rows(tok):
    """Q192: forty updates on chats that begin politely, and answers to questions that were not among them begin politely."""
    rows = ChatRows([(str(i), {"prompt": f"{i}?", "answer": f"Of course! It is {i}."}) for i in range(40)], tok, 64, pack_rows=False)
    asked, manners = [render(tok, chat(f"{i}{i}?"), True)[0] for i in range(5)], tok.encode("Of course!")
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=tok.vocab_size, max_seq_len=64))

    def polite():
        return sum(a[: len(manners)] == manners for a in generate_batch(model, asked, len(manners), tok.pad_id, tok.stop_ids, temperature=0)[0])
    before = polite()
    fit(model, (rows.batch(range(i % 5 * 8, i % 5 * 8 + 8))[:2] for i in range(40)), 1e-2)
    assert (before, polite()) == (0, 5)


def test_a_higher_rate_forgets_more_of_what_was_learnt_before():
    """Q193: two languages, each a cycle through the same 20 tokens. Learnt the first; then equally many updates on the second at three
    rates: what is lost of the first grows with the rate."""
    def batch(step, seed):
        at = torch.randint(20, (16, 1), generator=torch.Generator().manual_seed(seed))
        window = (at + step * torch.arange(17)) % 20
        return window[:, :-1], window[:, 1:]
    torch.manual_seed(0)
    first = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=20, max_seq_len=16))
    fit(first, (batch(1, i) for i in range(60)), 1e-2)
    lost = []
    for rate in (1e-4, 1e-3, 1e-2):
        model = Transformer(first.args)
        model.load_state_dict(first.state_dict())
        fit(model, (batch(7, i) for i in range(20)), rate)
        with torch.no_grad():
            inputs, targets = batch(1, 999)
            lost.append(cross_entropy(model(inputs), targets)[0].item() - cross_entropy(first(inputs), targets)[0].item())
    assert 0 < lost[0] < lost[1] < lost[2]


# ---- reward model and reinforcement learning -------------------------------------------------------------------------

def test_what_a_critic_expects_depends_on_the_answer_so_far():
    """Q194: the state is the prompt and what was written of the answer, not the prompt alone: same prompt, other answers, other values."""
    torch.manual_seed(0)
    critic = RewardModel(tiny_lm().args).eval()
    torch.nn.init.normal_(critic.v_head.weight)
    prompt = [5, 9, 2]
    with torch.no_grad():
        values = critic(torch.tensor([prompt + [7, 8, 11], prompt + [12, 8, 11]]))
    assert torch.equal(values[0, :3], values[1, :3]) and (values[0, 3:] != values[1, 3:]).all()


def test_q_learning_finds_the_discounted_future_reward():
    """Q195: four states in a row, left or right, reward 1 on reaching the last. Q(s, a) is moved towards r + gamma max over all actions of
    Q(s', .), and ends at gamma^k with k steps still to go after this one."""
    gamma, Q, g = 0.9, torch.zeros(4, 2), torch.Generator().manual_seed(0)
    for _ in range(150):
        s = 0
        while s < 3:
            a = torch.randint(2, (), generator=g).item()     # explore; off-policy: what is learnt is the best policy, not this one
            after = max(0, s + 2 * a - 1)
            r = float(after == 3)
            Q[s, a] += 0.5 * (r + gamma * Q[after].max() * (after < 3) - Q[s, a])
            s = after
    torch.testing.assert_close(Q[:3, 1], torch.tensor([gamma**2, gamma, 1.0]), atol=1e-3, rtol=0)
    assert (Q[:3].argmax(1) == 1).all()


def test_scores_before_the_first_difference_get_no_gradient():
    """Q203: the notes' loss reads [divergence, end), ours only each answer's last token; what both answers share is in neither."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 7, 8]])
    lengths = torch.tensor([5, 6])
    for loss_of, places in ((lambda r: divergence_loss(r, ids, lengths), {3, 4, 5}), (lambda r: reward_loss(r, lengths), {4, 5})):
        rewards = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss_of(rewards)[0].backward()
        assert set(rewards.grad.nonzero()[:, 1].tolist()) == places


def test_the_reward_loss_reaches_head_and_body_and_leaves_the_language_model_alone(tok):
    """Q206, Q208: body and head both get a gradient; the language model that lent its weights stays as it was, and the reward model has no
    matrix with which it could write a token."""
    lm = tiny_lm()
    before = {name: p.clone() for name, p in lm.named_parameters()}
    model = RewardModel(lm.args)
    model.backbone.load_state_dict({k: v for k, v in lm.state_dict().items() if k != "output.weight"})
    rows = PreferenceRows([(str(i), row) for i, row in enumerate(pairs(8))], tok, 64)
    ids, lengths, *_ = rows.scored_batch(range(8))
    loss, count, _ = reward_loss(model(ids), lengths)
    assert (loss / count).item() == pytest.approx(math.log(2), abs=0.5)                     # near ignorance at the start
    loss.backward()
    assert model.v_head.weight.grad.norm() > 0 and all(p.grad.norm() > 0 for p in model.backbone.layers.parameters())
    make_optimizer(model, "adamw", 1e-2).step()
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
    assert not torch.equal(model.backbone.tok_embeddings.weight, before["tok_embeddings.weight"]) and model.backbone.output is None


def test_the_notes_reward_model_has_143_million_parameters():
    """Q209: 24 blocks of width 512, feed-forward 2,752, 32,008 ids and a head of 512 numbers without bias."""
    with torch.device("meta"):
        model = RewardModel(ModelArgs(dim=512, n_layers=24, n_heads=8, vocab_size=32008, hidden_dim=2752))
    assert model.v_head.weight.shape == (1, 512) and model.v_head.bias is None
    assert parameter_count(model)["total"] == 32008 * 512 + 24 * (4 * 512**2 + 3 * 512 * 2752 + 2 * 512) + 512 + 512 == 143_029_248


def test_one_label_in_five_wrong_holds_the_margin_at_ln_4():
    """Q212: with labels that are always right the best margin is infinite, with a fifth of them flipped it is ln(0.8 / 0.2); and where most
    raters prefer the wrong answer, the wrong answer wins: nothing in the loss knows what is true."""
    for flipped, best in ((0.2, math.log(4)), (0.6, -math.log(1.5))):
        margin = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.SGD([margin], lr=2.0)
        for _ in range(60):
            score = torch.stack([margin, torch.zeros(())])[:, None]                         # the right answer's score and the other's
            loss = (1 - flipped) * reward_loss(score, torch.tensor([1, 1]))[0] + flipped * reward_loss(score.flip(0), torch.tensor([1, 1]))[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert margin.item() == pytest.approx(best, abs=1e-3)


def test_a_constant_no_scores_0_on_primes_and_100_on_composites():
    """Q213: a test set of primes alone cannot tell a model that checks from one that always says yes or always says no."""
    prime = [all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(1000, 2000)]
    def accuracy(says, only):
        asked = [p for p in prime if p == only]
        return sum(says == p for p in asked) / len(asked)
    assert [accuracy(False, True), accuracy(False, False), accuracy(True, True), accuracy(True, False)] == [0, 1, 1, 0]
    both = sum(not p for p in prime) / len(prime)
    assert both == 0.865                                     # on all numbers "no" alone is right in 865 of 1,000
