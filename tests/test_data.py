"""Histories, splits, the readers and what bad files get."""

import math
from datetime import date
from pathlib import Path

import pytest
import torch

from sae_kernels.data.histories import Histories
from sae_kernels.data.interactions import Concepts, Interactions
from sae_kernels.data.split import leave_last_out, split_targets, split_users

SHARED = Path(__file__).parents[2] / "shared" / "data"
LISTS = [[3, 0, 4], [], [1, 2, 3, 4, 0], [2]]


@pytest.fixture
def histories():
    return Histories.from_lists(LISTS, 6)


def lists_of(histories):
    return [histories[u].tolist() for u in range(len(histories))]


# --- histories ---


def test_from_pairs_sorts_by_user_and_order():
    users, items = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([4, 3, 2, 1, 0])
    assert lists_of(Histories.from_pairs(users, items, 3, 5)) == [[3, 1], [4, 2, 0], []]
    order = torch.tensor([9, 5, 3, 4, 3])
    assert lists_of(Histories.from_pairs(users, items, 3, 5, order)) == [[1, 3], [2, 0, 4], []]


def test_views_of_the_same_rows(histories):
    rows = torch.tensor([2, 1, 0])
    assert len(histories) == 4 and histories.lengths.tolist() == [3, 0, 5, 1]
    assert histories.row_ids().tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 3]
    assert lists_of(histories.select(rows)) == [LISTS[2], LISTS[1], LISTS[0]]
    flat, offsets = histories.bags(rows)
    assert flat.tolist() == LISTS[2] + LISTS[0] and offsets.tolist() == [0, 5, 5, 8]
    assert histories.batch(rows).tolist() == [[1, 1, 1, 1, 1, 0], [0] * 6, [1, 0, 0, 1, 1, 0]]
    assert histories.batch(rows, torch.bool).dtype == torch.bool
    assert histories.padded(rows, 4).tolist() == [[3, 4, 5, 1], [0] * 4, [0, 4, 1, 5]]
    assert histories[-1].tolist() == [2]
    assert lists_of(histories.to("cpu")) == LISTS
    assert torch.equal(Histories.one_item_each(4).batch(), torch.eye(4))


def test_repeats():
    histories = Histories.from_lists([[2, 0, 2, 2], [], [0], [1, 1]], 4)
    assert lists_of(histories.distinct()) == [[2, 0], [], [0], [1]]
    assert histories.users_per_item().tolist() == [2, 1, 1, 0]
    once = Histories.from_lists([[2, 0], [0]], 3)
    assert once.distinct() is once


def test_no_rows(histories):
    none = histories.select(torch.zeros(0, dtype=torch.int64))
    assert len(none.distinct()) == 0 and none.users_per_item().sum() == 0
    assert len(none) == 0 and none.batch().shape == (0, 6) and none.padded(length=3).shape == (0, 3)
    assert len(Histories.from_lists([], 3)) == 0


def test_sub_histories_are_random_ordered_parts():
    whole = Histories.from_lists([list(range(99, -1, -1))] * 400, 100)
    rows = torch.arange(400)
    parts = whole.sub_histories(rows, (0.2, 1.0), torch.Generator().manual_seed(0))
    kept = parts.lengths / 100
    # 400 draws of U(0.2, 1): standard error of the mean 0.23 / 20, five of them
    assert float(kept.mean()) == pytest.approx(0.6, abs=0.06)
    assert float(kept.min()) < 0.3 and float(kept.max()) > 0.9
    assert all((part.diff() < 0).all() for part in (parts[u] for u in range(400)))
    again = whole.sub_histories(rows, (0.2, 1.0), torch.Generator().manual_seed(0))
    other = whole.sub_histories(rows, (0.2, 1.0), torch.Generator().manual_seed(1))
    assert torch.equal(parts.flat, again.flat) and not torch.equal(parts.offsets, other.offsets)


def test_sub_histories_keep_all_and_none(histories):
    rows = torch.tensor([2, 0])
    assert lists_of(histories.sub_histories(rows, (1, 1))) == [LISTS[2], LISTS[0]]
    empty = histories.sub_histories(rows, (0, 0))
    assert lists_of(empty) == [[], []] and empty.batch().sum() == 0


def test_bad_histories(histories):
    flat, offsets = torch.tensor([0, 5]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"flat must be in \[0, n_items = 5\), got 0 to 5"):
        Histories(flat, offsets, 5)
    with pytest.raises(ValueError, match="offsets must rise"):
        Histories(flat, torch.tensor([0, 2, 1]), 6)
    with pytest.raises(ValueError, match="offsets must rise"):
        Histories(flat, torch.tensor([0, 3, 1, 2]), 6)
    with pytest.raises(TypeError, match="flat must be a 1-d int64 tensor, got torch.float32"):
        Histories(flat.float(), offsets, 6)
    with pytest.raises(ValueError, match="users must be in"):
        Histories.from_pairs(torch.tensor([3]), torch.tensor([0]), 3, 5)
    with pytest.raises(ValueError, match="one length"):
        Histories.from_pairs(torch.tensor([3, 1]), torch.tensor([0]), 3, 5)
    with pytest.raises(IndexError, match=r"rows must be in \[0, 4\)"):
        histories.batch(torch.tensor([4]))
    with pytest.raises(IndexError, match="row 4 of 4"):
        histories[4]
    with pytest.raises(TypeError, match="rows must be a 1-d int64"):
        histories.select([0, 1])
    with pytest.raises(ValueError, match="keep must be"):
        histories.sub_histories(torch.tensor([0]), (0.5, 0.2))
    with pytest.raises(ValueError, match="length must be at least 1"):
        histories.padded(length=0)
    with pytest.raises(ValueError, match="kept must be bool"):
        histories.filter(torch.ones(9))


# --- splits ---


def test_split_users_is_a_seeded_partition():
    train, held = split_users(1000, 0.1, seed=3)
    assert held.numel() == 100 and torch.equal(torch.cat([train, held]).sort().values, torch.arange(1000))
    assert torch.equal(held, split_users(1000, 0.1, seed=3)[1])
    assert not torch.equal(held, split_users(1000, 0.1, seed=4)[1])
    assert [len(part) for part in split_users(Histories.from_lists(LISTS, 6), 0.01)] == [3, 1]


def test_split_targets_counts_with_ceil_and_keeps_order():
    lists = [list(range(n)) for n in (2, 5, 6, 15, 40)]
    split = split_targets(Histories.from_lists(lists, 40), 0.2, seed=0)
    assert split.targets.lengths.tolist() == [1, 1, 2, 3, 8] and split.dropped == 0
    for u, items in enumerate(lists):
        both = torch.cat([split.inputs[u], split.targets[u]])
        assert both.sort().values.tolist() == items
        assert (split.inputs[u].diff() > 0).all()
    again, other = (split_targets(Histories.from_lists(lists, 40), 0.2, seed=s) for s in (0, 1))
    assert torch.equal(split.targets.flat, again.targets.flat)
    assert not torch.equal(split.targets.flat, other.targets.flat)


def test_every_item_is_a_target_equally_often():
    split = split_targets(Histories.from_lists([list(range(10))] * 2000, 10), 0.2, seed=0)
    share = split.targets.flat.bincount(minlength=10) / 2000
    # binomial, standard error 0.009; five of them
    assert share.tolist() == pytest.approx([0.2] * 10, abs=0.045)


def test_users_with_nothing_left_are_dropped_and_counted(histories):
    for split in (split_targets(histories), leave_last_out(histories)):
        assert split.rows.tolist() == [0, 2] and split.dropped == 2
        assert len(split.inputs) == len(split.targets) == 2


def test_leave_last_out(histories):
    split = leave_last_out(histories)
    assert lists_of(split.inputs) == [[3, 0], [1, 2, 3, 4]] and lists_of(split.targets) == [[4], [0]]
    assert lists_of(leave_last_out(split.inputs).targets) == [[0], [4]]


def test_bad_splits(histories):
    with pytest.raises(ValueError, match="held_out must be between 0 and 1, got 1.5"):
        split_users(10, 1.5)
    with pytest.raises(ValueError, match="at least 2 users"):
        split_users(1)
    with pytest.raises(ValueError, match="fraction must be between"):
        split_targets(histories, 0.0)


# --- interactions and readers ---


def test_describe_names_what_was_removed():
    one = torch.tensor([0])
    data = Interactions("shop", one, one, ["u"], ["i"], filtered={"ratings below 4": 12345})
    assert "shop: 1 interactions of 1 users" in data.describe() and "ratings below 4: 12,345 removed" in data.describe()
    assert "nothing removed" in Interactions("shop", one, one, ["u"], ["i"]).describe()
    with pytest.raises(ValueError, match="item_titles has 2 rows for 1 items"):
        Interactions("shop", one, one, ["u"], ["i"], item_titles=["a", "b"])
    with pytest.raises(ValueError, match="labels must be bool"):
        Concepts(["a"], torch.zeros(3, 2, dtype=torch.bool))


ROWS = """user,item,rating,when
7,30,5,100
7,10,4,50
9,10,2,10
8,20,4,70
7,20,3.5,60
8,10,5,20
"""


@pytest.fixture
def read(tmp_path):
    pytest.importorskip("pandas")
    from sae_kernels.data.read import read_interactions

    def run(text=ROWS, *columns, name="log.csv", **options):
        path = tmp_path / name
        path.write_text(text)
        return read_interactions(path, *(columns or ("user", "item")), **options)

    return run


def test_read_csv(read):
    data = read(ROWS, "user", "item", "rating", "when")
    assert data.user_ids == [7, 8, 9] and data.item_ids == [10, 20, 30] and data.filtered == {}
    assert lists_of(data.histories()) == [[0, 1, 2], [0, 1], [0]]
    assert lists_of(read().histories()) == [[2, 0, 1], [1, 0], [0]]
    assert read(ROWS.replace(",", "\t"), name="log.tsv").n_items == 3


def test_filters_are_applied_and_counted(read):
    data = read(ROWS, "user", "item", "rating", min_rating=4, min_user=2)
    assert data.user_ids == [7, 8] and lists_of(data.histories()) == [[2, 0], [1, 0]]
    assert data.filtered == {
        "ratings below 4": 2,
        "users with fewer than 2 items": 0,
        "interactions of those users": 0,
    }
    assert read(ROWS, "user", "item", min_user=2).filtered["users with fewer than 2 items"] == 1


def test_read_parquet_and_dates(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    from sae_kernels.data.read import read_interactions

    dates = pd.to_datetime(["2020-02-01", "2020-01-01", "2021-01-01"])
    frame = pd.DataFrame({"u": [1, 1, 2], "i": [5, 6, 5], "t": dates})
    frame.to_parquet(tmp_path / "log.parquet")
    data = read_interactions(tmp_path / "log.parquet", "u", "i", time_col="t")
    assert lists_of(data.histories()) == [[1, 0], [0]]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="broken.parquet: not a readable table"):
        read_interactions(tmp_path / "broken.parquet", "u", "i")


def test_dates_in_texts(read):
    for first, second, third in (
        ("2020-02-01", "2020-01-01", "2021-01-01"),
        ("2020-01-01T10:00:01", "2020-01-01 10:00", "2020-01-02"),
    ):
        data = read(f"u,i,t\n1,5,{first}\n1,6,{second}\n2,5,{third}\n", "u", "i", time_col="t")
        assert lists_of(data.histories()) == [[1, 0], [0]]
    with pytest.raises(ValueError, match="column 't', row 2: 'soon', expected a number, or a date such as 2020-01-31"):
        read("u,i,t\n1,5,2020-01-01\n1,6,soon\n", "u", "i", time_col="t")


def test_dates_without_a_time_in_parquet(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    from sae_kernels.data.read import read_interactions

    frame = pd.DataFrame({"u": [1, 1], "i": [5, 6], "t": [date(2020, 1, 2), date(2020, 1, 1)]})
    frame.to_parquet(tmp_path / "log.parquet")
    assert lists_of(read_interactions(tmp_path / "log.parquet", "u", "i", time_col="t").histories()) == [[1, 0]]


def test_ids_stay_what_they_are(read):
    """Texts as they stand, whatever they look like; of numbers those that 64 bits do not hold are told."""
    text = "u,i\n007,1\n7,1\n1.10,1\n1.1,1\nNA,1\nnull,1\n"
    assert read(text, "u", "i", ids="text").user_ids == ["007", "1.1", "1.10", "7", "NA", "null"]
    assert read("u,i\nNA,1\nnull,2\n", "u", "i").user_ids == ["NA", "null"]
    largest = 2**63 - 1
    assert read(f"u,i\n{largest},1\n{largest - 1},1\n{-(2**63)},2\n", "u", "i").user_ids == [
        -(2**63),
        largest - 1,
        largest,
    ]
    for number in (2**63, 2**64 - 1, 12345678901234567890123):
        with pytest.raises(
            ValueError, match="column 'u', row 1: .*, expected a numeric id .a whole number of 64 bits."
        ):
            read(f"u,i\n{number},1\n{number - 1},2\n", "u", "i", ids="int")
        assert read(f"u,i\n{number},1\n{number - 1},2\n", "u", "i", ids="text").n_users == 2


def test_text_ids(read):
    text = "user,item\nann,x1\nbob,x2\nann,x2\n"
    assert read(text).user_ids == ["ann", "bob"] and read(text).item_ids == ["x1", "x2"]
    assert read(ids="text").user_ids == ["7", "8", "9"]
    with pytest.raises(ValueError, match="column 'user', row 1: 'ann', expected a numeric id"):
        read(text, ids="int")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "log.csv: the file is empty"),
        ("user,item,rating,when\n", "log.csv: column 'user' has no rows"),
        (ROWS.replace("item", "thing", 1), "column 'item' is missing; the file has user, thing, rating, when"),
        (ROWS.replace("9,10", "x9,10"), "log.csv: column 'user', row 3: 'x9', expected a numeric id"),
        (ROWS.replace("9,10", "1.5,10"), "log.csv: column 'user', row 3: 1.5, expected a numeric id"),
        (ROWS.replace("9,10", ",10"), "log.csv: column 'user', row 3: an empty value, expected an id"),
        (ROWS.replace("9,10", "9,"), "log.csv: column 'item', row 3: an empty value, expected an id"),
        (ROWS.replace("3.5", "nan"), "log.csv: column 'rating', row 5: an empty value, expected a number"),
        (ROWS.replace("3.5", "good"), "log.csv: column 'rating', row 5: 'good', expected a number"),
        (ROWS.replace("3.5", "inf"), "log.csv: column 'rating', row 5: inf, expected a number"),
        (ROWS.replace(",60", ",soon"), "log.csv: column 'when', row 5: 'soon', expected a number"),
        (ROWS + "8,20,4,1\n", "column 'item', row 7: user 8 has item 20 already in row 4"),
        ('user,item\n1,"2\n', "log.csv: not a readable table"),
    ],
)
def test_bad_files_get_one_line_with_file_column_and_row(read, text, match):
    with pytest.raises(ValueError, match=match) as caught:
        read(text, "user", "item", "rating", "when")
    assert "\n" not in str(caught.value)


def test_repeated_pairs_can_be_kept_once_and_are_counted(read):
    text = ROWS + "8,20,1,99\n"
    for which, rows in (("first", 4), ("last", 3)):
        data = read(text, "user", "item", "rating", min_rating=4, duplicates=which)
        assert data.filtered["repeated pairs"] == 1 and len(data) == rows


def test_bad_arguments(read, tmp_path):
    with pytest.raises(ValueError, match="min_rating needs rating_col"):
        read(ROWS, "user", "item", min_rating=4)
    with pytest.raises(ValueError, match="ids must be one of auto, int, text, got 'number'"):
        read(ids="number")
    with pytest.raises(ValueError, match="no interaction is left; ratings below 9: 6 removed"):
        read(ROWS, "user", "item", "rating", min_rating=9)
    with pytest.raises(ValueError, match="must end in .parquet, .csv or .tsv"):
        read(name="log.xml")
    from sae_kernels.data.read import read_interactions

    with pytest.raises(FileNotFoundError, match="nowhere.csv: no such file"):
        read_interactions(tmp_path / "nowhere.csv", "user", "item")


def test_unknown_layout_lists_what_was_looked_for(tmp_path):
    pytest.importorskip("pandas")
    from sae_kernels.data.datasets import load

    with pytest.raises(ValueError, match=r"goodbooks10k \(ratings.parquet, books.parquet, .*ml1m .*ml_latest_small"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("layout", "n_users", "n_items", "rows", "n_concepts", "title", "concept"),
    [
        ("goodbooks10k", 28969, 9999, 596169, 108, "The Hunger Games (The Hunger Games, #1)", "dystopia"),
        ("ml1m", 6040, 3416, 999611, 18, "Raiders of the Lost Ark (1981)", "Adventure"),
        ("ml_latest_small", 603, 6298, 48562, 19, "Toy Story (1995)", "Animation"),
    ],
)
def test_real_layouts(layout, n_users, n_items, rows, n_concepts, title, concept):
    if not SHARED.is_dir():
        pytest.skip("the data sets are not here")
    pytest.importorskip("pyarrow")
    from sae_kernels.data.datasets import load

    data = load(SHARED / layout)
    assert (data.name, data.n_users, data.n_items, len(data)) == (layout, n_users, n_items, rows)
    assert len(data.concepts.names) == n_concepts and int(data.concepts.labels.sum(0).min()) >= 1
    item = data.item_titles.index(title)
    assert data.concepts.labels[item, data.concepts.names.index(concept)]
    histories = data.histories()
    assert int(histories.lengths.min()) >= 5
    if layout == "goodbooks10k":
        assert data.filtered["ratings below 4"] == 330823 and rows + 330823 + 52486 == 979478
    else:
        assert data.order is not None
    if layout == "ml1m":
        assert data.item_ids == list(range(1, 3417)) and (histories[0][:3] + 1).tolist() == [1, 2, 3]
        assert math.isclose(float(histories.lengths.float().mean()), 999611 / 6040, rel_tol=1e-5)
