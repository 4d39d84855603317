"""Detectors and readings: dense columns against definitions over pairs, the readings against columns written out."""

import pytest
import torch

from sae_kernels import interpret
from sae_kernels.data import Concepts, Histories
from sae_kernels.interpret import detectors
from sae_kernels.nn import TopKSAE
from tests.test_concept_map import pair_auc, pearson, planted

N, D, WIDE = 240, 12, 24


def dense(code):
    return torch.zeros(len(code.values), code.d_sae).scatter_add_(1, code.indices.long(), code.values.detach())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_detector_scores_are_those_of_all_pairs(ties, dtype, monkeypatch):
    monkeypatch.setattr(detectors, "TILE", 3)
    g = torch.Generator().manual_seed(0)
    columns = torch.randn(37, 8, generator=g).to(dtype)
    if ties:
        columns = (columns * 1.5).round()
    columns[:, 5] = 0.1  # of one value
    labels = torch.rand(37, 4, generator=g) < torch.tensor([0.1, 0.4, 0.8, 0.5])
    labels[:, 2], labels[:, 3] = True, False
    got = interpret.detector_scores(columns.split(3, 1), labels)
    for c in range(2):
        for f in range(8):
            z, y = columns[:, f].double(), labels[:, c]
            assert got.auc[c, f] == pytest.approx(pair_auc(z, y), abs=1e-12)
            assert got.correlation[c, f] == pytest.approx(0.0 if f == 5 else pearson(z, y), abs=1e-9)
    assert got.auc[2:].isnan().all() and got.correlation[2:].isnan().all()


def test_detector_scores_of_sparse_codes_are_those_of_concept_scores():
    x, sae, concepts = planted()
    code, labels = sae.encode(x), concepts.labels[:, :4]
    sparse = interpret.concept_scores(code.values.detach(), code.indices, WIDE, labels)
    got = interpret.detector_scores([dense(code)], labels)
    torch.testing.assert_close(got.auc, sparse.auc, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.correlation, sparse.correlation, rtol=0, atol=1e-9)


def test_detector_scores_of_nothing():
    assert interpret.detector_scores([], torch.ones(3, 2, dtype=torch.bool)).auc.shape == (2, 0)
    assert interpret.detector_scores([torch.zeros(0, 4)], torch.ones(0, 2, dtype=torch.bool)).auc.isnan().all()


@pytest.mark.parametrize(
    ("tile", "labels", "error", "match"),
    [
        (torch.zeros(4, 2), torch.zeros(5, 1, dtype=torch.bool), ValueError, r"a tile \(4, 2\) must have a row per"),
        (torch.zeros(4, 2), torch.zeros(4, 1), TypeError, "labels must be bool, got torch.float32"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.bool), TypeError, "tile must be float32"),
        (torch.tensor([[0.0], [torch.nan]]), torch.zeros(2, 1, dtype=torch.bool), ValueError, "NaN or Inf in row 1"),
    ],
)
def test_bad_detectors(tile, labels, error, match):
    with pytest.raises(error, match=match):
        interpret.detector_scores([tile], labels)


def test_tiles_are_columns_of_the_whole(monkeypatch):
    monkeypatch.setattr(detectors, "TILE", 5)
    x, sae, _ = planted()
    lens = list(interpret.lens_tiles(sae.W_dec, x))
    assert [tile.shape for tile in lens] == [(N, 5)] * 4 + [(N, 4)]
    torch.testing.assert_close(torch.cat(lens, 1), x @ sae.W_dec.detach().T)
    g = torch.Generator().manual_seed(1)
    histories = Histories.from_lists([torch.randint(0, 39, (n,), generator=g).tolist() for n in (3, 0, 7, 9)], 40)
    code = sae.encode(torch.randn(4, D, generator=g))
    for columns, whole in ((code, dense(code)), (dense(code), dense(code))):
        got = torch.cat(list(interpret.audience_tiles(columns, histories)), 1)
        for item in range(40):
            has = torch.tensor([bool((histories[u] == item).any()) for u in range(4)]).float()  # often or once
            expected = has @ whole / has.sum() if has.any() else torch.zeros(WIDE)
            torch.testing.assert_close(got[item], expected, rtol=1e-5, atol=1e-6)
    assert (got[39] == 0).all()
    with pytest.raises(ValueError, match=r"directions \(24, 12\) and items \(240, 11\) must end in one d"):
        interpret.lens_tiles(sae.W_dec, x[:, 1:])
    with pytest.raises(ValueError, match="4 rows of columns and 1 users in histories"):
        next(interpret.audience_tiles(code, histories.select(torch.tensor([0]))))


def readings_of(**options):
    x, sae, concepts = planted()
    g = torch.Generator().manual_seed(2)
    histories = Histories.from_lists([torch.randint(0, N, (9,), generator=g).tolist() for _ in range(150)], N)
    people = torch.stack([x[histories[u]].mean(0) for u in range(150)])
    options = {"head": x, "users": (people, histories), **options}
    return x, sae, concepts, histories, people, interpret.concept_readings(x, sae, concepts, **options)


def above_chance(figure, chance, z, y, rows):
    found = [figure(z[rows, f].double(), y[rows]) for f in range(z.shape[1])]
    return torch.tensor(found).nan_to_num(chance) - chance  # a column of one value has no correlation


def transferred(chosen_on, scored_on, either_way):
    f = int((chosen_on.abs() if either_way else chosen_on).argmax())
    return float(scored_on[f] * (chosen_on[f].sign() if either_way else 1))


def test_readings_are_the_best_columns_and_their_other_half():
    x, sae, concepts, histories, people, found = readings_of()
    blank = interpret.untrained(sae)
    had = torch.bincount(histories.flat, minlength=N) > 0
    every = torch.ones(N, dtype=torch.bool)
    columns = {
        ("lens", "latents"): (x @ sae.W_dec.detach().T, every),
        ("lens", "raw dimensions"): (x, every),
        ("lens", "untrained SAE"): (x @ blank.W_dec.detach().T, every),
        ("audience", "latents"): (torch.cat(list(interpret.audience_tiles(sae.encode(people), histories)), 1), had),
        ("audience", "raw dimensions"): (torch.cat(list(interpret.audience_tiles(people, histories)), 1), had),
        ("activation", "raw dimensions"): (x, every),
    }
    by = {(one.reading, one.detector): one for one in found}
    assert len(by) == 9 and all(one.names == ["art", "birds", "cars", "dance"] for one in found)
    half = torch.zeros(N, dtype=torch.bool)
    half[halves(N)[0]] = True
    for key, (z, rows) in columns.items():
        one, raw = by[key], key[1] == "raw dimensions"
        for c in range(4):
            y = concepts.labels[:, c]
            auc = above_chance(pair_auc, 0.5, z, y, rows)
            size = auc.abs() if raw else auc
            assert one.auc[c] == pytest.approx(0.5 + float(size.max()), abs=1e-6) and one.latent[c] == size.argmax()
            for name, figure, chance in (("auc", pair_auc, 0.5), ("correlation", pearson, 0.0)):
                first, second = (above_chance(figure, chance, z, y, rows & part) for part in (half, ~half))
                ways = [transferred(first, second, raw), transferred(second, first, raw)]
                got = getattr(one, f"{name}_held_out")[c]
                assert got == pytest.approx(chance + sum(ways) / 2, abs=1e-5)
    # in "activation" the figures are those of the map
    whole = interpret.concept_map(x, sae, concepts, resamples=0)
    for name in ("auc", "correlation"):
        for detector, column in zip(interpret.readings.DETECTORS, ("sae", "raw", "random"), strict=True):
            got = getattr(by["activation", detector], name)
            torch.testing.assert_close(got, whole.baselines(name)[column], rtol=0, atol=1e-9)


def test_readings_table_and_options():
    x, sae, concepts, *_, found = readings_of()
    rows = {(row["reading"], row["detector"]): row for row in interpret.readings_table(found)}
    latents, raw, blank = (rows["lens", name] for name in interpret.readings.DETECTORS)
    assert raw["auc_gain"] == raw["correlation_held_out_gain"] == 1 and blank["auc_above_untrained"] == 0
    assert latents["auc_gain"] == pytest.approx((latents["auc"] - 0.5) / (raw["auc"] - 0.5))
    assert latents["correlation_gain"] == pytest.approx(latents["correlation"] / raw["correlation"])
    assert 0 < latents["auc_above_untrained"] <= 1
    alone = interpret.concept_readings(x, sae, concepts)
    assert [one.reading for one in alone] == ["activation"] * 3
    other = readings_of(seed=1)[-1]
    assert not torch.equal(other[0].auc_held_out, found[0].auc_held_out) and torch.equal(other[0].auc, found[0].auc)
    large = [name for name in found[0].names if concepts.labels[:, concepts.names.index(name)].sum() >= 46]
    assert readings_of(min_support=46)[-1][0].names == large != found[0].names


def test_readings_of_positions_and_of_some_items():
    """Rows that are positions fall into the halves by item; the other readings keep to the items that x names."""
    x, sae, concepts = planted()
    items = torch.arange(120).repeat_interleave(2)
    found = interpret.concept_readings(x[items], sae, concepts, items=items, head=x)
    single = interpret.concept_readings(
        x[:120], sae, Concepts(concepts.names, concepts.labels[:120]), items=torch.arange(120),
        head=x[:120],
    )  # fmt: skip
    for one, other in zip(found[3:], single[3:], strict=True):
        torch.testing.assert_close(one.auc, other.auc, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"concept_readings: x has 120 rows and the concepts 240 items; give items"):
        interpret.concept_readings(x[:120], sae, concepts)


def halves(n):
    one = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return one[: n // 2], one[n // 2 :]


def test_support_is_asked_for_where_a_latent_is_chosen_alone():
    """In either half one latent fires on six of the concept's eight items, and on one of the other half's."""
    x, y = torch.zeros(60, 2), torch.zeros(60, 1, dtype=torch.bool)
    for latent, half in enumerate(halves(60)):
        y[half[:8]] = True
        x[half[:6], latent] = x[half[6], 1 - latent] = 1.0
    sae = TopKSAE(2, 2, 1).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2)), sae.W_dec.copy_(torch.eye(2))
    one = interpret.concept_readings(x, sae, Concepts(["a"], y))[0]
    assert (one.reading, one.detector) == ("activation", "latents")
    assert one.auc_held_out.item() == pytest.approx(0.5 + 1 / 16)
    found = interpret.concept_readings(x, sae, Concepts(["a"], y), min_support=7)[0]
    assert found.auc_held_out.isnan() and found.auc.item() == pytest.approx(0.5 + 7 / 32)


def test_gains_are_over_the_concepts_that_both_have():
    def one(detector, *auc):
        auc = torch.tensor(auc)
        return interpret.Reading("lens", detector, ["a", "b"], torch.zeros(2), auc, auc, auc, auc)

    known = [one(name, 0.6, 0.9) for name in interpret.readings.DETECTORS]
    latents = interpret.readings_table([one("latents", 0.7, torch.nan), *known[1:]])[0]
    assert latents["auc_gain"] == latents["auc_held_out_gain"] == pytest.approx(2.0)
    assert latents["auc"] == pytest.approx(0.7) and latents["concepts"] == 1


def test_halves_of_items_that_were_themselves_drawn():
    x, sae, concepts = planted()
    told = (torch.rand(N, generator=torch.Generator().manual_seed(0)) >= 0.5).nonzero().squeeze(1)
    found = interpret.concept_readings(x[told], sae, concepts, items=told, head=x, min_support=2)
    assert not any(one.auc_held_out.isnan().any() for one in found if one.reading == "lens")
