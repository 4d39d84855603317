"""RecBole and RecTools, the real packages: the adapters give the scores that the packages themselves give."""

import copy
import warnings

import pytest
import torch
from recommender_contract import CLOSE, check_recommender

from sae_kernels.data.histories import Histories
from sae_kernels.hooks import attach
from sae_kernels.nn import TopKSAE
from sae_kernels.recommenders.adapters import from_recbole, from_rectools


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Both packages write their logs into the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recbole(tmp_path):
    """name -> (adapter, dataset, scores that RecBole itself gives its test users, histories of those users)."""
    pytest.importorskip("recbole", reason="RecBole is absent")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, get_trainer, init_seed

        folder = tmp_path
        (folder / "toy").mkdir()
        (folder / "toy" / "toy.inter").write_text(_atomic())

        def build(name):
            settings = {
                "data_path": str(folder), "checkpoint_dir": str(folder), "epochs": 2, "device": "cpu", "gpu_id": "",
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": 8,
                "train_neg_sample_args": None, "hidden_size": 16, "inner_size": 16, "n_layers": 2, "n_heads": 2,
                "mlp_hidden_size": [24], "latent_dimension": 16, "train_batch_size": 64, "show_progress": False,
                "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
            }  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["pytest"])
                config = Config(model=name, dataset="toy", config_dict=settings)
            init_seed(1, True)
            dataset = create_dataset(config)
            train, _, test = data_preparation(config, dataset)
            model = get_model(name)(config, train.dataset)
            get_trainer(config["MODEL_TYPE"], name)(config, model).fit(train, saved=False, verbose=False)
            return model.eval(), dataset, train.dataset, test

        yield build


def _atomic():
    torch.manual_seed(0)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(40):
        items = torch.randperm(60)[: 4 + user % 9].tolist()
        rows += [f"u{user}\ti{item}\t{time}" for time, item in enumerate(items)]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("name", ["SASRec", "BERT4Rec"])
def test_recbole_sequences(recbole, name):
    model, dataset, _, test = recbole(name)
    adapter = from_recbole(model, dataset)
    assert adapter.item_ids[:2] == dataset.id2token("item_id", [1, 2]).tolist()
    assert len(set(adapter.item_ids)) == adapter.n_items == dataset.item_num - 1
    checked = 0
    for batch, *_ in test:
        lists = [
            [int(i) - 1 for i in row[:length]]
            for row, length in zip(batch["item_id_list"], batch["item_length"], strict=True)
        ]
        histories = Histories.from_lists(lists, adapter.n_items)
        with torch.no_grad():
            theirs = model.full_sort_predict(batch)[:, 1:]
            torch.testing.assert_close(adapter.score_histories(*histories.bags()), theirs, **CLOSE)
        checked += len(lists)
    assert checked == 40
    check_recommender(adapter, Histories.from_lists([[3, 0, 4], [], list(range(11)), [2]], adapter.n_items))
    # a list of every layer's states, of which the first is taken and the last is scored
    with pytest.raises(ValueError, match="'model.trm_encoder' is not the bottleneck: the scores do not change"):
        from_recbole(model, hook_point="trm_encoder")
    with pytest.raises(ValueError, match=r"'model.position_embedding' is not the bottleneck"):
        from_recbole(model, hook_point="position_embedding")


def test_recbole_multivae(recbole):
    model, dataset, train, _ = recbole("MultiVAE")
    adapter = from_recbole(model, dataset)
    assert (adapter.d, adapter.hook_point) == (8, "bottleneck")
    users = torch.arange(1, 30)
    lists = [[] for _ in range(dataset.user_num)]
    for user, item in zip(train.inter_feat["user_id"].tolist(), train.inter_feat["item_id"].tolist(), strict=True):
        lists[user].append(item - 1)
    histories = Histories.from_lists([lists[user] for user in users.tolist()], adapter.n_items)
    with torch.no_grad():
        theirs = model.full_sort_predict({"user_id": users}).view(len(users), -1)[:, 1:]
        torch.testing.assert_close(adapter.score_histories(*histories.bags()), theirs, **CLOSE)
    check_recommender(adapter, Histories.from_lists([[3, 0, 4], [], list(range(11)), [2]], adapter.n_items))
    sae = TopKSAE(8, 32, 2).eval()
    with attach(adapter, "bottleneck", sae), torch.no_grad():
        spliced = model.full_sort_predict({"user_id": users}).view(len(users), -1)[:, 1:]
        torch.testing.assert_close(adapter.score_histories(*histories.bags()), spliced, **CLOSE)
    assert float((spliced - theirs).abs().max()) > 1e-4
    twin = copy.deepcopy(adapter)
    with attach(twin, "bottleneck", sae), torch.no_grad():
        torch.testing.assert_close(twin.score_histories(*histories.bags()), spliced, **CLOSE)
        torch.testing.assert_close(adapter.score_histories(*histories.bags()), theirs, **CLOSE)
    # mu and log variance together are no embedding that an SAE of d could stand at
    assert from_recbole(model, dataset, hook_point="encoder").d == 16


def test_recbole_models_that_need_a_name(recbole):
    model, *_ = recbole("GRU4Rec")
    with pytest.raises(ValueError, match="hook_point must be given for GRU4Rec; known: SASRec, BERT4Rec"):
        from_recbole(model)
    adapter = from_recbole(model, hook_point="dense")
    with pytest.raises(ValueError, match="how GRU4Rec scores items from 'model.dense' is not known"):
        adapter.item_head()
    histories = Histories.from_lists([[3, 0, 4], [], list(range(11)), [2]], adapter.n_items)
    check_recommender(adapter, histories, head=False)


@pytest.mark.parametrize("name", ["SASRecModel", "BERT4RecModel"])
def test_rectools(name):
    pytest.importorskip("rectools", reason="RecTools is absent")
    pytest.importorskip("pytorch_lightning", reason="RecTools' transformers need pytorch-lightning")
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models.nn.transformers.bert4rec import BERT4RecModel
    from rectools.models.nn.transformers.sasrec import SASRecModel

    lines = [line.split("\t") for line in _atomic().splitlines()[1:]]
    frame = pd.DataFrame(
        {
            Columns.User: [user for user, *_ in lines],
            Columns.Item: [item for _, item, _ in lines],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime([int(time) for *_, time in lines], unit="s"),
        }
    )
    torch.manual_seed(0)
    model = {"SASRecModel": SASRecModel, "BERT4RecModel": BERT4RecModel}[name](
        n_factors=16, n_blocks=2, n_heads=2, session_max_len=7, epochs=2, lr=1e-2, recommend_torch_device="cpu"
    )
    with pytest.raises(ValueError, match="has not been fitted"):
        from_rectools(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = Dataset.construct(frame)
        model.fit(dataset)
        adapter = from_rectools(model)
        users = sorted(frame[Columns.User].unique())
        theirs = model.recommend(users, dataset, k=adapter.n_items, filter_viewed=False)
        by_user = frame.groupby(Columns.User)[Columns.Item].apply(list)
        histories = Histories.from_lists([adapter.codes(by_user[user]).tolist() for user in users], adapter.n_items)
        with torch.no_grad():
            ours = adapter.score_histories(*histories.bags())
    row = {user: place for place, user in enumerate(users)}
    found = ours[theirs[Columns.User].map(row).tolist(), adapter.codes(theirs[Columns.Item])]
    torch.testing.assert_close(found, torch.tensor(theirs[Columns.Score].tolist()), atol=1e-4, rtol=1e-4)
    assert len(theirs) == len(users) * adapter.n_items
    check_recommender(adapter, Histories.from_lists([[3, 0, 4], [], list(range(11)), [2]], adapter.n_items))
