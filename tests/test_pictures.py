"""The pictures of the course show what they say they show; those of the demo run are asked for the sentence that names it."""
import matplotlib
import pytest
import torch

from learn import lab, pictures
from nanollm.config import UserError
from nanollm.corpus import minhash
from nanollm.optim import get_lr
from nanollm.plan import on_meta, parameter_count

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_drawn_schedules_are_get_lr():
    pictures.schedules(plt, steps=100, warmup=10)
    drawn = {line.get_label(): line.get_ydata() for line in plt.gca().lines}
    for name in ("cosine", "wsd", "linear", "constant"):
        assert list(drawn[name]) == [get_lr(step, 1e-3, 1e-4, 10, 100, name) for step in range(1, 101)]
    assert drawn["cosine, --decay_factor 1.25"][-1] > drawn["cosine"][-1] == 1e-4


def test_the_counted_share_of_candidates_lies_on_the_s_curve():
    """Within four standard errors, at 27 points."""
    found = pictures.lsh(plt, pairs=100, n=100)
    assert len(found) == 27
    for (bands, rows, similarity), share in found.items():
        p = minhash.candidate_probability(similarity, bands, rows)
        assert abs(share - p) <= 4 * (p * (1 - p) / 100) ** 0.5 + 0.01, (bands, rows, similarity)


def test_a_rotated_dot_product_knows_the_distance_and_not_the_place():
    scores = pictures.rope(plt)
    torch.testing.assert_close(scores[0], scores[100], atol=1e-4, rtol=0)
    assert abs(float(scores[0][0]) - 1) < 1e-5 and scores[0][1:].max() < 1


def test_a_larger_vocabulary_cuts_a_sentence_into_fewer_tokens():
    text = "Tina lives near the library."
    cut = pictures.tokens(plt, sizes=(320, 512), text=text)
    assert len(cut[512]) < len(cut[320]) < len(text)
    assert all(lab.tokenizer(size).decode(ids) == text for size, ids in cut.items())


def test_packed_documents_see_themselves_and_their_past_only():
    segments, mask = pictures.packing(plt, T=96, rows=3)
    row, t = segments[0], torch.arange(96)
    assert len(row.unique()) > 2
    assert torch.equal(mask, (row[:, None] == row) & (t[:, None] >= t) & (row[:, None] > 0))


def test_the_green_tokens_of_a_chat_are_the_answers_and_their_ends():
    ids, mask = pictures.chat_mask(plt)
    tok = lab.tokenizer(1024)
    green = [i for i, learnt in zip(ids, mask) if learnt]
    assert tok.decode(green) == "The opposite of new is old.The opposite of hot is cold."
    assert green.count(tok.im_end_id) == 2 and tok.im_start_id not in green


def test_nf4_errs_less_than_int4_on_normal_weights():
    error = pictures.nf4(plt, n=2**13)
    assert 0 < error["NF4"] < 0.8 * error["int4"]


def test_most_gradients_of_a_large_update_vanish_in_fp16_unless_the_loss_is_scaled():
    lost = pictures.fp16_range(plt, steps=2)
    assert lost[1] > 0.9 and lost[2**16] < 0.01


def test_the_bytes_of_zero_are_sixteenths_of_a_parameter_cut_by_the_gpus():
    found = pictures.zero(plt, gpus=8)
    n = parameter_count(on_meta(pictures.SHAPES["7 B"][0]))["total"]
    kept = {name: m["weights"] + m["gradients"] + m["optimizer"] for name, m in found.items()}
    assert kept == {"DDP": 16 * n, "ZeRO-1": 9 * n, "ZeRO-2": pytest.approx(5.5 * n), "ZeRO-3 = FSDP": 2 * n}


def test_checkpointing_saves_activations_and_nothing_else():
    found = pictures.memory(plt)
    for name, (args, rows) in pictures.SHAPES.items():
        kept, again = found[f"{name}, {rows} x {args.max_seq_len}"], found[f"{name}, checkpointing"]
        assert again.pop("activations") < kept.pop("activations") and again.pop("total") < kept.pop("total") and again == kept


@torch.no_grad()
def test_attention_maps_are_the_models_own():
    """Rows add up to 1, nobody looks ahead, and the maps applied to the values give what the layer gives, with grouped keys, too."""
    model = lab.tiny(vocab_size=64, n_kv_heads=2).eval()
    ids = list(range(3, 20))
    maps, x = pictures.attention_maps(model, ids), model.tok_embeddings(torch.tensor([ids]))
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert not maps.triu(1).any()
    layer, T = model.layers[0], len(ids)
    v = layer.attention.qkv(layer.attention_norm(x))[2].repeat_interleave(2, dim=1)           # (1, H, T, D)
    mine = layer.attention.wo((maps[0] @ v[0]).transpose(0, 1).reshape(1, T, -1))
    torch.testing.assert_close(mine, layer.attention(layer.attention_norm(x), model.rope_cos[:T], model.rope_sin[:T], None))


def test_without_the_demo_run_the_other_pictures_are_drawn_and_a_sentence_says_what_is_missing(tmp_path):
    cfg = pictures.Config(["nf4", "margins", "kl_reward"], str(tmp_path / "no_demo"), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"not drawn: margins kl_reward\. .*bash runs/speedrun\.sh"):
        pictures.main(cfg)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["nf4.png"]
    with pytest.raises(UserError, match="there is no picture roap; there are road"):
        pictures.main(pictures.Config(["roap"]))


def test_every_picture_of_the_course_is_small_and_stands_on_a_page():
    """Committed, at most 60 KB each, used in both languages; and no page shows one that the command does not make."""
    folder = lab.ROOT / "docs" / "images" / "course"
    assert {path.stem for path in folder.glob("*.png")} == set(pictures.PICTURES)
    assert all(path.stat().st_size < 61_000 for path in folder.glob("*.png"))
    for pages in ("docs/course", "docs/zh/course"):
        text = "".join(path.read_text(encoding="utf-8") for path in (lab.ROOT / pages).glob("*.md"))
        assert all(f"images/course/{name}.png" in text for name in pictures.PICTURES), pages
