"""Ranking metrics against hand-made tables and torchmetrics; ties, masks, batches and bad input."""

import math

import pytest
import torch
from torch import nn

from sae_kernels.data.histories import Histories
from sae_kernels.eval.ranking import metrics_at_k, rank_metrics, sampled_rank_metrics, score_batches, top_k, top_k_items

# sums of a few float64 terms: 1e-12 leaves a hundred roundings of room
EXACT = 1e-12


def ragged(lists, n_items):
    return Histories.from_lists(lists, n_items)


def from_table(scores):
    return lambda rows: scores[rows]


def test_hand_made_table():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    histories = ragged([[0], [5, 4], []], 6)
    targets = ragged([[1, 5], [2], [5, 4, 3, 2]], 6)
    # unseen, best first: user 0: 1 2 3 4 5; user 1: 3 2 1 0; user 2: 0 1 2 3 4 5
    log = math.log2
    got = rank_metrics(from_table(scores), histories, targets, k=3)
    ndcg = [1 / (1 + 1 / log(3)), 1 / log(3), (1 / log(4)) / (1 + 1 / log(3) + 1 / log(4))]
    recall = [1 / 2, 1.0, 1 / 3]
    assert got["ndcg@3_per_user"].tolist() == pytest.approx(ndcg, abs=EXACT)
    assert got["recall@3_per_user"].tolist() == pytest.approx(recall, abs=EXACT)
    assert got["hr@3_per_user"].tolist() == [1, 1, 1]
    assert got["ndcg@3"] == pytest.approx(sum(ndcg) / 3, abs=EXACT)
    assert got["recall@3"] == pytest.approx(sum(recall) / 3, abs=EXACT)
    assert rank_metrics(from_table(scores), histories, targets, k=1)["hr@1_per_user"].tolist() == [1, 0, 0]


def random_case(seed, n_users=40, n_items=60, n_targets=None):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_users, n_items, generator=generator)
    seen, wanted = [], []
    for _ in range(n_users):
        order = torch.randperm(n_items, generator=generator).tolist()
        count = n_targets or int(torch.randint(1, 9, (1,), generator=generator))
        seen.append(order[:7])
        wanted.append(order[7 : 7 + count])
    return scores, ragged(seen, n_items), ragged(wanted, n_items)


@pytest.mark.parametrize("n_targets", [None, 5])
def test_against_torchmetrics(n_targets):
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    scores, histories, targets = random_case(0, n_targets=n_targets)
    unseen = ~histories.batch(dtype=torch.bool)
    wanted = targets.batch(dtype=torch.bool)
    owner = unseen.nonzero()[:, 0]
    got = rank_metrics(from_table(scores), histories, targets, k=10)
    ndcg = retrieval.RetrievalNormalizedDCG(top_k=10)(scores[unseen], wanted[unseen], indexes=owner)
    hit = retrieval.RetrievalHitRate(top_k=10)(scores[unseen], wanted[unseen], indexes=owner)
    # torchmetrics works in float32: 40 users x 10 terms of eps 6e-8
    assert got["ndcg@10"] == pytest.approx(float(ndcg), abs=3e-5)
    assert got["hr@10"] == pytest.approx(float(hit), abs=1e-6)
    if n_targets is None:
        return
    # their Recall divides by all targets: the same number where no user has more than k of them
    recall = retrieval.RetrievalRecall(top_k=10)(scores[unseen], wanted[unseen], indexes=owner)
    assert got["recall@10"] == pytest.approx(float(recall), abs=1e-6)


def test_recall_divides_by_min_of_k_and_targets():
    scores = torch.arange(10.0, 0, -1).repeat(1, 1)
    got = rank_metrics(from_table(scores), ragged([[]], 10), ragged([list(range(6))], 10), k=2)
    assert got["recall@2"] == 1 and got["ndcg@2"] == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize("k", [1, 3, 7, 50])
def test_ties_rank_the_lower_item_first(k):
    scores = torch.randint(0, 4, (30, 50), generator=torch.Generator().manual_seed(k)).float()
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(top_k(scores, k), expected)


def test_all_equal_scores():
    histories, targets = ragged([[0, 2]], 6), ragged([[1, 5]], 6)
    assert top_k_items(lambda rows: torch.zeros(len(rows), 6), histories, 3).tolist() == [[1, 3, 4]]
    assert rank_metrics(lambda rows: torch.zeros(len(rows), 6), histories, targets, k=3)["recall@3"] == 0.5


def test_the_batch_size_changes_nothing():
    scores, histories, targets = random_case(1)
    whole = rank_metrics(from_table(scores), histories, targets, k=5, batch_size=1000)
    parts = rank_metrics(from_table(scores), histories, targets, k=5, batch_size=7)
    for name, value in whole.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(parts[name])), name


def test_seen_items_are_never_listed_and_missing_places_are_minus_one():
    scores = torch.tensor([[5.0, 4, 3, 2]])
    top = top_k_items(from_table(scores), ragged([[0, 1, 3]], 4), 3)
    assert top.tolist() == [[2, -1, -1]]
    # an item that is both seen and wanted can not be found
    got = rank_metrics(from_table(scores), ragged([[0, 1, 3]], 4), ragged([[0, 2]], 4), k=3)
    assert got["recall@3"] == 0.5 and got["hr@3"] == 1


def test_what_the_scorer_leaves_out_stands_before_what_the_user_has():
    scores = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf]])
    assert top_k_items(from_table(scores), ragged([[0]], 4), 4).tolist() == [[1, 2, 3, -1]]
    counts = torch.tensor([[5, 3, 9, 1]])  # whole numbers are scores too
    assert top_k_items(from_table(counts), ragged([[2]], 4), 2).tolist() == [[0, 1]]
    assert top_k_items(from_table(counts > 2), ragged([[2]], 4), 3).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_of_other_precisions(dtype):
    module = torch.nn.Linear(6, 6, dtype=dtype)
    top = top_k_items(module, ragged([[0, 1], [5]], 6), 2)
    dense = torch.zeros(2, 6, dtype=dtype)
    dense[0, :2] = dense[1, 5] = 1
    assert torch.equal(top, top_k_items(from_table(module(dense).detach()), ragged([[0, 1], [5]], 6), 2))


def test_given_scores_are_not_changed():
    scores, histories, targets = random_case(2)
    before = scores.clone()
    rank_metrics(lambda rows: scores, histories, targets, k=5)
    assert torch.equal(scores, before)


def test_a_target_that_stands_twice_counts_once():
    scores = torch.tensor([[3.0, 2, 1]])
    twice = rank_metrics(from_table(scores), ragged([[]], 3), ragged([[1, 1]], 3), k=2)
    once = rank_metrics(from_table(scores), ragged([[]], 3), ragged([[1]], 3), k=2)
    assert twice["recall@2"] == once["recall@2"] == 1 and twice["ndcg@2"] == once["ndcg@2"]


def test_a_module_runs_in_eval_mode_without_gradients_and_keeps_its_flags():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(6))
            self.dropout = nn.Dropout(0.9)
            self.frozen = nn.Dropout(0.1).eval()

        def forward(self, x):
            self.grad_mode = torch.is_grad_enabled()
            return self.dropout(x) @ self.weight + torch.arange(6.0)

    model = Linear()
    got = rank_metrics(model, ragged([[5]], 6), ragged([[4]], 6), k=1)
    assert got["hr@1"] == 1 and not model.grad_mode
    assert model.training and model.dropout.training and not model.frozen.training and torch.is_grad_enabled()


def test_score_batches_leaves_gradients_on_outside():
    for rows, _ in score_batches(nn.Linear(3, 3), ragged([[0], [1]], 3), batch_size=1):
        assert torch.is_grad_enabled() and rows.numel() == 1


def test_sampled_metrics_of_known_places():
    histories, targets = ragged([[0], [0]], 40), ragged([[1], [2]], 40)
    best, worst = torch.zeros(40), torch.zeros(40)
    best[1] = 1
    worst[2] = -1
    got = sampled_rank_metrics(from_table(torch.stack([best, worst])), histories, targets, k=5, negatives=20)
    assert got["hr@5_per_user"].tolist() == [1, 0] and got["ndcg@5_per_user"].tolist() == [1, 0]


def test_sampled_metrics_draw_unseen_items_by_seed():
    scores = torch.rand(50, 30, generator=torch.Generator().manual_seed(0))
    lists = [[u % 30, (u + 1) % 30] for u in range(50)]
    histories, targets = ragged(lists, 30), ragged([[(u + 2) % 30] for u in range(50)], 30)
    # what the user had scores best by far: were it drawn, no target could be in the first ten
    scores[histories.row_ids(), histories.flat] = 10
    scores[targets.row_ids(), targets.flat] = 5
    run = [sampled_rank_metrics(from_table(scores), histories, targets, seed=s)["hr@10"] for s in (0, 1)]
    assert run == [1, 1]
    scores[targets.row_ids(), targets.flat] = 0.9
    per_seed = [sampled_rank_metrics(from_table(scores), histories, targets, seed=s) for s in (0, 0, 1)]
    assert torch.equal(per_seed[0]["ndcg@10_per_user"], per_seed[1]["ndcg@10_per_user"])
    assert not torch.equal(per_seed[0]["ndcg@10_per_user"], per_seed[2]["ndcg@10_per_user"])


def test_bad_input():
    scores, histories, targets = random_case(3, n_users=4, n_items=20)
    score = from_table(scores)
    with pytest.raises(ValueError, match="k must be between 1 and n_items = 20, got 21"):
        rank_metrics(score, histories, targets, k=21)
    with pytest.raises(ValueError, match="k must be between"):
        rank_metrics(score, histories, targets, k=0)
    with pytest.raises(ValueError, match="user row 2 has no target"):
        rank_metrics(score, histories, ragged([[1], [2], [], []], 20), k=3)
    with pytest.raises(ValueError, match="same users and items"):
        rank_metrics(score, histories, ragged([[1]], 20), k=3)
    with pytest.raises(ValueError, match="no users"):
        rank_metrics(score, ragged([], 20), ragged([], 20), k=3)
    with pytest.raises(ValueError, match="batch_size"):
        rank_metrics(score, histories, targets, k=3, batch_size=0)
    with pytest.raises(ValueError, match=r"scores must be \(4, 20\), got \(4, 19\)"):
        rank_metrics(lambda rows: scores[rows, :19], histories, targets, k=3)
    with pytest.raises(ValueError, match="user row 1 contain NaN"):
        rank_metrics(from_table(torch.where(torch.arange(4)[:, None] == 1, torch.nan, scores)), histories, targets, k=3)
    with pytest.raises(ValueError, match="top has 1 users"):
        metrics_at_k(torch.zeros(1, 3, dtype=torch.int64), targets)
    with pytest.raises(ValueError, match="expected 1"):
        sampled_rank_metrics(score, histories, ragged([[1, 2]] * 4, 20), k=3)
    with pytest.raises(ValueError, match="has every item"):
        sampled_rank_metrics(score, ragged([list(range(20))] * 4, 20), ragged([[1]] * 4, 20), k=3)
