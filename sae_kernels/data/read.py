"""Reads interactions from Parquet or CSV; bad data ends in one line that names file, column and first bad row."""

from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .interactions import Interactions

if TYPE_CHECKING:
    import pandas

DUPLICATES = ("error", "first", "last")
ID_KINDS = ("auto", "int", "text")
ABSENT = ("", "NA", "N/A", "NaN", "nan", "<NA>", "null", "NULL", "None")  # numbers that are none; of texts "" alone


def read_interactions(
    path: str | Path,
    user_col: str,
    item_col: str,
    rating_col: str | None = None,
    time_col: str | None = None,
    *,
    min_rating: float | None = None,
    min_user: int = 1,
    ids: str = "auto",
    duplicates: str = "error",
) -> Interactions:
    """Interactions of a .parquet, .csv or .tsv file (.csv.gz too), one row per user and item.

    min_rating keeps the rows with at least that rating; then users with fewer than min_user rows are left out. What
    both removed stands in .filtered. time_col (numbers, or ISO dates) orders the rows of a user.

    ids: "int": user and item ids must be whole numbers of 64 bits; "text": they are taken as they stand; "auto": a
    column is text where its first value is no whole number, else all of it must be such numbers. duplicates: a pair of
    user and item that comes twice is an error, or its first or last row is kept and the others are counted in
    .filtered.

    Raises FileNotFoundError, TypeError or ValueError; a missing column, an empty file, an empty or non-numeric id, a
    NaN or non-numeric rating or time and a repeated pair each name file, column and first bad row (rows count from 1,
    without the header). Needs pandas (and pyarrow for Parquet).
    """
    path = Path(path)
    for name, value, known in (("ids", ids, ID_KINDS), ("duplicates", duplicates, DUPLICATES)):
        if value not in known:
            raise ValueError(f"read_interactions: {name} must be one of {', '.join(known)}, got {value!r}")
    if min_rating is not None and rating_col is None:
        raise ValueError("read_interactions: min_rating needs rating_col")
    columns = [c for c in (user_col, item_col, rating_col, time_col) if c is not None]
    texts = (user_col, item_col)
    frame = read_table(path, columns, texts, as_they_stand=ids == "text")
    for column in (user_col, item_col):
        frame[column] = _ids(path, frame[column], ids)
    if rating_col is not None:
        frame[rating_col] = _numbers(path, frame[rating_col])
    if time_col is not None:
        frame[time_col] = _times(path, frame[time_col])
    filtered: dict[str, int] = {}
    frame = _without_duplicates(path, frame, user_col, item_col, duplicates, filtered)
    if min_rating is not None:
        low = frame[rating_col] < min_rating
        filtered[f"ratings below {min_rating:g}"] = int(low.sum())
        frame = frame[~low]
    if min_user > 1:
        few = frame.groupby(user_col)[item_col].transform("size") < min_user
        filtered[f"users with fewer than {min_user} items"] = int(frame.loc[few, user_col].nunique())
        filtered["interactions of those users"] = int(few.sum())
        frame = frame[~few]
    if frame.empty:
        removed = "; ".join(f"{what}: {count} removed" for what, count in filtered.items())
        raise ValueError(f"{path}: no interaction is left; {removed}")
    return _coded(path.stem, frame, user_col, item_col, time_col, filtered)


def pandas_module():
    """pandas, or an ImportError that says how to install it."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("reading data files needs pandas: pip install 'sae-kernels[data]'") from error
    return pandas


def read_table(
    path: Path, columns: list[str], texts: Sequence[str] = (), as_they_stand: bool = False
) -> "pandas.DataFrame":
    """The columns of a Parquet, CSV or TSV file. Raises FileNotFoundError, or ValueError naming file and column.

    texts: columns in which "NA", "null" and the like are values too; as_they_stand: "007" also.
    """
    pd = pandas_module()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kinds = [s.lower() for s in path.suffixes]
    if not {".parquet", ".csv", ".tsv"} & set(kinds):
        raise ValueError(f"{path}: the name must end in .parquet, .csv or .tsv")
    try:
        if ".parquet" in kinds:
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(
                path,
                sep="\t" if ".tsv" in kinds else ",",
                low_memory=False,
                dtype=dict.fromkeys(texts, str) if as_they_stand else None,
                keep_default_na=False,
                na_values={name: [""] if name in texts else list(ABSENT) for name in columns},
            )
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: the file is empty") from None
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'sae-kernels[data]'") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a readable table: {str(error).strip().splitlines()[0]}") from None
    for column in columns:
        if column not in frame.columns:
            raise ValueError(f"{path}: column {column!r} is missing; the file has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise ValueError(f"{path}: column {columns[0]!r} has no rows")
    return frame[columns].reset_index(drop=True)


def _fail(path: Path, column: "pandas.Series", bad: "pandas.Series", expected: str) -> None:
    """Raises for the first row where bad is True."""
    if bad.any():
        row = int(bad.to_numpy().argmax())
        value = column.iloc[row]
        number = isinstance(value, Real)
        shown = "an empty value" if pandas_module().isna(value) else repr(float(value) if number else value)
        raise ValueError(f"{path}: column {column.name!r}, row {row + 1}: {shown}, expected {expected}")


def _ids(path: Path, column: "pandas.Series", kind: str) -> "pandas.Series":
    """Ids as int64, or as text."""
    pd = pandas_module()
    _fail(path, column, column.isna(), "an id")
    numbers = pd.to_numeric(column, errors="coerce")
    # a float beyond 2**53 stands for several whole numbers
    exact = numbers.abs() <= 2**53 if numbers.dtype.kind == "f" else numbers <= 2**63 - 1
    whole = (numbers.notna() & (numbers % 1 == 0) & exact).astype(bool)
    if kind == "text" or (kind == "auto" and not whole.iloc[0]):
        return column.astype(str)
    _fail(path, column, ~whole, "a numeric id (a whole number of 64 bits); ids='text' takes ids as texts")
    return numbers.astype("int64")


def _times(path: Path, column: "pandas.Series") -> "pandas.Series":
    """Finite numbers, or dates as whole numbers."""
    pd = pandas_module()
    _fail(path, column, column.isna(), "a time")
    if not pd.api.types.is_datetime64_any_dtype(column):
        if pd.to_numeric(column.iloc[:1], errors="coerce").notna().all():
            return _numbers(path, column)
        dates = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True)
        _fail(path, column, dates.isna(), "a number, or a date such as 2020-01-31 or 2020-01-31T12:00:00")
        column = dates
    return column.astype("int64")


def _numbers(path: Path, column: "pandas.Series") -> "pandas.Series":
    """Finite numbers."""
    pd = pandas_module()
    _fail(path, column, column.isna(), "a number")
    numbers = pd.to_numeric(column, errors="coerce")
    _fail(path, column, numbers.isna() | (numbers.abs() == float("inf")), "a number")
    return numbers


def _without_duplicates(path, frame, user_col, item_col, duplicates, filtered) -> "pandas.DataFrame":
    pair = [user_col, item_col]
    again = frame.duplicated(pair, keep="last" if duplicates == "last" else "first")
    if not again.any():
        return frame
    if duplicates == "error":
        row = int(again.to_numpy().argmax())
        user, item = frame[user_col].iloc[row], frame[item_col].iloc[row]
        first = int(((frame[user_col] == user) & (frame[item_col] == item)).to_numpy().argmax())
        raise ValueError(
            f"{path}: column {item_col!r}, row {row + 1}: user {user} has item {item} already in row {first + 1}; "
            "duplicates='first' or 'last' keeps one of them"
        )
    filtered["repeated pairs"] = int(again.sum())
    return frame[~again]


def _coded(name, frame, user_col, item_col, time_col, filtered) -> Interactions:
    pd = pandas_module()
    users, user_ids = pd.factorize(frame[user_col], sort=True)
    items, item_ids = pd.factorize(frame[item_col], sort=True)
    order = None
    if time_col is not None:
        rank = frame[time_col].rank(method="dense").to_numpy(dtype="int64", copy=True)
        order = torch.from_numpy(rank)
    return Interactions(
        name=name,
        users=torch.from_numpy(users.astype("int64")),
        items=torch.from_numpy(items.astype("int64")),
        user_ids=user_ids.tolist(),
        item_ids=item_ids.tolist(),
        order=order,
        filtered=filtered,
    )
