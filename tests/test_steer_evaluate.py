"""Figures of lists against loops over users; goals, methods and the front against their definitions; the plots."""

import math
from dataclasses import replace

import pytest
import torch
from test_steer_serve import kinds, world

from sae_kernels import TopKSAE, steer
from sae_kernels.data import Concepts
from sae_kernels.data.histories import Histories
from sae_kernels.eval.lists import list_figures, means_and_errors
from sae_kernels.eval.ranking import top_k
from sae_kernels.eval.resample import resample_weights
from sae_kernels.recommenders import ELSA
from sae_kernels.steer import plots

K, N = 4, 12


def lists_case(seed=0, users=9):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(N, generator=g).tolist() for _ in range(users)]
    top = torch.tensor([row[:K] for row in rows])
    top[2, 2:], top[3] = -1, -1
    targets = Histories.from_lists([torch.randperm(N, generator=g)[: 1 + u % 6].tolist() for u in range(users)], N)
    histories = Histories.from_lists([row[K : K + 3] for row in rows], N)
    labels = torch.rand(N, 2, generator=g) < 0.4
    goals = steer.Goals(["a", "b"], labels, torch.arange(users) % 2)
    return top, targets, histories, goals, torch.randn(N, 3, generator=g), torch.randint(0, 50, (N,), generator=g)


def test_list_figures_against_a_loop():
    top, targets, histories, goals, E, popularity = lists_case()
    got = list_figures(top, targets, goals.wanted(top), goals.unseen(histories), popularity, E)
    for u in range(len(top)):
        items = [i for i in top[u].tolist() if i >= 0]
        segment = {i for i in range(N) if goals.labels[i, goals.concept[u]]} - set(histories[u].tolist())
        member = {i for i in range(N) if goals.labels[i, goals.concept[u]]}
        for prefix, truth in (("", set(targets[u].tolist())), ("segment_", segment)):
            if not truth:
                assert got[f"{prefix}ndcg"][u].isnan()
                continue
            gains = [1 / math.log2(p + 2) for p, i in enumerate(items) if i in (truth if not prefix else member)]
            ideal = sum(1 / math.log2(p + 2) for p in range(min(K, len(truth))))
            assert got[f"{prefix}ndcg"][u] == pytest.approx(sum(gains) / ideal)
            assert got[f"{prefix}recall"][u] == pytest.approx(len(gains) / min(K, len(truth)))
        if not items:
            assert all(got[name][u].isnan() for name in ("concept_share", "novelty", "diversity"))
            continue
        assert got["concept_share"][u] == pytest.approx(sum(i in member for i in items) / len(items))
        share = [(int(popularity[i]) + 1) / (int(popularity.max()) + 1) for i in items]
        assert got["novelty"][u] == pytest.approx(sum(-math.log2(s) for s in share) / len(items))
        apart = [
            1 - float(torch.cosine_similarity(E[a].double(), E[b].double(), dim=0))
            for a in items
            for b in items
            if a < b
        ]
        assert got["diversity"][u] == pytest.approx(sum(apart) / len(apart))
    assert "diversity" not in list_figures(top, targets, goals.wanted(top), goals.unseen(histories), popularity)


def gini(counts):
    n = len(counts)
    return sum(abs(a - b) for a in counts for b in counts) / (2 * n * sum(counts))


def test_means_errors_coverage_and_gini():
    top, targets, histories, goals, E, popularity = lists_case()
    per_user = list_figures(top, targets, goals.wanted(top), goals.unseen(histories), popularity, E)
    means, errors = means_and_errors(per_user, top, N, resamples=40, seed=3)
    counts = torch.bincount(top[top >= 0], minlength=N).tolist()
    assert means["coverage"] == sum(c > 0 for c in counts) / N and means["gini"] == pytest.approx(gini(counts))
    for name, values in per_user.items():
        assert means[name] == pytest.approx(float(values.nanmean()))
    weights = torch.cat(list(resample_weights(len(top), 40, seed=3)))
    drawn = [[u for u in range(len(top)) for _ in range(int(w[u]))] for w in weights]
    assert {len(rows) for rows in drawn} == {len(top)}
    for name in ("ndcg", "diversity"):
        again = torch.stack([per_user[name][rows].nanmean() for rows in drawn])
        assert errors[name] == pytest.approx(float(again.std()))
    spread = torch.tensor([gini(torch.bincount(top[r][top[r] >= 0], minlength=N).tolist()) for r in drawn])
    assert errors["gini"] == pytest.approx(float(spread.std()), rel=1e-5)
    assert math.isnan(means_and_errors(per_user, top, N, resamples=0)[1]["ndcg"])
    few = torch.full((len(top),), torch.nan, dtype=torch.float64)
    few[0], few[1] = 1, 3  # no user of some resamples has the figure
    again = torch.stack([few[rows].nanmean() for rows in drawn])
    assert again.isnan().any()
    assert means_and_errors({"x": few}, top, N, 40, 3)[1]["x"] == pytest.approx(float(again[~again.isnan()].std()))
    same = torch.zeros(5, 1, dtype=torch.int64)
    assert means_and_errors({"x": torch.ones(5)}, same, 10, 0)[0] == {
        "x": 1,
        "coverage": 0.1,
        "gini": pytest.approx(0.9),
    }


def test_goals():
    labels = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
    histories = Histories.from_lists([[0, 0], [2], [1]], 4)
    targets = Histories.from_lists([[1, 2], [3], [2, 3]], 4)
    goals, rows = steer.over_represented(Concepts(["a", "b"], labels), histories, targets)
    # user 0 turns from a to b; user 1's target has no concept; user 2's targets have less of both, and more of b
    assert rows.tolist() == [0, 2] and goals.concept.tolist() == [1, 1]
    kept = histories.select(rows)
    assert goals.unseen(kept).tolist() == [2, 1]
    assert goals.wanted(torch.tensor([[1, -1], [0, 2]])).tolist() == [[True, False], [False, True]]
    one = steer.one_goal([0, 1], 3, 4)
    assert one.unseen(histories).tolist() == [1, 2, 1] and [r.tolist() for _, r in one.groups()] == [[0, 1, 2]]
    with pytest.raises(ValueError, match="none of the 1 users has a target with a concept"):
        steer.over_represented(
            Concepts(["a", "b"], labels), histories.select(rows[:1]), targets.select(torch.tensor([1]))
        )
    with pytest.raises(ValueError, match="3 items in concepts, 4 in histories"):
        steer.over_represented(Concepts(["a", "b"], labels[:3]), histories, targets)


def dense_lists(scores, histories, k):
    return top_k(scores.index_put((histories.row_ids(), histories.flat), torch.tensor(-torch.inf)), k)


def with_goals(name):
    """A model, its SAE, histories, a ranker, three concepts with a goal per user, and a probe per concept."""
    model, sae, histories, _ = world(name)
    g = torch.Generator().manual_seed(1)
    if name == "multvae":
        with torch.no_grad():
            model.decoder[2].bias.normal_(generator=g)
    labels = torch.rand(30, 3, generator=g) < 0.3
    goals = steer.Goals(["a", "b", "c"], labels, torch.arange(24) % 3)
    return model, sae, histories, steer.SteeredRanker(model, sae), goals, torch.randn(3, 8, generator=g)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["elsa", "multvae"])
def test_methods_without_latents_against_dense_scores(name, strength):
    model, _, histories, ranker, goals, probes = with_goals(name)
    users = ranker.encode(histories)
    head = (lambda h: h @ model.encoder.items().T) if name == "elsa" else model.decoder
    length = users.x.norm(dim=1, keepdim=True)
    unit = torch.nn.functional.normalize(probes, dim=1)[goals.concept]
    h = (1 - strength) * users.x + strength * length * unit
    by_probe = steer.probe_lists(ranker, users, goals, probes, 5)
    assert torch.equal(by_probe(strength), dense_lists(head(h), histories, 5))
    scores = head(users.x)
    bonus = strength / (1 - strength) if strength < 1 else 1e4
    steered = scores + bonus * scores.std(1, correction=0, keepdim=True) * goals.labels[:, goals.concept].T
    by_tag = steer.rerank_lists(ranker, users, goals, 5)
    assert torch.equal(by_tag(strength), dense_lists(steered, histories, 5))
    if name == "multvae":
        return
    by_liking = steer.liked_lists(ranker, users, goals, 5, sharpness=3.0)
    for concept, rows in goals.groups():
        items = ranker.head.items[goals.labels[:, concept]]
        liked = torch.nn.functional.normalize(steer.favourites(users.x[rows], items, 3.0), dim=1)
        h = (1 - strength) * users.x[rows] + strength * length[rows] * liked
        assert torch.equal(by_liking(strength)[rows], dense_lists(head(h), histories.select(rows), 5))


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["elsa", "multvae"])
def test_methods_by_latents_against_the_edits(name, strength):
    _, sae, histories, ranker, goals, _ = with_goals(name)
    users = ranker.encode(histories)
    latents, weights = [[1], [2, 3], [9, 4, 0]], [[1.0], [0.25, 0.5], [3.0, 0.0, 1.0]]
    plain = steer.latent_lists(ranker, users, goals, latents, 5)
    weighted = steer.latent_lists(ranker, users, goals, latents, 5, weights)
    nearby = steer.latent_lists(ranker, users, goals, latents, 5, weights, near="user")
    for concept, rows in goals.groups():
        chosen, weight = latents[concept], weights[concept]
        pairs = [
            (plain, steer.mix(chosen, strength)),
            (weighted, steer.mix(chosen, strength, weight)),
            (nearby, steer.mix_near(chosen, strength, sae.W_dec, weight)),
        ]
        if name == "elsa":
            items = ranker.head.items[goals.labels[:, concept]]
            near_liked = steer.latent_lists(ranker, users, goals, latents, 5, weights, near="liked")
            pairs.append((near_liked, steer.mix_liked(chosen, strength, sae, items, weight)))
        for lists, edit in pairs:
            assert torch.equal(lists(strength)[rows], ranker.rank(users.select(rows), 5, edit)[0])


@torch.no_grad()
def test_reranking_in_full_keeps_the_models_own_order():
    """Of all items, and of two, before the others; whatever the precision of the scores."""
    g = torch.Generator().manual_seed(0)
    model, sae = ELSA(3000, 16), TopKSAE(16, 32, 4, generator=g)
    model.encoder.weight.copy_(torch.randn(3000, 16, generator=g))
    ranker = steer.SteeredRanker(model, sae, error_term=True)
    users = ranker.encode(Histories.from_lists([[u, 7] for u in range(100)], 3000))
    plain = ranker.rank(users, 20)[0]
    every = steer.one_goal(torch.ones(3000, dtype=torch.bool), 100, 3000)
    assert torch.equal(steer.rerank_lists(ranker, users, every, 20)(1.0), plain)
    two = steer.rerank_lists(ranker, users, steer.one_goal([7, 2999], 100, 3000), 20)(1.0)
    assert (two[:, 0] == 2999).all()  # all have 7
    kept = plain[~(plain == 2999).any(1)]
    assert torch.equal(two[~(plain == 2999).any(1), 1:], kept[:, :19])


def test_methods_say_what_is_wrong():
    _, _, histories, ranker, goals, probes = with_goals("multvae")
    users, latents = ranker.encode(histories), [[1], [2, 3], [9, 4, 0]]
    with pytest.raises(ValueError, match="strength must be between 0 and 1, got 1.5"):
        steer.rerank_lists(ranker, users, goals, 5)(1.5)
    with pytest.raises(ValueError, match=r"probes must be \[3 concepts, 8\], got \(3, 7\)"):
        steer.probe_lists(ranker, users, goals, probes[:, :7])
    with pytest.raises(ValueError, match="near must be None, 'user' or 'liked', got True"):
        steer.latent_lists(ranker, users, goals, latents, near=True)
    with pytest.raises(ValueError, match="liked_lists: the head of MultVAE is not linear in the embedding"):
        steer.liked_lists(ranker, users, goals)
    with pytest.raises(ValueError, match="the head of MultVAE is not linear"):
        steer.latent_lists(ranker, users, goals, latents, near="liked")
    with pytest.raises(ValueError, match="3 goals and 24 users"):
        steer.rerank_lists(ranker, users, replace(goals, concept=goals.concept[:3]))


def test_linear_probes():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=g) * torch.tensor([1.0, 2, 3, 4, 5])
    labels = torch.stack([x @ torch.tensor([1.0, 0, 0, 0, 0]) > 0, torch.ones(200, dtype=torch.bool)], 1)
    X = torch.cat([x.double(), torch.ones(200, 1).double()], 1)
    w = torch.linalg.lstsq(X, labels[:, :1].double()).solution[:5, 0]
    torch.testing.assert_close(steer.linear_probes(x, labels, 0)[0], w / w.norm(), rtol=1e-8, atol=1e-10)
    means = x[labels[:, 0]].double().mean(0) - x[~labels[:, 0]].double().mean(0)
    torch.testing.assert_close(steer.linear_probes(x, labels, 1e9)[0], means / means.norm(), rtol=1e-5, atol=1e-6)
    assert (steer.linear_probes(x, labels)[1] == 0).all()
    with pytest.raises(ValueError, match="ridge must be at least 0, got -1"):
        steer.linear_probes(x, labels, -1)
    with pytest.raises(ValueError, match=r"labels must be bool, a row per row of x \(200, 5\)"):
        steer.linear_probes(x, labels[1:])


def compared(resamples=30):
    model, sae, histories, labels = kinds()
    targets = Histories.from_lists(
        [[i for i in range(30) if i not in row][:3] for row in histories_rows(histories)], 30
    )
    ranker = steer.SteeredRanker(model, sae)
    users = ranker.encode(histories)
    goals = steer.Goals(["a", "b", "c"], labels, torch.arange(20) % 3)
    methods = {
        "latents": steer.latent_lists(ranker, users, goals, [[0], [1], [2]], 5),
        "tags": steer.rerank_lists(ranker, users, goals, 5),
    }
    options = {"embeddings": ranker.head.items, "resamples": resamples}
    return steer.compare_steering(methods, goals, histories, targets, strengths=(0.0, 0.5, 1.0), **options)


def histories_rows(histories):
    return [histories[u].tolist() for u in range(len(histories))]


def test_compare_steering():
    rows = compared()
    assert [(r.method, r.strength) for r in rows] == [(m, s) for m in ("latents", "tags") for s in (0.0, 0.5, 1.0)]
    by = {(r.method, r.strength): r for r in rows}
    for method in ("latents", "tags"):
        assert by[method, 1.0].concept_share > by[method, 0.0].concept_share + 0.3
        assert by[method, 1.0].segment_ndcg > by[method, 0.0].segment_ndcg + 0.3
    assert by["tags", 1.0].concept_share == by["tags", 1.0].segment_recall == 1
    assert all(r.errors.keys() == set(plots.FIGURES) and r.errors["ndcg"] > 0 and r.k == 5 for r in rows)
    assert compared() == rows


def test_compare_steering_checks_its_users():
    histories = Histories.from_lists([[0], [1]], 4)
    with pytest.raises(ValueError, match="3 goals, 2 histories and 2 targets must be of the same users"):
        steer.compare_steering({}, steer.one_goal([0], 3, 4), histories, histories)


def row_of(method, ndcg, segment):
    figures = {name: 0.0 for name in ("concept_share", "recall", "segment_recall", "novelty", "coverage", "gini")}
    return steer.SteeringRow(strength=0.0, ndcg=ndcg, segment_ndcg=segment, k=5, method=method, **figures)


def test_front_and_loss():
    points = [("a", 1.0, 0.1), ("b", 0.97, 0.3), ("a", 0.97, 0.3), ("b", 0.96, 0.2), ("a", 0.9, 0.5), ("b", 0.2, 0.5)]
    rows = [row_of(*point) for point in points]
    front = [(r.method, r.ndcg, r.segment_ndcg) for r in steer.pareto_front(rows)]
    assert front == [("a", 1.0, 0.1), ("b", 0.97, 0.3), ("a", 0.97, 0.3), ("a", 0.9, 0.5)]
    kept = steer.at_loss(rows, 1.0)
    # between 0.97 and 0.9 by a straight line; of b the point before is the better one
    assert {m: (r.ndcg, r.segment_ndcg) for m, r in kept.items()} == {
        "a": pytest.approx((0.95, 0.3 + 2 / 7 * 0.2)), "b": (0.97, 0.3),
    }  # fmt: skip
    assert steer.at_loss(rows, 1.0, 0.1)["a"].ndcg == 0.9 and list(steer.at_loss(rows, 1.0, 0.0)) == ["a"]
    assert steer.pareto_front([]) == [] and steer.at_loss(rows, 2.0) == {}
    with pytest.raises(ValueError, match=r"loss must be in \[0, 1\), got 1"):
        steer.at_loss(rows, 1.0, 1)


def test_at_loss_moves_every_figure_and_error_between_strengths():
    low, high = (
        replace(row_of("a", ndcg, segment), strength=strength, coverage=10 * strength, errors={"ndcg": strength / 10})
        for strength, ndcg, segment in ((0.2, 1.0, 0.1), (0.6, 0.8, 0.5))
    )
    for rows in ([low, high], [high, low]):
        point = steer.at_loss(rows, 1.0, 0.05)["a"]
        assert (point.strength, point.ndcg, point.segment_ndcg, point.coverage) == pytest.approx((0.3, 0.95, 0.2, 3.0))
        assert point.errors == {"ndcg": pytest.approx(0.03)} and point.k == 5 and math.isnan(point.diversity)


def test_plots_hold_the_rows():
    pytest.importorskip("plotly", reason="plotly, of the demo extra, is not installed")
    rows = compared()
    front = plots.front_figure(rows, base=0.5).data
    assert [trace.name for trace in front] == ["latents", "tags", "Pareto front"]
    assert list(front[0].x) == [r.ndcg for r in rows[:3]] and list(front[1].y) == [r.segment_ndcg for r in rows[3:]]
    assert len(front[2].x) == len(steer.pareto_front(rows))
    bands = plots.curve_figure(rows, "coverage").data
    assert list(bands[0].y)[:3] == pytest.approx([r.coverage + 1.96 * r.errors["coverage"] for r in rows[:3]])
    assert list(bands[1].y) == [r.coverage for r in rows[:3]] and len(bands) == 4
    bare = [replace(row, errors={}, diversity=math.nan) for row in rows]
    assert len(plots.curve_figure(bare, "coverage").data) == 2
    (_, note, _), (_, bands, _) = plots.pages(rows, bands="over runs")[:2]
    held = ", ".join(dict.fromkeys(row.method for row in steer.pareto_front(rows)))
    assert note.endswith(f"which are of: {held}.")
    assert bands == "Bands: 95 %, over runs."
    assert len(plots.pages(rows)) == 10 and len(plots.pages(bare)) == 9
    with pytest.raises(ValueError, match="key must be one of ndcg"):
        plots.curve_figure(rows, "hits")
