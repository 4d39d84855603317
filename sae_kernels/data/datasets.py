"""Data sets by their folder: goodbooks10k, ml1m and ml_latest_small, with titles and named concepts."""

from collections.abc import Iterable
from pathlib import Path

import torch

from .interactions import Concepts, Interactions
from .read import read_interactions, read_table

# layout -> the files that tell it; the first that fits wins
LAYOUTS = {
    "goodbooks10k": ("ratings.parquet", "books.parquet", "book_concepts.parquet"),
    "ml1m": ("sasrec_sequences.parquet", "movies.parquet"),
    "ml_latest_small": ("ratings.parquet", "movies.parquet"),
}
NO_GENRES = "(no genres listed)"


def load(folder: str | Path) -> Interactions:
    """The data set in `folder`, its layout recognised by its files.

    goodbooks10k and ml_latest_small: ratings of 4 and more, users with 5 and more of them; ml1m: the SASRec benchmark's
    sequences (item code + 1 is its item id). Concepts: shelves of goodbooks10k with label 1, genres of the films.
    Raises FileNotFoundError for no such folder and ValueError for an unknown layout, listing what was looked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for layout, files in LAYOUTS.items():
        if all((folder / name).is_file() for name in files):
            data = _READERS[layout](folder)
            data.name = layout
            return data
    wanted = "; ".join(f"{layout} ({', '.join(files)})" for layout, files in LAYOUTS.items())
    raise ValueError(f"{folder}: no known layout; looked for {wanted}")


def _goodbooks10k(folder: Path) -> Interactions:
    data = read_interactions(folder / "ratings.parquet", "user_id", "book_id", "rating", min_rating=4, min_user=5)
    books = read_table(folder / "books.parquet", ["book_id", "title"])
    data.item_titles = _titles(data, books["book_id"], books["title"])
    concepts = read_table(folder / "book_concepts.parquet", ["book_id", "concept", "label"])
    concepts = concepts[concepts["label"] == 1]
    data.concepts = _concepts(data, zip(concepts["book_id"].tolist(), concepts["concept"].tolist(), strict=True))
    return data


def _ml1m(folder: Path) -> Interactions:
    data = read_interactions(folder / "sasrec_sequences.parquet", "sas_user", "sas_item")
    # the rows of a user stand in time order in the file
    data.order = torch.arange(len(data))
    movies = read_table(folder / "movies.parquet", ["sas_item", "title", "genres"]).dropna(subset=["sas_item"])
    data.item_titles = _titles(data, movies["sas_item"], movies["title"])
    data.concepts = _concepts(data, _genres(movies["sas_item"], movies["genres"]))
    return data


def _ml_latest_small(folder: Path) -> Interactions:
    data = read_interactions(
        folder / "ratings.parquet", "userId", "movieId", "rating", "timestamp", min_rating=4, min_user=5
    )
    movies = read_table(folder / "movies.parquet", ["movieId", "title", "genres"])
    data.item_titles = _titles(data, movies["movieId"], movies["title"])
    data.concepts = _concepts(data, _genres(movies["movieId"], movies["genres"]))
    return data


_READERS = {"goodbooks10k": _goodbooks10k, "ml1m": _ml1m, "ml_latest_small": _ml_latest_small}


def _titles(data: Interactions, ids, titles) -> list[str]:
    """The title of every item; an item without one is called by its id."""
    known = dict(zip(ids.astype("int64").tolist(), titles.tolist(), strict=True))
    return [known.get(item, f"item {item}") for item in data.item_ids]


def _genres(ids, genres) -> Iterable[tuple[int, str]]:
    for item, names in zip(ids.astype("int64").tolist(), genres.tolist(), strict=True):
        yield from ((item, name) for name in names.split("|") if name and name != NO_GENRES)


def _concepts(data: Interactions, pairs: Iterable[tuple[int, str]]) -> Concepts:
    """Labels of the items that occur in the interactions; a concept that no such item has is left out and counted."""
    code = {item: i for i, item in enumerate(data.item_ids)}
    pairs = list(pairs)
    present = [(code[item], name) for item, name in pairs if item in code]
    names = sorted({name for _, name in present})
    column = {name: c for c, name in enumerate(names)}
    labels = torch.zeros(data.n_items, len(names), dtype=torch.bool)
    if present:
        rows, columns = torch.tensor([(row, column[name]) for row, name in present]).unbind(1)
        labels[rows, columns] = True
    unused = len({name for _, name in pairs}) - len(names)
    if unused:
        data.filtered["concepts without an item"] = unused
    return Concepts(names, labels)
