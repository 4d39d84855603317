"""What every recommender has to do, ours and adapted ones alike; used by the tests of the adapters."""

import torch
from torch.nn.functional import linear

from sae_kernels.data.split import leave_last_out
from sae_kernels.eval.ranking import rank_metrics
from sae_kernels.hooks import attach
from sae_kernels.nn import TopKSAE
from sae_kernels.steer import SteeredRanker, attached, suppress
from sae_kernels.train import from_model

# float32 sums of at most some hundred terms of size about 1
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def check_recommender(model, histories, head=True):
    """The one interface: embeddings and scores of histories, an SAE at the hook point, ranking, steering, training."""
    bags = histories.bags()
    scores, embeddings = model.score_histories(*bags), model.encode_histories(*bags)
    assert scores.shape == (len(histories), model.n_items) and embeddings.shape == (len(histories), model.d)
    assert bool(scores.isfinite().all()) and not torch.equal(scores[0], scores[2])
    real = histories.lengths > 0
    one_by_one = torch.cat([model.score_histories(*histories.bags(torch.tensor([row]))) for row in range(len(real))])
    torch.testing.assert_close(one_by_one, scores, **CLOSE)
    if head and hasattr(model, "item_head"):
        query, items, bias = model.item_head()
        states = embeddings if query is None else query(embeddings)
        torch.testing.assert_close(linear(states, items, bias)[real], scores[real], **CLOSE)
        listed = SteeredRanker(model, TopKSAE(model.d, 2 * model.d, 3).eval(), error_term=True).recommend(
            histories.select(real.nonzero().squeeze(1)), 3
        )
        unseen = scores.detach().index_put((histories.row_ids(), histories.flat), torch.tensor(-torch.inf))
        torch.testing.assert_close(listed[1], unseen.topk(3).values[real], **CLOSE)
    torch.manual_seed(1)
    sae = TopKSAE(model.d, 4 * model.d, 3).eval()
    where = {"positions": model.positions, "mask": model.mask}
    with attach(model, model.hook_point, sae, error_term=True, **where):
        torch.testing.assert_close(model.score_histories(*bags), scores, **CLOSE)
    with torch.no_grad(), attach(model, model.hook_point, sae, **where):
        torch.testing.assert_close(model.encode_histories(*bags)[real], sae(embeddings)[real], **CLOSE)
        changed = model.score_histories(*bags)
    assert float((changed - scores)[real].detach().abs().amax(1).min()) > 1e-4
    torch.testing.assert_close(model.score_histories(*bags), scores, rtol=0, atol=0)
    # the scores hang on nothing but the hook point: equal embeddings, equal scores
    with torch.no_grad(), attach(model, model.hook_point, sae, edit=suppress(range(4 * model.d)), **where):
        flat = model.score_histories(*bags)[real]
    torch.testing.assert_close(flat, flat[:1].expand_as(flat), **CLOSE)
    test = leave_last_out(histories)
    with attached(model, sae, **where)(None) as steered:
        assert 0 <= rank_metrics(steered, test.inputs, test.targets, 3)["ndcg@3"] <= 1
    source = from_model(model, model.hook_point, lambda step, g: model.inputs(*bags), mask=model.mask, batch_size=8)
    assert source.next().shape == (8, model.d)
