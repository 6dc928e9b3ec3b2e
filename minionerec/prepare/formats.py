"""Reads the rows of a raw file: delimited text, JSON lines, a JSON array, lines of Python literals, or Parquet,
compressed or not. `recognize.open_source` finds out which.

Every row is given out or refused with its number: none is lost.
"""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet

from minionerec.data.files import MOST_PROBLEMS
from minionerec.errors import InputError
from minionerec.prepare.cells import whole
from minionerec.prepare.delimited import Record, StrayQuote, blocks, read_records
from minionerec.prepare.json_rows import read_objects

BATCH_ROWS = 10_000
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, UnicodeError, pa.ArrowException)
OPENERS = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}


class RefusedRows:
    """The rows of a file that cannot be used: the first few, and how many they are."""

    def __init__(self, path: str, skip: bool = False):
        """`skip`: whether they are left out; otherwise `check` raises."""
        self.path, self.skip = path, skip
        self._first: list[tuple[int, int, str]] = []  # row, number of the problem, line
        self.count, self._last, self._listed = 0, 0, 0

    def add(self, row: int, line: int | None, problem: str, column: str | None = None) -> None:
        """Refuses a row, counted from 1, which begins in a line of the file. A row may be refused several times."""
        if row != self._last:
            self.count, self._last = self.count + 1, row
        self._listed += 1
        if len(self._first) == MOST_PROBLEMS and row >= self._first[-1][0]:
            return
        if column is None:
            text = f"{self.path}, {f'row {row}' if line is None else f'line {line}'}: {problem}"
        else:
            place = f" (line {line})" if line not in (None, row) else ""
            text = f"{self.path}, row {row}, {column}: {problem}{place}"
        insort(self._first, (row, self._listed, text))
        del self._first[MOST_PROBLEMS:]

    @property
    def lines(self) -> list[str]:
        """The first few problems."""
        return [text for *_, text in self._first]

    def check(self, num_rows: int) -> None:
        """Raises InputError if rows were refused and are not to be skipped, or none of the `num_rows` is left."""
        if not self.count or (self.skip and self.count < num_rows):
            return
        lines = self.lines
        if self._listed > MOST_PROBLEMS:
            lines.append(f"{self.path}: {self._listed - MOST_PROBLEMS} more problems like these")
        if self.count < num_rows:
            lines[-1] += f"; --skip_bad_rows True leaves such rows out, {self.count:,} of {num_rows:,}"
        raise InputError(lines)


class ReadAgain(Exception):
    """The file turned out to be of another form than its beginning; what was read of it does not count."""


@dataclass
class Source:
    """A file of rows.

    Attributes:
        path: of the file.
        flag: the name of the flag that gave the path, for messages.
        kind: parquet, json (lines), array (of JSON) or delimited.
        compression: gzip, xz, bzip2, zip or "".
        encoding: of text.
        delimiter: of delimited text.
        header: whether the first line has the names of the columns.
        quoted: whether a field of delimited text may stand in quotes.
        names: of its columns; keys of JSON that occur later in the file are added when they are met.
        empty: the columns without a value in the first rows.
        notes: lines about how it was read.
        num_rows: those that were read so far.
    """

    path: str
    flag: str
    kind: str = "delimited"
    compression: str = ""
    encoding: str = "utf-8"
    delimiter: str = ","
    header: bool = True
    quoted: bool = True
    names: list[str] = field(default_factory=list)
    empty: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    num_rows: int = 0

    def error(self, problem: object) -> InputError:
        """An InputError about this file, in one line."""
        line = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        return InputError(f"--{self.flag} {self.path}: {line[:300]}")

    def open(self) -> IO[bytes]:
        """The file, opened for reading bytes. Raises InputError for an archive of several files."""
        if self.compression == "zip":
            archive = zipfile.ZipFile(self.path)
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            if "xl/workbook.xml" in names:
                raise self.error("is an Excel workbook; save its sheet as CSV")
            if len(names) != 1:
                raise self.error(f"is an archive of {len(names)} files; unpack it and name one of them")
            return archive.open(names[0])
        opener = cast(Callable[..., IO[bytes]], OPENERS.get(self.compression, open))
        return opener(self.path, "rb")

    def text(self, file: IO[bytes], newline: str = "\n") -> io.TextIOWrapper:
        """The file as text. Bytes that are not UTF-8 become halves of surrogate pairs, so that their row is known."""
        errors = "surrogateescape" if self.encoding in ("utf-8", "utf-8-sig") else "strict"
        return io.TextIOWrapper(file, self.encoding, errors, newline=newline)

    def batches(
        self, columns: Sequence[str | None], refused: RefusedRows
    ) -> Iterator[tuple[Sequence[int], Sequence[int | None], list[list]]]:
        """Batches of rows: their numbers, counted from 1, their lines, and the values of each column; a column that is
        None has None in all rows. What is no row goes to `refused`. At the end, `num_rows` counts both.

        Raises InputError if the file cannot be read to its end, or has no rows; ReadAgain if it is to be read anew.
        """
        read = {"parquet": self._parquet, "json": self._json, "array": self._json, "delimited": self._delimited}
        wanted = list(dict.fromkeys(name for name in columns if name is not None))
        self.num_rows = 0
        with self.open() as file:
            try:
                for numbers, lines, values in read[self.kind](file, wanted, refused):
                    yield (
                        numbers,
                        lines,
                        [values[name] if name is not None else [None] * len(numbers) for name in columns],
                    )
            except UNREADABLE as error:
                raise self.error(f"cannot be read after row {self.num_rows}: {error}") from None
        if not self.num_rows:
            raise self.error("has no rows")

    def _parquet(self, file: IO[bytes], wanted: list[str], _: RefusedRows) -> Iterator[tuple]:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(BATCH_ROWS, columns=wanted):
            first, self.num_rows = self.num_rows + 1, self.num_rows + batch.num_rows
            numbers = range(first, self.num_rows + 1)
            yield numbers, [None] * len(numbers), {name: values_of(batch.column(name)) for name in wanted}

    def _delimited(self, file: IO[bytes], wanted: list[str], refused: RefusedRows) -> Iterator[tuple]:
        places, width = {name: self.names.index(name) for name in wanted}, len(self.names)
        headers: list[Record] = []  # the first line, and how it stands where a file was joined that has a mark of UTF-8
        again: list[int] = []  # lines where an export that was joined to the file begins
        for lines, records in self.records(file):
            if self.header and not headers:
                headers = [records[0], ["\ufeff" + records[0][0], *records[0][1:]]]
                lines, records = lines[1:], records[1:]
            if any(header in records for header in headers):
                again += [line for line, record in zip(lines, records, strict=True) if record in headers]
                lines = [line for line, record in zip(lines, records, strict=True) if record not in headers]
                records = [record for record in records if record not in headers]
            numbers: Sequence[int] = range(self.num_rows + 1, self.num_rows + len(records) + 1)
            self.num_rows += len(records)
            if {*map(len, records)} != {width} or str in {*map(type, records)}:
                good = []
                for i, record in enumerate(records):
                    if isinstance(record, list) and len(record) == width:
                        good.append(i)
                    else:
                        short = f"expected {width} columns, got {len(record)}"
                        refused.add(numbers[i], lines[i], record if isinstance(record, str) else short)
                numbers, lines, records = (
                    [numbers[i] for i in good],
                    [lines[i] for i in good],
                    [records[i] for i in good],
                )
            if records:
                columns = list(zip(*records, strict=True))
                yield numbers, lines, {name: list(columns[place]) for name, place in places.items()}
        if again:
            self.notes.append(
                f"note: {self.path}: {len(again):,} lines repeat the names of the columns, such as line {again[0]}; "
                "they are no rows"
            )

    def records(self, file: IO[bytes]) -> Iterator[tuple[Sequence[int], list[Record]]]:
        """The records of delimited text, as `read_records` gives them. Raises ReadAgain where quotes turn out to be
        text."""
        try:
            yield from read_records(blocks(self.text(file, newline=""), self.error), self.delimiter, self.quoted)
        except StrayQuote as stray:
            self.quoted = False
            self.notes.append(f"{self.path}, line {stray}: has a stray quote; quotes are read as text")
            raise ReadAgain from None

    def objects(self, file: IO[bytes]) -> Iterator[tuple[int | None, dict | str]]:
        """The objects of JSON, as `read_objects` gives them."""
        return read_objects(self.text(file), self.kind == "array", self.error)

    def _json(self, file: IO[bytes], wanted: list[str], refused: RefusedRows) -> Iterator[tuple]:
        known, objects = set(self.names), self.objects(file)
        while part := list(islice(objects, BATCH_ROWS)):
            good: list[tuple[int, int | None, dict]] = []
            for line, row in part:
                self.num_rows += 1
                if isinstance(row, str):
                    refused.add(self.num_rows, line, row)
                    continue
                good.append((self.num_rows, line, row))
                if not known.issuperset(row):
                    self.names += [name for name in row if name not in known and isinstance(name, str)]
                    known.update(row)
            numbers, lines = [number for number, *_ in good], [line for _, line, _ in good]
            yield numbers, lines, {name: [row.get(name) for *_, row in good] for name in wanted}

    def add_late_keys(self) -> bool:
        """Searches all rows of JSON for keys that the first ones lack. Returns whether there are any."""
        before, refused = len(self.names), RefusedRows(self.path, skip=True)
        if self.kind in ("json", "array"):
            for _ in self.batches([], refused):
                pass
        return len(self.names) > before


def _value(cell: pa.Scalar) -> object:
    """A cell as a Python object; None where there is none for its value."""
    try:
        return cell.as_py()
    except (OverflowError, ValueError):
        return None


def values_of(column: pa.Array) -> list:
    """A Parquet column as Python objects. Times are cut to microseconds, the precision of datetime; numbers in 16 or 32
    bits that cannot be told from their neighbours are Rounded."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_float32(kind):
        column = column.cast(pa.string()).cast(pa.float64())  # 19.99, not 19.989999771118164
    try:
        values = column.to_pylist()
    except (OverflowError, ValueError):  # a time that datetime cannot hold, such as one that means never
        values = list(map(_value, column))
    bits = 24 if pa.types.is_float32(kind) else 11 if pa.types.is_float16(kind) else 0
    if bits:
        return [value if value is None else whole(value, bits) for value in values]
    if pa.types.is_fixed_size_binary(kind):
        return [value if value is None else value.hex() for value in values]
    return values
