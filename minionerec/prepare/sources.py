"""Reads raw interactions and items from CSV, TSV, JSON lines or Parquet, gzipped or not, in batches.

The format is recognized by the first bytes of a file, not by its name. pyarrow reads CSV, TSV and Parquet. JSON lines
are read with the standard library's `json`: pyarrow refuses a column whose type changes from line to line, as in the
published metadata, and pandas turns integer ids into floats if one is missing.
"""

import gzip
import html
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from minionerec.data.files import FileProblems, is_text, present, shorten
from minionerec.errors import InputError
from minionerec.prepare.cleaning import INTERACTION, Spool

BATCH_ROWS = 50_000
BLOCK_BYTES = 16 << 20  # of delimited text; a row must fit into a block
HEAD_LINES = 1000  # of a file of JSON lines that are searched for keys
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException)

# Names that a column may have, in lower case without spaces, underscores and RecBole's types (`user_id:token`). Those
# of the published Amazon Reviews of 2018 and 2023 are included.
COLUMNS = {
    "user": ("user", "userid", "uid", "reviewerid", "customer", "customerid", "visitorid"),
    "item": (
        "item",
        "itemid",
        "iid",
        "product",
        "productid",
        "asin",
        "parentasin",
        "sku",
        "article",
        "articleid",
        "movieid",
    ),
    "time": ("time", "timestamp", "ts", "date", "datetime", "unixtime", "unixreviewtime", "eventtime", "createdat"),
    "title": ("title", "name", "itemtitle", "itemname", "producttitle", "productname"),
    "description": ("description", "desc", "itemdescription", "productdescription"),
    "features": ("feature", "features"),  # stand in for an empty description
    "brand": ("brand", "store"),
    "categories": ("category", "categories"),
}
OPTIONAL = ("description", "features", "brand", "categories")
LATEST = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000


@dataclass(frozen=True)
class Source:
    """A file of rows.

    Attributes:
        path: of the file.
        flag: the name of the flag that gave the path, for messages.
        kind: parquet, json or delimited.
        delimiter: of delimited text.
        gzipped: whether the file is gzipped.
        names: of its columns.
    """

    path: str
    flag: str
    kind: str
    delimiter: str
    gzipped: bool
    names: list[str]

    def error(self, problem: object) -> InputError:
        """An InputError about this file, in one line."""
        line = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        return InputError(f"--{self.flag} {self.path}: {line[:300]}")

    def open(self) -> io.BufferedIOBase:
        """The file, opened for reading bytes."""
        return gzip.open(self.path) if self.gzipped else open(self.path, "rb")

    def batches(self, columns: Sequence[str | None]) -> Iterator[tuple[int, list[list]]]:
        """Batches of rows: the number of the first row, counted from 1, and the values of each column; a column that is
        None has None in all rows.

        Raises InputError if the file cannot be read to its end, or has no rows.
        """
        read = {"parquet": self._parquet, "json": self._json, "delimited": self._delimited}[self.kind]
        wanted = list(dict.fromkeys(name for name in columns if name is not None))
        row = 1
        with self.open() as file:
            try:
                for size, values in read(file, wanted):
                    yield row, [values[name] if name is not None else [None] * size for name in columns]
                    row += size
            except UNREADABLE as error:
                raise self.error(f"cannot be read after row {row - 1}: {error}") from None
        if row == 1:
            raise self.error("has no rows")

    def _parquet(self, file: io.BufferedIOBase, wanted: list[str]) -> Iterator[tuple[int, dict[str, list]]]:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(BATCH_ROWS, columns=wanted):
            yield batch.num_rows, {name: _values(batch.column(name)) for name in wanted}

    def _delimited(self, file: io.BufferedIOBase, wanted: list[str]) -> Iterator[tuple[int, dict[str, list]]]:
        options = pyarrow.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
        for batch in _open_delimited(file, self.delimiter, options):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                yield part.num_rows, {name: part.column(name).to_pylist() for name in wanted}

    def _json(self, file: io.BufferedIOBase, wanted: list[str]) -> Iterator[tuple[int, dict[str, list]]]:
        problems = FileProblems(self.path)
        values: dict[str, list] = {name: [] for name in wanted}
        size = 0
        for row in _json_objects(file, problems):
            for name in wanted:
                values[name].append(row.get(name))
            size += 1
            if size == BATCH_ROWS:
                yield size, values
                values, size = {name: [] for name in wanted}, 0
        problems.check()
        if size:
            yield size, values


def _open_delimited(
    file: io.BufferedIOBase, delimiter: str, options: pyarrow.csv.ConvertOptions | None = None
) -> pyarrow.csv.CSVStreamingReader:
    return pyarrow.csv.open_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=options,
    )


def _values(column: pa.Array) -> list:
    """A Parquet column as Python objects; times are cut to microseconds, the precision of datetime."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return column.to_pylist()


def _json_objects(file: io.BufferedIOBase, problems: FileProblems) -> Iterator[dict]:
    """The objects of a file of JSON lines; bad lines go to `problems`."""
    for number, line in enumerate(io.TextIOWrapper(cast(IO[bytes], file), "utf-8-sig", newline="\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(f", line {number}", f"is not JSON: {str(error)[:200]}")
            continue
        if isinstance(row, dict):
            yield row
        else:
            problems.add(f", line {number}", f"expected one JSON object per line, found {shorten(row)}")


def open_source(path: str, flag: str) -> Source:
    """Finds out the format and the columns of a file. Raises InputError if it does not exist or cannot be read."""
    if not path:
        raise InputError(f"--{flag} is missing; give a CSV, TSV, JSON lines or Parquet file, gzipped or not")
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        source = Source(path, flag, "delimited", ",", gzipped, [])
        with source.open() as file:
            head = file.read(1 << 16)
    except FileNotFoundError:
        raise InputError(f"--{flag} {path}: no such file") from None
    except UNREADABLE as error:
        raise InputError(f"--{flag} {path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not head.strip():
        raise source.error("is empty")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    kind = "parquet" if head.startswith(b"PAR1") else "json" if text[:1] in (b"{", b"[") else "delimited"
    if kind != "parquet" and b"\0" in head:
        raise source.error("is neither Parquet nor UTF-8 text")
    delimiter = "\t" if b"\t" in text.splitlines()[0] else ","
    source = Source(path, flag, kind, delimiter, gzipped, [])
    try:
        with source.open() as file:
            names = _names(source, file)
    except UNREADABLE as error:
        raise source.error(f"cannot be read: {error}") from None
    return Source(path, flag, kind, delimiter, gzipped, names)


def _names(source: Source, file: io.BufferedIOBase) -> list[str]:
    if source.kind == "parquet":
        return pyarrow.parquet.ParquetFile(file).schema_arrow.names
    if source.kind == "delimited":
        return _open_delimited(file, source.delimiter).schema.names
    names: dict[str, None] = {}
    problems = FileProblems(source.path)
    for number, row in enumerate(_json_objects(file, problems), 1):
        names.update(dict.fromkeys(row))
        if number == HEAD_LINES:
            break
    if not names:
        problems.check()
        raise source.error("has no rows")
    return list(names)


def find_columns(
    source: Source, roles: Sequence[str], given: dict[str, str], other: Sequence[str] = ()
) -> list[str | None]:
    """The column of each role; None for an optional role without a column.

    Args:
        roles: keys of COLUMNS.
        given: role -> the column name that a flag gave, or "" to look for the names in COLUMNS.
        other: the columns of the other file. `--item_column` may name a column that only the other file has.

    Raises InputError, one line per role, if a column is missing or several are possible.
    """
    problems = []
    listed = ", ".join(shorten(name, 40) for name in source.names[:30]) + (", …" if len(source.names) > 30 else "")
    found: list[str | None] = []
    for role in roles:
        name, flag = given.get(role, ""), f"--{role}_column"
        candidates = [name] if name in source.names else []
        if not name or (not candidates and name in other):
            candidates = [known for known in dict.fromkeys(source.names) if _plain(known) in COLUMNS[role]]
            if "parent_asin" in candidates and "asin" in candidates:
                candidates.remove("asin")  # of a variant of the item; the metadata of 2023 uses parent_asin
            if not candidates and role == "item" and source.flag != "interactions":
                candidates = [known for known in dict.fromkeys(source.names) if _plain(known) == "id"]
        found.append(candidates[0] if candidates else None)
        place = f"--{source.flag} {source.path}"
        if len(candidates) > 1 and role not in ("features", "brand", "categories"):
            problems.append(f"{place}: {' and '.join(candidates)} could each be the {role}; name one with {flag}")
        elif candidates and source.names.count(candidates[0]) > 1:
            problems.append(f"{place}: column {candidates[0]} occurs {source.names.count(candidates[0])} times")
        elif not candidates and name:
            problems.append(f"{place}: {flag} {name} is not a column; the file has {listed}")
        elif not candidates and role not in OPTIONAL:
            problems.append(
                f"{place}: no column is recognized as the {role}; name it with {flag}; the file has {listed}"
            )
    if problems:
        raise InputError(problems)
    return found


def _plain(name: str) -> str:
    return re.sub("[ _]", "", re.sub(r":(token|float)(_seq)?$", "", name.lower()))


def identifier(value: object) -> str | None:
    """A user or item id as text, or None if the value is not an id. A whole float is an integer that lost its type."""
    if isinstance(value, str):
        value = present(value)
        return value if value and is_text(value) else None
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int) else None


def microseconds(value: object) -> int | None:
    """A time in microseconds since 1970 (UTC), or None if the value is not a time between 1970 and 2100.

    Numbers below 1e11 are seconds, below 1e14 milliseconds, below 1e17 microseconds, above that nanoseconds, so the
    order of the values is kept. Text is such a number or an ISO 8601 date, in UTC unless it names another zone.
    """
    if isinstance(value, str):
        text = value
        try:
            value = float(text)
        except ValueError:
            try:
                value = datetime.fromisoformat(text.strip())
            except ValueError:
                return None
    if isinstance(value, date):
        when = value if isinstance(value, datetime) else datetime.combine(value, time())
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        moment = round(when.timestamp() * 1e6)
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e20:
        return None
    else:
        scale = 1e6 if value < 1e11 else 1e3 if value < 1e14 else 1 if value < 1e17 else 1e-3
        moment = round(value * scale)
    return moment if 0 <= moment < LATEST else None


@dataclass
class RawInteractions:
    """What was read from an interactions file.

    Attributes:
        num_rows: rows of the file.
        earliest, latest: of their times, in microseconds.
        users, items: id -> number, for those inside the time window, in the order of their first row.
    """

    num_rows: int
    earliest: int
    latest: int
    users: dict[str, int]
    items: dict[str, int]


def read_interactions(
    source: Source, columns: Sequence[str | None], window: tuple[int, int], spool: Spool
) -> RawInteractions:
    """Reads the interactions inside a time window into `spool`, in parts by user.

    Args:
        columns: of user, item and time.
        window: the first microsecond inside the window, and the first after it.

    Memory grows with users and items, not with rows. Raises InputError naming the first bad cells.
    """
    problems = FileProblems(source.path)
    read = RawInteractions(0, LATEST, 0, {}, {})
    users, items = read.users, read.items
    for first, (user_cells, item_cells, time_cells) in source.batches(columns):
        read.num_rows += len(time_cells)
        times: list[Any] = [microseconds(cell) for cell in time_cells]
        user_ids: list[Any] = list(map(identifier, user_cells))
        item_ids: list[Any] = list(map(identifier, item_cells))
        if None in times or None in user_ids or None in item_ids:
            for name, cells, values, expected in (
                (columns[0], user_cells, user_ids, "expected a user id, text or a whole number"),
                (columns[1], item_cells, item_ids, "expected an item id, text or a whole number"),
                (columns[2], time_cells, times, "expected a date or seconds since 1970, from 1970 to 2099"),
            ):
                for place, (cell, value) in enumerate(zip(cells, values, strict=True)):
                    if value is None:
                        problems.add(f", row {first + place}, {name}", f"{expected}, found {shorten(cell)}")
            continue
        batch: np.ndarray = np.zeros(len(times), INTERACTION)
        batch["time"] = times
        read.earliest, read.latest = min(read.earliest, min(times)), max(read.latest, max(times))
        inside = (batch["time"] >= window[0]) & (batch["time"] < window[1])
        batch = batch[inside]
        kept = np.flatnonzero(inside).tolist()
        batch["user"] = [users.setdefault(user_ids[i], len(users)) for i in kept]
        batch["item"] = [items.setdefault(item_ids[i], len(items)) for i in kept]
        spool.append(batch["user"] % spool.parts, batch)
    problems.check()
    return read


@dataclass(slots=True)
class RawItem:
    """An item of an items file, with cleaned texts. `row` counts from 0."""

    original_id: str
    row: int
    title: str
    description: str
    brand: str
    categories: str


def read_items(
    source: Source, columns: Sequence[str | None], wanted: Callable[[str], bool]
) -> tuple[list[RawItem], dict[str, int]]:
    """The items with a title whose id is `wanted`, in the order of the file. If an id occurs again, the first counts.

    Args:
        columns: of item, title, description, features, brand and categories; all but the first two may be None.

    Returns the items, the number of rows, and the numbers of those that were skipped because the id is not wanted or
    repeated, or the title is missing. Raises InputError naming the first bad cells.
    """
    problems = FileProblems(source.path)
    counts = {"rows": 0, "not_wanted": 0, "repeated": 0, "untitled": 0}
    found: dict[str, RawItem] = {}
    for first, cells in source.batches(columns):
        for place, (item_cell, title, description, features, brand, categories) in enumerate(zip(*cells, strict=True)):
            row = first + place
            counts["rows"] += 1
            item = identifier(item_cell)
            if item is None:
                expected = "expected an item id, text or a whole number"
                problems.add(f", row {row}, {columns[0]}", f"{expected}, found {shorten(item_cell)}")
                continue
            title_text, text = text_of(title), text_of(description)
            for name, cell, read in ((columns[1], title, title_text), (columns[2], description, text)):
                if read is None:
                    problems.add(f", row {row}, {name}", f"expected text or a list of texts, found {shorten(cell)}")
            if title_text is None or text is None:
                continue
            if not wanted(item):
                counts["not_wanted"] += 1
            elif item in found:
                counts["repeated"] += 1
            elif not title_text:
                counts["untitled"] += 1
            else:
                text = text or text_of(features) or ""
                found[item] = RawItem(
                    item, row - 1, title_text, text, text_of(brand) or "", text_of(categories, separator=", ") or ""
                )
    problems.check()
    return list(found.values()), counts


_TAG = re.compile(r"<(?:/?[a-zA-Z]|[!|])[^<>]*>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def text_of(value: object, depth: int = 2, separator: str = " ") -> str | None:
    """A cell as one line of text without markup, empty if it stands for a missing one; None if it is neither text nor a
    list of texts.

    Markup is what stands between < and > and looks like a tag, a SID or a control token: other programs that read the
    files may take `<a_1>` and `<|im_end|>` for tokens. Our own take all that is left as text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (list, tuple)) and depth:
        parts = [text_of(part, depth - 1, separator) for part in value]
        return None if None in parts else separator.join(part for part in parts if part)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return None
    if "&" in value:
        value = html.unescape(value)
    if "<" in value:
        value = _TAG.sub(" ", value)
    if not value.isascii():  # an escape in JSON can stand for half a surrogate pair
        value = value.encode("utf-8", "replace").decode("utf-8")
    return present(" ".join(_CONTROL.sub(" ", value).split()))
