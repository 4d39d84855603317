"""The grid on small simulations: its cells, what it resumes, what it refuses, its page, the published recipe."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from sae_kernels.experiments import __main__ as experiments
from sae_kernels.experiments import grid, papers, stages, variants
from sae_kernels.experiments.grid import GridConfig, read_cells, run_grid
from sae_kernels.experiments.grid_page import spread
from sae_kernels.nn import TopKSAE

pytest.importorskip("plotly", reason="the grid's page needs plotly")


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_small_batches():
    threads, rows, counted = torch.get_num_threads(), stages.ROWS, stages.COUNTED
    torch.set_num_threads(1)
    stages.ROWS, stages.COUNTED = 128, 8
    yield
    torch.set_num_threads(threads)
    stages.ROWS, stages.COUNTED = rows, counted


def small(folder, **options):
    settings = {
        "model": "multvae", "simulate": (300, 100, 6), "d": 8, "epochs": 3, "steps": 30, "k": (2, 4), "width": (2,),
        "variants": ("topk", "published-l2"), "out": folder and folder / "grid", "quiet": True,
    }  # fmt: skip
    return GridConfig(**{**settings, **options})


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("grid"), seeds=(0, 1))
    return config, run_grid(config)


def test_one_cell_per_combination(ran):
    config, results = ran
    places = [one.place for one in results]
    assert len(set(places)) == 8 and {place[0] for place in places} == {"topk", "published-l2"}
    for one in results:
        assert one.kept == pytest.approx(one.ndcg / one.base_ndcg) and 0 <= one.ndcg <= 1
        assert 0 < one.l0 <= one.k and -1 <= one.cosine <= 1 and 0 <= one.dead_share <= 1
        assert one.fvu > 0 and one.norm_ratio > 0
    assert len({one.base_ndcg for one in results if one.seed == 0}) == 1
    assert {one.base_ndcg for one in results if one.seed == 0} != {one.base_ndcg for one in results if one.seed == 1}
    assert sorted(read_cells(config.out / "cells.csv"), key=lambda one: one.place) == sorted(
        results, key=lambda one: one.place
    )


def test_a_cut_grid_goes_on_and_a_finished_one_can_grow(ran, tmp_path, monkeypatch):
    _, whole = ran
    config, made = small(tmp_path), []
    train = grid.train_variant  # of each k both variants, then the next

    def cut(name, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(name)
        return train(name, *rest)

    monkeypatch.setattr(grid, "train_variant", cut)
    with pytest.raises(KeyboardInterrupt):
        run_grid(config)
    assert len(read_cells(config.out / "cells.csv")) == 2
    made.clear()
    monkeypatch.setattr(stages, "train_recommender", None)  # the one of the cut run is taken
    results = run_grid(config)
    assert made == ["published-l2", "topk"]
    numbers = [replace(one, seconds=0) for one in results]
    assert numbers == [replace(one, seconds=0) for one in whole if one.seed == 0]
    made.clear()
    grown = run_grid(replace(config, k=(4, 3), variants=("topk",)))
    assert [one.k for one in grown] == [4, 3] and made == ["topk"]
    assert len(read_cells(config.out / "cells.csv")) == 5
    with pytest.raises(ValueError, match="holds another grid: steps was 30 and is 31; give another --out"):
        run_grid(replace(config, steps=31))
    (config.out / "cells.csv").write_text("variant,width\ntopk,2\n")
    with pytest.raises(ValueError, match=r"cells.csv, line 2: not a cell of the grid"):
        run_grid(config)


def test_a_refitted_variant_is_the_same_sae_read_otherwise(tmp_path, monkeypatch):
    made, train = [], grid.train_variant
    monkeypatch.setattr(grid, "train_variant", lambda name, *rest: made.append(name) or train(name, *rest))
    results = run_grid(small(tmp_path, variants=("topk-refit", "published-l2", "topk")))
    assert made == ["published-l2", "topk"] * 2
    by = {(one.variant, one.k): one for one in results}
    for k in (2, 4):
        plain, fitted = by["topk", k], by["topk-refit", k]
        assert fitted.fvu < plain.fvu and fitted.dead_share == plain.dead_share == 0 and fitted.l0 <= plain.l0 <= k
    made.clear()
    again = run_grid(small(tmp_path / "again", variants=("topk", "topk-refit"), k=(4,)))
    assert made == ["topk"]
    kept = [(one.variant, one.ndcg, one.fvu) for one in again]
    assert kept == [(name, by[name, 4].ndcg, by[name, 4].fvu) for name in ("topk", "topk-refit")]


def test_the_page(ran):
    config, results = ran
    page = (config.out / "results.html").read_text()
    text = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert "What a sparse autoencoder costs MULTVAE" in text and "The data sets differ" in text
    for line in papers.published("multvae"):
        if line.width == 2:
            assert f"<td class='n'>{line.kept[2]:.3f}</td>" in text
    group = [one.kept for one in results if (one.variant, one.k) == ("topk", 4)]
    assert len(group) == 2 and spread(group, 3) in text
    assert page.count("Plotly.newPlot") >= 2


def test_spread():
    assert spread([0.5], 3) == "0.500" and spread([1.0, 3.0], 2) == "2.00 ± 1.41"


def test_the_published_figures():
    assert [len(papers.published(model)) for model in ("elsa", "multvae", "sasrec")] == [36, 36, 0]
    line = next(p for p in papers.published("multvae") if (p.data, p.d, p.loss, p.width) == ("MSD", 256, "cosine", 8))
    assert line.kept == (0.360, 0.215, 0.207, 0.198)
    kept = [k for model in ("elsa", "multvae") for line in papers.published(model) for k in line.kept]
    assert all(0.1 < k < 1 for k in kept) and len(kept) == 72 * 4


@pytest.mark.parametrize("name", [*variants.OURS, "repaired-cosine"])
def test_every_variant_is_what_it_says(tmp_path, name):
    config = small(tmp_path).filled()
    cell = config.cell(2, 4, 0)
    parts = stages.split(stages.load_data(cell), cell)
    model, ticks = stages.new_recommender(parts, cell).eval(), []
    sae = variants.train_variant(name, model, parts, cell, ticks.append)
    assert sum(ticks) == 30 and not sae.training and (sae.d_sae, sae.k) == (16, 4)
    wanted = {"topk-global": "global", "topk-raw": "none"}.get(name, "standardize")
    assert sae.normalize == wanted and sae.activation == ("abs" if name == "topk-abs" else "relu")
    assert sae.variant == {"batch-topk": "batch_topk", "jumprelu": "jumprelu"}.get(name, "topk")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("name", ["elsa", "multvae", "sasrec"])
def test_an_sae_starts_at_the_mean_of_rows_drawn_as_in_training(tmp_path, name):
    cell = small(tmp_path, model=name, variants=("topk",)).filled().cell(2, 4, 0)
    parts = stages.split(stages.load_data(cell), cell)
    model = stages.new_recommender(parts, cell).eval()
    rows = torch.cat(list(stages.fresh_rows(model, parts, cell, 1, stages.STARTED)))
    sae = stages.new_sae(model, parts, cell, normalize="global")
    torch.testing.assert_close(sae.normalizer.mean, rows.mean(0))
    raw = stages.new_sae(model, parts, cell, normalize="none")
    torch.testing.assert_close(raw.b_dec.detach(), rows.mean(0))
    again = torch.cat(list(stages.fresh_rows(model, parts, cell, 1, 2)))
    other = torch.cat(list(stages.fresh_rows(model, parts, cell, 2, 2)))
    assert torch.equal(rows[: len(again)], again) and not torch.equal(again, other)


def test_the_published_defect_loses_the_scale():
    """Compared with standardised rows, an output that is brought back to a small scale has to grow."""
    generator = torch.Generator().manual_seed(0)
    x = 0.05 * torch.randn(512, 6, generator=generator) @ torch.randn(6, 12, generator=generator)
    config = small(None, steps=400).filled().cell(4, 8, 0)
    ratio = {}
    for space in ("mixed", "standardized"):
        sae = variants.train_published(x, 48, 8, "l2", space, config, lambda steps: None)
        with torch.no_grad():
            ratio[space] = float(sae(x).norm() / x.norm())
    assert ratio["mixed"] > 1.5 and 0.7 < ratio["standardized"] < 1.1


def test_the_published_step_is_its_formula():
    """One step on one batch, against the formula written out with dense codes."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    config = small(None, steps=1).filled().cell(2, 3, 0)
    before = []
    init = TopKSAE.normalize_decoder_

    def watched(sae):
        init(sae)
        if not before:
            before.append({name: value.clone() for name, value in sae.state_dict().items() if "extra" not in name})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TopKSAE, "normalize_decoder_", watched)
        sae = variants.train_published(x, 12, 3, "l2", "mixed", config, lambda steps: None)
    W_enc, W_dec = (nn.Parameter(before[0][name].clone()) for name in ("W_enc", "W_dec"))
    b_enc, b_dec = (nn.Parameter(before[0][name].clone()) for name in ("b_enc", "b_dec"))
    generator = torch.Generator().manual_seed(0)
    TopKSAE(6, 12, 3, tied_init=False, generator=generator)
    nn.init.kaiming_uniform_(torch.empty(12, 6), generator=generator)
    batch = x[torch.randint(32, (32,), generator=generator)]
    mean, std = batch.mean(1, keepdim=True), batch.std(1, keepdim=True, correction=0)
    standard = (batch - mean) / std
    z = ((standard - b_dec) @ W_enc.T + b_enc).relu()
    z = z * (z >= z.topk(3).values[:, -1:])
    loss = (mean + std * (z @ W_dec + b_dec) - standard).square().mean() + 3e-4 * z.abs().sum(1).mean()
    loss.backward()
    # after one step of Adam every weight has moved by lr against the sign of its gradient
    moved = sae.W_enc - W_enc
    clear = W_enc.grad.abs() > 1e-5
    assert bool(clear.any())
    torch.testing.assert_close(moved[clear], -3e-4 * W_enc.grad.sign()[clear], atol=2e-6, rtol=1e-2)
    torch.testing.assert_close(sae.b_dec - b_dec, -3e-4 * b_dec.grad.sign(), atol=2e-6, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("topk", "gated")}, "--variants must be among topk, .*; got gated"),
        ({"variants": ()}, "--variants must name at least one value"),
        ({"k": (2, 2)}, "--k must name at least one value, each once, got 2 2"),
        ({"k": (32,)}, "--k 32 is more than the 16 latents of --width 2"),
        ({"at": 0}, "--at must be at least 1, got 0"),
        ({"model": "sasrec"}, "--variants of a sasrec must be among topk, .*, jumprelu, each also with -refit: others"),
        ({"variants": ("topk-refit-refit",)}, "each also with -refit; got topk-refit-refit"),
        ({"weights": "x.npz"}, "--weights are those of a sasrec, got --model multvae"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
    ],
)
def test_what_does_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_grid(small(tmp_path, **options))
    assert not (tmp_path / "grid").exists()


def test_the_command(tmp_path, capsys, monkeypatch):
    taken = []
    monkeypatch.setattr(grid, "run_grid", lambda config: taken.append(config) or [])
    words = f"grid --model sasrec --variants topk --k 8 16 --width 4 --seeds 0 2 --at 10 --out {tmp_path} --quiet"
    assert experiments.main(words.split()) == 0
    assert (taken[0].k, taken[0].width, taken[0].seeds, taken[0].at) == ((8, 16), (4,), (0, 2), 10)
    monkeypatch.undo()
    assert experiments.main(["grid", "--k", "0", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("experiments grid: --k must be at least 1")
    assert experiments.main(["grid", "--model", "sasrec", "--variants", "topk", "--weights", "no.npz"]) == 2
    assert "no.npz is no .npz file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        experiments.main(["grid", "--model", "gru"])


def test_a_published_sasrec(tmp_path):
    """Weights from a file: all users are known to it, so each one's last item is the target."""
    numpy = pytest.importorskip("numpy", reason="weights are an .npz file")
    cell = small(tmp_path, model="sasrec", variants=("topk",)).filled().cell(2, 2, 0)
    model = stages.new_recommender(stages.split(stages.load_data(cell), cell), cell)
    inverse = {
        "item_embedding": "item_emb", "position_embedding": "pos_emb", "norm": "last_layernorm",
        "attention_norm": "attention_layernorms", "feed_norm": "forward_layernorms",
    }  # fmt: skip
    arrays = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] != "blocks":
            arrays[".".join([inverse[parts[0]], *parts[1:]])] = value.numpy()
            continue
        layer, rest = parts[2], ".".join(parts[3:])
        if layer in inverse:
            arrays[f"{inverse[layer]}.{parts[1]}.{rest}"] = value.numpy()
        elif layer == "attention_in":
            arrays[f"attention_layers.{parts[1]}.in_proj_{rest}"] = value.numpy()
        elif layer == "attention_out":
            arrays[f"attention_layers.{parts[1]}.out_proj.{rest}"] = value.numpy()
        else:
            conv = {"feed_in": "conv1", "feed_out": "conv2"}[layer]
            arrays[f"forward_layers.{parts[1]}.{conv}.{rest}"] = value.numpy()
    path = tmp_path / "weights.npz"
    numpy.savez(path, **arrays)
    config = small(tmp_path, model="sasrec", variants=("topk",), weights=path, k=(4,), d=None, at=10)
    (one,) = run_grid(config)
    assert one.d == 8 and one.base_ndcg > 0 and (config.out / "cells.csv").is_file()
    with pytest.raises(ValueError, match="know 100 items, the data has 90"):
        run_grid(replace(config, simulate=(300, 90, 6), out=tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run_grid(replace(config, data=tmp_path / "nowhere", out=tmp_path / "other"))
    timeless = replace(stages.load_data(cell), order=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "load_data", lambda cell: timeless)
        with pytest.raises(ValueError, match="no time order, which sasrec needs"):
            run_grid(replace(config, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_norm_ratio(tmp_path):
    config = small(tmp_path).filled()
    cell = config.cell(2, 16, 0)
    parts = stages.split(stages.load_data(cell), cell)
    model = stages.new_recommender(parts, cell).eval()
    sae = TopKSAE(8, 16, 16)
    x = model.encode_histories(*parts.test.inputs.bags())
    with torch.no_grad():
        expected = float(sae(x).norm(dim=1).sum() / x.norm(dim=1).sum())
    assert stages.norm_ratio(model, sae, parts.test.inputs) == pytest.approx(expected, rel=1e-5)
    model.encoder.out.weight.data.zero_()
    model.encoder.out.bias.data.zero_()
    assert stages.norm_ratio(model, sae, parts.test.inputs) != stages.norm_ratio(model, sae, parts.test.inputs)  # NaN
