"""The concept map, its lens, its bootstrap and tag tables, against dense fp64 and scipy-free definitions."""

import math
from dataclasses import replace

import pytest
import torch

from sae_kernels import TopKSAE, interpret
from sae_kernels.data import Concepts
from sae_kernels.recommenders import ELSA

D = 11


def case(rows=80, k=3, concepts=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 5, (rows, k), generator=g).float() / 4
    indices = torch.rand(rows, D, generator=g).argsort(1)[:, :k].to(torch.int32)
    labels = torch.rand(rows, concepts, generator=g) < torch.linspace(0.15, 0.7, concepts)
    return values, indices, labels


def dense(values, indices, d=D):
    return torch.zeros(len(values), d, dtype=torch.float64).scatter_add_(1, indices.long(), values.double())


def pair_auc(z, y):
    a, b = z[y].unsqueeze(1), z[~y].unsqueeze(0)
    return float(((a > b).double() + (a == b).double() / 2).mean())


def pearson(z, y):
    a, b = z - z.mean(), y.double() - y.double().mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def test_chi_squared_is_the_sum_over_the_four_cells():
    values, indices, labels = case()
    labels[:, 3] = True
    values[indices == 5] = 0
    got, fires = interpret.concept_scores(values, indices, D, labels).chi_squared, dense(values, indices) != 0
    for c in range(3):
        for f in range(D):
            total = 0.0
            for a in (fires[:, f], ~fires[:, f]):
                for b in (labels[:, c], ~labels[:, c]):
                    expected = a.sum().double() * b.sum() / len(labels)
                    total += float(((a & b).sum() - expected).square() / expected) if expected else 0.0
            assert got[c, f] == pytest.approx(total, rel=1e-12, abs=1e-12)
    assert (got[:3, 5] == 0).all() and got[3].isnan().all()


def test_logit_lens_against_all_scores():
    g = torch.Generator().manual_seed(1)
    W, E = torch.randn(9, 5, generator=g), torch.randn(40, 5, generator=g)
    labels = torch.rand(40, 3, generator=g) < 0.3
    labels[:, 2] = False
    W[4] = 0
    effect = W.double() @ E.double().T
    lens = interpret.logit_lens(W, E, labels)
    for c in range(2):
        lift = effect[:, labels[:, c]].mean(1) - effect.mean(1)
        expected = lift / effect.std(1, correction=0)
        torch.testing.assert_close(lens[c], expected.nan_to_num(0), rtol=1e-10, atol=1e-12)
    assert lens[2].isnan().all() and lens[0, 4] == 0
    amounts, which = interpret.lens_items(W, E, 6)
    torch.testing.assert_close(amounts.double(), effect.sort(1, descending=True).values[:, :6], rtol=1e-5, atol=1e-6)
    assert which[4].tolist() == list(range(6))  # all equal: the lower item first
    with pytest.raises(ValueError, match=r"W_dec \(9, 5\) and items \(40, 4\) must end in one d"):
        interpret.logit_lens(W, E[:, :4], labels)
    with pytest.raises(ValueError, match=r"labels \(39, 3\) must have a row per item of items \(40, 5\)"):
        interpret.logit_lens(W, E, labels[1:])
    with pytest.raises(ValueError, match="n must be between 1 and 40, got 41"):
        interpret.lens_items(W, E, 41)


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_is_that_of_repeated_rows(grouped):
    """Every resample scored by writing its rows out as often as they were drawn."""
    values, indices, labels = case(40, seed=3)
    groups = torch.arange(40) // 3 if grouped else None
    pairs, resamples = [(0, 2), (1, 7), (2, 2)], 60
    got = interpret.bootstrap_intervals(
        values, indices, labels, pairs, resamples=resamples, level=0.8, groups=groups, seed=5
    )
    units = 14 if grouped else 40
    drawn = torch.randint(units, (resamples, units), generator=torch.Generator().manual_seed(5))
    z = dense(values, indices)
    for n, (c, f) in enumerate(pairs):
        found = []
        for draw in drawn:
            rows = torch.cat([(groups == u).nonzero().squeeze(1) for u in draw]) if grouped else draw
            y = labels[rows, c]
            if y.any() and not y.all():
                found.append((pair_auc(z[rows, f], y), pearson(z[rows, f], y)))
        ends = (
            torch.tensor(found, dtype=torch.float64)
            .nan_to_num(0)
            .quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=0)
        )
        mine = [got.auc_low[n], got.correlation_low[n], got.auc_high[n], got.correlation_high[n]]
        torch.testing.assert_close(torch.stack(mine), ends.reshape(-1), rtol=0, atol=1e-10)


def test_bootstrap_options():
    values, indices, labels = case(60)
    narrow, wide = (
        interpret.bootstrap_intervals(values, indices, labels, [(1, 2)], level=level) for level in (0.5, 0.99)
    )
    assert wide.auc_low < narrow.auc_low < narrow.auc_high < wide.auc_high
    again = interpret.bootstrap_intervals(values, indices, labels, [(1, 2)], level=0.5)
    other = interpret.bootstrap_intervals(values, indices, labels, [(1, 2)], level=0.5, seed=1)
    assert again.auc_low == narrow.auc_low != other.auc_low
    labels[:, 0] = False
    assert interpret.bootstrap_intervals(values, indices, labels, [(0, 2)]).auc_low.isnan().all()
    assert interpret.bootstrap_intervals(values, indices, labels, []).auc_low.shape == (0,)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 1"):
        interpret.bootstrap_intervals(values, indices, labels, [(1, 2)], level=1)
    with pytest.raises(ValueError, match="groups must have one entry per row, 60, got"):
        interpret.bootstrap_intervals(values, indices, labels, [(1, 2)], groups=torch.zeros(3))


def planted(n_items=240, d=12, seed=0):
    """Items of four kinds about four directions; a SAE whose latents 0 to 3 are these, the rest noise."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 5, (n_items,), generator=g)
    axes = torch.nn.functional.normalize(torch.randn(5, d, generator=g), dim=1)
    x = axes[kinds] + 0.25 * torch.randn(n_items, d, generator=g)
    labels = kinds.unsqueeze(1) == torch.arange(4)
    labels = torch.cat([labels, torch.zeros(n_items, 1, dtype=torch.bool), torch.ones(n_items, 1, dtype=torch.bool)], 1)
    sae = TopKSAE(d, 24, 3, generator=g).eval()
    with torch.no_grad():
        sae.W_dec[:4] = sae.W_enc[:4] = axes[:4]
    return x, sae, Concepts(["art", "birds", "cars", "dance", "empty", "every"], labels)


def test_concept_map_agrees_with_its_parts():
    x, sae, concepts = planted()
    found = interpret.concept_map(x, sae, concepts, head=x, resamples=50)
    assert found.names == ["art", "birds", "cars", "dance"]
    assert found.left_out == {"empty": "0 of 240 rows have it, min_support is 5", "every": "all 240 rows have it"}
    code = sae.encode(x)
    labels = concepts.labels[:, :4]
    scores = interpret.concept_scores(code.values.detach(), code.indices, 24, labels)
    assert torch.equal(found.scores.auc, scores.auc) and found.stats.rows == 240
    for orientation in ("characterises", "unique"):
        expected = interpret.concept_tfidf(code.values.detach(), code.indices, 24, labels, orientation)
        assert torch.equal(getattr(found, orientation), expected)
    assert torch.equal(found.lens, interpret.logit_lens(sae.W_dec, x, labels))
    for by in ("auc", "correlation", "f1", "chi_squared"):
        assert [latent for latent, _ in found.best(by).values()] == [0, 1, 2, 3]
    for by in ("characterises", "lens", "auc", "recall"):
        assert [found.latents(name, 1, by) for name in found.names] == [[0], [1], [2], [3]]
    assert len(found.latents("art", 24)) == int((found.scores.together[0] >= 5).sum()) < 24
    assert len(found.latents("art", 24, "lens")) == 24
    latents, worth = found.weights("art", 24)
    assert latents == [f for f in found.latents("art", 24, "lens") if found.lens[0, f] > 0]
    assert worth == found.lens[0, latents].tolist() and 0 < len(latents) < 24
    assert found.weights("art", 2, "f1")[1] == found.scores.f1[0, found.latents("art", 2, "f1")].tolist()
    found.lens[0] = -1
    with pytest.raises(ValueError, match="no latent stands for 'art' by lens"):
        found.weights("art")


def test_concept_map_baselines_and_table():
    x, sae, concepts = planted()
    found = interpret.concept_map(x, sae, concepts, resamples=80)
    labels = concepts.labels
    auc, correlation = found.baselines("auc"), found.baselines("correlation")
    for c in range(4):
        raw = [pair_auc(x[:, j].double(), labels[:, c]) for j in range(12)]
        assert auc["raw"][c] == pytest.approx(max(max(raw), 1 - min(raw)), abs=1e-12)
        most = max(abs(pearson(x[:, j].double(), labels[:, c])) for j in range(12))
        assert correlation["raw"][c] == pytest.approx(most, abs=1e-9)
    blank = interpret.untrained(sae)
    assert not torch.equal(blank.W_enc, sae.W_enc) and torch.equal(blank.W_enc, interpret.untrained(sae).W_enc)
    assert not torch.equal(blank.W_enc, interpret.untrained(sae, 1).W_enc)
    sae.refit = 3
    assert blank.refit == 0 and interpret.untrained(sae).refit == 3
    sae.refit = 0
    summary = found.summary()
    assert summary["mean_auc"] == pytest.approx(float(auc["sae"].mean()))
    gain = (float(auc["sae"].mean()) - 0.5) / (float(auc["raw"].mean()) - 0.5)
    assert summary["auc_gain_over_raw"] == pytest.approx(gain) and gain > 1
    above = (correlation["sae"] > correlation["random"]).double().mean()
    assert summary["correlation_above_random"] == above > 0.5
    assert summary["left_out"] == 2 and summary["concepts"] == 4
    for row in found.table():
        assert row["auc_low"] < row["auc"] < row["auc_high"] and row["auc"] > row["auc_raw"]
        assert row["correlation_low"] < row["correlation"] < row["correlation_high"]
        assert row["auc_latent"] == row["characterises_latent"] == row["f1_latent"] and "lens_latent" not in row
        for by in ("precision", "recall", "f1", "chi_squared"):
            assert row[by] == found.best(by)[row["concept"]][1] and f"{by}_raw" not in row
    blank_codes = blank.encode(x)
    scores = interpret.concept_scores(blank_codes.values.detach(), blank_codes.indices, 24, labels[:, :4])
    enough = scores.f1.masked_fill(scores.together < 5, 0).amax(1)
    assert [row["f1_random"] for row in found.table()] == enough.tolist()
    assert found.describe().startswith("4 concepts x 24 latents on 240 rows; ")
    assert found.describe().splitlines()[1:] == [f"left out {n!r}: {why}" for n, why in found.left_out.items()]


def test_concept_map_without_the_options():
    x, sae, concepts = planted()
    found = interpret.concept_map(x, sae, concepts, baselines=False, resamples=0, min_support=30, examples=2)
    assert found.raw is None and found.random is None and found.lens is None
    assert list(found.baselines("auc")) == ["sae"] and math.isnan(found.summary()["auc_gain_over_raw"])
    assert found.auc_interval.isnan().all() and found.table()[0]["auc_low"] is None
    assert found.stats.top_ids.shape == (24, 2)
    few = interpret.concept_map(x, sae, concepts, baselines=False, resamples=0, min_support=45)
    assert set(found.names) > set(few.names)
    with pytest.raises(ValueError, match="by='lens' needs the item embeddings"):
        found.latents("art", by="lens")


def test_positions_are_rows_of_their_items():
    x, sae, concepts = planted()
    items = torch.arange(240).repeat_interleave(3)
    found = interpret.concept_map(x[items], sae, concepts, items=items, resamples=20)
    single = interpret.concept_map(x, sae, concepts, resamples=20)
    torch.testing.assert_close(found.scores.auc, single.scores.auc, rtol=0, atol=1e-12)
    # items are drawn, not rows: three copies of everything make nobody surer
    torch.testing.assert_close(found.auc_interval, single.auc_interval, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(240, 5)}, ValueError, r"x \(240, 5\) must end in the SAE's d_in = 12"),
        ({"x": torch.zeros(200, 12)}, ValueError, "x has 200 rows and the concepts 240 items; give items"),
        (
            {"items": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"items must be int64, one per row of x \(240, 12\)",
        ),
        ({"items": torch.full((240,), 240)}, ValueError, r"items must be in \[0, 240\), got 240 to 240"),
        ({"min_support": 241}, ValueError, "no concept of 6 has 241 of the 240 rows"),
        ({"concepts": torch.zeros(240, 2)}, TypeError, "concepts must be Concepts, got Tensor"),
        ({"x": torch.full((240, 12), torch.nan)}, ValueError, "hold NaN"),
    ],
)
def test_bad_concept_maps(change, error, match):
    x, sae, concepts = planted()
    with pytest.raises(error, match=match):
        interpret.concept_map(**{"x": x, "sae": sae, "concepts": concepts, "resamples": 0, **change})


def test_unknown_concepts_list_the_nearest():
    found = interpret.concept_map(*planted()[:2], planted()[2], resamples=0, baselines=False)
    with pytest.raises(ValueError, match="unknown concept 'bird'; the nearest are 'birds'"):
        found.latents("bird")
    with pytest.raises(ValueError, match="concept 'empty' was left out: 0 of 240 rows"):
        found.latents("empty")
    with pytest.raises(ValueError, match="by must be one of characterises, unique, lens, auc"):
        found.latents("art", by="chance")
    with pytest.raises(ValueError, match="baselines: by must be one of auc, correlation, .* got 'lens'"):
        found.baselines("lens")


def test_item_embeddings_of_a_recommender():
    torch.manual_seed(0)
    model = ELSA(10, 4)
    x = interpret.item_embeddings(model, batch_size=3)
    torch.testing.assert_close(x, model.encoder.items().detach())
    assert not x.requires_grad and model.training
    with pytest.raises(ValueError, match="n_items must be at least 1, got 0"):
        interpret.item_embeddings(model, 0)


def test_distinct_examples():
    stats = interpret.concept_map(*planted()[:2], planted()[2], resamples=0, baselines=False).stats
    stats.update(torch.tensor([[9.0], [8.0], [8.0]]), torch.tensor([[23], [23], [23]]), ids=torch.tensor([7, 7, 3]))
    titles = [str(i) for i in range(240)]
    assert [e.id for e in interpret.latent_examples(stats, titles, [23])[23]][:3] == [7, 3, 7]
    best = interpret.latent_examples(stats, titles, [23], distinct=2)[23]
    assert [(e.id, e.value) for e in best] == [(7, 9.0), (3, 8.0)]


def test_tag_table():
    items = ["a", "b", "a", "x", "c", "b", "a"]
    tags = ["fun", "fun", "fun", "fun", "sad", "sad", "rare"]
    got = interpret.tag_table(items, tags, ["c", "b", "a", "d"], min_items=2)
    assert got.concepts.names == ["fun", "sad"] and got.weights.tolist() == [[0, 1], [1, 1], [2, 0], [0, 0]]
    assert torch.equal(got.concepts.labels, got.weights > 0)
    assert (got.unknown_items, got.untagged_items, got.rare_tags) == (1, 1, {"rare": 1})
    assert got.describe().startswith("2 tags on 4 items; left out: 1 tags with too few items, 1 rows of unknown")
    counted = interpret.tag_table(items, tags, ["c", "b", "a", "d"], counts=range(7), min_items=1, min_count=2.5)
    assert counted.concepts.names == ["rare", "sad"] and counted.weights.tolist() == [[0, 4], [0, 5], [6, 0], [0, 0]]
    with pytest.raises(ValueError, match="none of the 3 tags has 5 of the 4 items of the catalogue; 1 of 7 rows"):
        interpret.tag_table(items, tags, ["c", "b", "a", "d"])
    with pytest.raises(ValueError, match="counts must be finite and not negative, got -1"):
        interpret.tag_table(["a"], ["fun"], ["a"], counts=[-1])
    with pytest.raises(ValueError, match="2 items, 1 tags and 2 counts"):
        interpret.tag_table(["a", "b"], ["fun"], ["a"])
    with pytest.raises(TypeError, match="tag_table: tags must be texts, row 1 has nan"):
        interpret.tag_table(["a", "b"], ["fun", math.nan], ["a", "b"])
    with pytest.raises(ValueError, match="tag_table: the catalogue names item 'a' twice"):
        interpret.tag_table(["a", "b"], ["fun", "fun"], ["a", "b", "a"])
    numbers = interpret.tag_table(torch.tensor([7, 5]), ["fun", "fun"], torch.tensor([5, 6, 7]), min_items=1)
    assert numbers.weights.tolist() == [[1], [0], [1]] and numbers.unknown_items == 0


def test_gains_of_the_summary_are_over_the_concepts_that_both_have():
    x, sae, concepts = planted()
    found = interpret.concept_map(x, sae, concepts, resamples=0)
    together = found.scores.together.clone()
    together[1] = 0
    found = replace(found, scores=replace(found.scores, together=together))
    scores = found.baselines("auc")
    kept = torch.tensor([0, 2, 3])
    mine, raw = (float(scores[name][kept].mean()) - 0.5 for name in ("sae", "raw"))
    assert scores["sae"][1].isnan() and not scores["raw"].isnan().any()
    assert found.summary()["auc_gain_over_raw"] == pytest.approx(mine / raw)


def test_names_of_concepts_are_their_own():
    x, sae, concepts = planted()
    twice = Concepts(["art", "birds", "art", "dance", "empty", "every"], concepts.labels)
    for found in (interpret.concept_map, interpret.concept_readings):
        with pytest.raises(ValueError, match=f"{found.__name__}: concepts must have names of their own, 'art' stands"):
            found(x, sae, twice)
