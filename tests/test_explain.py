"""Explanations: the parts add up to the score of the attached model, ranks are those of dense scores."""

import pytest
import torch
from test_steer_serve import N_ITEMS, attached_scores, world

from sae_kernels import interpret, steer


def unseen_rank(scores, item, history):
    ahead = [i for i in range(N_ITEMS) if i not in history and (scores[i], -i) > (scores[item], -item)]
    return len(ahead) + 1


@pytest.mark.parametrize("name", ["elsa", "sasrec", "multvae"])
@pytest.mark.parametrize("normalize", ["none", "standardize", "global"])
@pytest.mark.parametrize("error_term", [False, True])
def test_parts_add_up_and_ranks_are_right(name, normalize, error_term):
    model, sae, histories, _ = world(name, normalize)
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(2))
    ranker = steer.SteeredRanker(model, sae, error_term=error_term)
    users = ranker.encode(histories)
    positions = "last" if name == "sasrec" else "all"
    plain = attached_scores(model, sae, histories, None, error_term, positions)
    row = 7
    item = next(i for i in range(N_ITEMS) if i not in histories[row])
    got = interpret.explain(ranker, users, row, item, top=3)
    total = sum(r.contribution for r in got.reasons) + got.others + got.constant + got.left_out + got.unexplained
    assert got.score == pytest.approx(float(plain[row, item]), rel=1e-4, abs=1e-5)
    assert total == pytest.approx(got.score, rel=1e-9, abs=1e-9)
    assert got.exact == (name != "multvae") and (got.left_out != 0) == error_term
    if got.exact:
        assert abs(got.unexplained) < 1e-5
    else:
        assert abs(got.unexplained) > 1e-7
    history = set(histories[row].tolist())
    assert got.rank == unseen_rank(plain[row].tolist(), item, history)
    for reason in got.reasons:
        cut = attached_scores(model, sae, histories, steer.suppress(reason.latent), error_term, positions)[row]
        assert reason.rank_without == unseen_rank(cut.tolist(), item, history)
        if got.exact:
            assert float(plain[row, item] - cut[item]) == pytest.approx(reason.contribution, rel=1e-3, abs=1e-5)
    sizes = [abs(r.contribution) for r in got.reasons]
    assert sizes == sorted(sizes, reverse=True) and all(r.activation > 0 for r in got.reasons)


def test_contributions_of_a_bent_head_are_of_first_order():
    """Halving a small activation takes half its contribution off, up to the square of it."""
    model, sae, histories, _ = world("multvae")
    with torch.no_grad():
        sae.W_dec.mul_(1e-3)
    ranker = steer.SteeredRanker(model, sae)
    users = ranker.encode(histories)
    item = next(i for i in range(N_ITEMS) if i not in histories[3])
    got = interpret.explain(ranker, users, 3, item, top=1)
    plain, cut = (
        attached_scores(model, sae, histories, edit, False)[3, item].item()
        for edit in (None, steer.scale(got.reasons[0].latent, 0.5))
    )
    assert plain - cut == pytest.approx(got.reasons[0].contribution / 2, rel=0.02)


def test_names_evidence_and_text():
    model, sae, histories, _ = world()
    ranker = steer.SteeredRanker(model, sae)
    users, items = ranker.encode(histories), interpret.item_codes(model, sae)
    item = next(i for i in range(N_ITEMS) if i not in histories[0])
    titles = [f"book {i}" for i in range(N_ITEMS)]
    bare = interpret.explain(ranker, users, 0, item)
    first = bare.reasons[0].latent
    got = interpret.explain(ranker, users, 0, item, names={first: "space"}, items=items, titles=titles, evidence=2)
    assert [r.name for r in got.reasons] == ["space"] + [None] * (len(got.reasons) - 1)
    dense = items.to_dense()
    for reason in got.reasons:
        firing = [(float(dense[i, reason.latent]), i) for i in histories[0].tolist() if dense[i, reason.latent] > 0]
        expected = [i for _, i in sorted(firing, key=lambda pair: (-pair[0], pair[1]))][:2]
        assert [e.id for e in reason.evidence] == expected
        assert all(e.title == f"book {e.id}" for e in reason.evidence)
    text = got.text()
    assert text.startswith(f"book {item}: rank {got.rank}, score") and "(space)" in text and "exactly" in text
    assert f"rank {got.rank} -> {got.reasons[0].rank_without} without it" in text
    assert bare.title == str(item) and all(r.evidence == [] and r.name is None for r in bare.reasons)
    assert interpret.explain(ranker, users, 0, item, top=0).reasons == []
    multvae = world("multvae")
    bent = steer.SteeredRanker(*multvae[:2])
    text = interpret.explain(bent, bent.encode(multvae[2]), 0, item).text()
    assert "to first order" in text and "beyond first order" in text


def test_ties_and_tiles(monkeypatch):
    model, sae, histories, _ = world()
    with torch.no_grad():
        sae.W_dec.zero_()
    ranker = steer.SteeredRanker(model, sae)
    users = ranker.encode(histories)
    unseen = [i for i in range(N_ITEMS) if i not in histories[0]]
    for tile in (4, 30):
        monkeypatch.setattr("sae_kernels.interpret.explanations.TILE", tile)
        assert interpret.explain(ranker, users, 0, unseen[5]).rank == 6


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"row": 24}, "row must be between 0 and 23, got 24"),
        ({"item": 30}, "item must be between 0 and 29, got 30"),
        ({"item": None}, "is in the history of user row 0"),
        ({"titles": ["a"]}, "titles must be one per item, 30, got 1"),
    ],
)
def test_bad_explanations(change, match):
    model, sae, histories, _ = world()
    ranker = steer.SteeredRanker(model, sae)
    item = next(i for i in range(N_ITEMS) if i not in histories[0])
    arguments = {"row": 0, "item": item, **change}
    if arguments["item"] is None:
        arguments["item"] = int(histories[0][0])
    with pytest.raises(ValueError, match=match):
        interpret.explain(ranker, ranker.encode(histories), **arguments)
