"""Reads the rows of a raw file: delimited text, JSON lines, a JSON array, lines of Python literals, or Parquet,
compressed or not. The format is recognized by the first bytes of a file, not by its name.

Every row is given out or refused with its number: none is lost. Delimited text is read with the standard library's
`csv`, which says where a quoted field ends; pyarrow's reader takes the rows between two stray quotes for one field.
JSON is read with `json`: pyarrow refuses a column whose type changes from line to line, as in the published metadata.
"""

import ast
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import warnings
import zipfile
import zlib
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet

from minionerec.data.files import MOST_PROBLEMS, shorten
from minionerec.errors import InputError
from minionerec.prepare.cells import is_empty, whole
from minionerec.prepare.columns import is_known_name

BATCH_ROWS = 50_000
HEAD_ROWS = 1000  # of a file that are searched for keys, and for columns that are empty
BLOCK = 1 << 19  # characters that are read at a time
MOST_LINE = 16 << 20  # characters of a line, or of a row that spans lines
MOST_LINES = 1000  # of a row with quoted line breaks
DELIMITERS = ("\t", ",", ";", "|", "::")
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, UnicodeError, pa.ArrowException)
COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
OTHER_FILES = {b"\x28\xb5\x2f\xfd": "compressed by zstd", b"7z\xbc\xaf": "compressed by 7-Zip", b"SQLite": "SQLite"}
FORMATS = "CSV, TSV, JSON or Parquet file, compressed or not"
_ENDS = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")
_GAP = re.compile(r"[ \t\r\n,]*")
_UNDECODABLE = re.compile("[\udc80-\udcff]")  # how `surrogateescape` gives out bytes that are not text


@dataclass(frozen=True)
class Layout:
    """What a user says about text files, where finding it out is not safe."""

    delimiter: str = ""
    no_header: bool = False
    encoding: str = ""
    names: frozenset[str] = frozenset()  # of columns, which flags give

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be."""
        problems = []
        object.__setattr__(self, "delimiter", self.delimiter.replace("\\t", "\t"))  # as a shell passes it on
        if self.delimiter and ('"' in self.delimiter or set(self.delimiter) & set("\r\n")):
            problems.append(f"--delimiter {self.delimiter!r}: must not contain quotes or line breaks")
        if self.encoding:
            try:
                "".encode(self.encoding)
                b"".decode(self.encoding)
            except (LookupError, UnicodeError, ValueError):
                problems.append(f"--encoding {self.encoding}: is unknown; give one such as latin-1, cp1252 or gb18030")
        if problems:
            raise InputError(problems)


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
            if len(names) != 1:
                raise self.error(f"is an archive of {len(names)} files; unpack it and name one of them")
            return archive.open(names[0])
        opener: Any = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}.get(self.compression, open)
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
            yield numbers, [None] * len(numbers), {name: _values(batch.column(name)) for name in wanted}

    def _delimited(self, file: IO[bytes], wanted: list[str], refused: RefusedRows) -> Iterator[tuple]:
        places = [self.names.index(name) for name in wanted]
        width, skipped = len(self.names), not self.header
        numbers: list[int] = []
        lines: list[int] = []
        rows: list[list[str]] = []
        for at, records in self._records(file):
            if not skipped:
                skipped = True
                at, records = at[1:], records[1:]
            if {*map(len, records)} == {width} and str not in {*map(type, records)}:
                numbers += range(self.num_rows + 1, self.num_rows + len(records) + 1)
                self.num_rows += len(records)
                lines += at
                rows += cast(list[list[str]], records)
            else:
                for line, record in zip(at, records, strict=True):
                    self.num_rows += 1
                    if isinstance(record, str):
                        refused.add(self.num_rows, line, record)
                    elif len(record) != width:
                        refused.add(self.num_rows, line, f"expected {width} columns, got {len(record)}")
                    else:
                        numbers.append(self.num_rows)
                        lines.append(line)
                        rows.append(record)
            if len(rows) >= BATCH_ROWS:
                yield numbers, lines, _columns(rows, wanted, places)
                numbers, lines, rows = [], [], []
        if rows:
            yield numbers, lines, _columns(rows, wanted, places)

    def _records(self, file: IO[bytes]) -> Iterator[tuple[Sequence[int], list[list[str] | str]]]:
        """The records of delimited text, some at a time: the numbers of their first lines, and the cells of each, or
        what is wrong with it. Blank lines are no records."""
        feed, width = _Feed(self._blocks(self.text(file, newline=""))), 0
        while block := feed.block():
            first, records = feed.first, self._at_once(block)
            at: Sequence[int]
            if records is None:
                at, records = self._one_by_one(feed, width)
            else:
                at = range(first, first + len(records))
                feed.take_all()
                if not {0, 1}.isdisjoint(map(len, records)):
                    pairs = [(line, one) for line, one in zip(at, records, strict=True) if not _is_blank(one)]
                    at, records = [line for line, _ in pairs], [one for _, one in pairs]
            if records:
                width = width or (0 if isinstance(records[0], str) else len(records[0]))
                yield at, records

    def _at_once(self, lines: list[str]) -> list[list[str] | str] | None:
        """The records of lines, each of which is one, or None if not all of them are."""
        text = "".join(lines)
        undecodable = not text.isascii() and _UNDECODABLE.search(text)
        records: list[Any]
        if len(self.delimiter) > 1:
            records = [line.rstrip("\r\n").split(self.delimiter) for line in lines]
        elif not self.quoted:
            records = list(csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE))
        else:
            try:
                records = list(csv.reader(lines, delimiter=self.delimiter, strict=True))
            except csv.Error:
                return None
            if len(records) < len(lines):
                return None
        return [_undecodable(line) or row for line, row in zip(lines, records, strict=True)] if undecodable else records

    def _one_by_one(self, feed: "_Feed", width: int) -> tuple[list[int], list[list[str] | str]]:
        """The records up to where one ends with a block, read with care: after a quote that is not closed, reading goes
        on in the next line. `width`: of the first record, 0 before it."""
        at: list[int] = []
        records: list[list[str] | str] = []
        reader = csv.reader(feed, delimiter=self.delimiter, strict=True)
        while feed.waiting:
            feed.begin()
            problem, cells = None, list[str]()
            try:
                cells = next(reader)
            except csv.Error as error:
                problem = f"a quote opens a field that does not end as in CSV ({error}); write it as two quotes"
            width = width or len(cells)
            if not problem and len(feed.taken) > 1 and _are_rows(feed.taken, self.delimiter, width):
                problem = "a quote opens a field, and all lines up to the next quote look like rows"
            if problem:
                feed.give_back()
                reader = csv.reader(feed, delimiter=self.delimiter, strict=True)
                if self.delimiter == "\t":
                    self.quoted = False
                    self.notes.append(f"{self.path}, line {feed.first}: has a stray quote; quotes are read as text")
                    raise ReadAgain
            if problem or not _is_blank(cells):
                at.append(feed.first)
                records.append(problem or _undecodable("".join(feed.taken)) or cells)
        feed.begin()
        return at, records

    def _blocks(self, text: io.TextIOWrapper) -> Iterator[list[str]]:
        """The lines of a file, with their ends, many at a time."""
        number, rest = 0, ""
        while part := text.read(BLOCK):
            block = rest + part
            cut = max(block.rfind("\n"), block.rfind("\r", 0, len(block) - 1)) + 1  # "\r" may be half of an end
            lines = _ENDS.findall(block, 0, cut) if "\r" in block else block[:cut].splitlines(keepends=True)
            if "\r" not in block and len(lines) != block.count("\n", 0, cut):  # other characters that end lines
                lines = [line + "\n" for line in block[:cut].split("\n")[:-1]]
            rest = block[cut:]
            longest = max(map(len, [*lines, rest]))
            if longest > MOST_LINE:
                number += [*map(len, [*lines, rest])].index(longest) + 1
                raise self.error(f"line {number} has more than {MOST_LINE:,} characters; is it a file of rows?")
            number += len(lines)
            if lines:
                yield lines
        if rest:
            yield [rest]

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        """The lines of a file, none of them too long to be one."""
        return (line for lines in self._blocks(text) for line in lines)

    def _json(self, file: IO[bytes], wanted: list[str], refused: RefusedRows) -> Iterator[tuple]:
        known = set(self.names)
        numbers: list[int] = []
        lines: list[int | None] = []
        values: dict[str, list] = {name: [] for name in wanted}
        for line, row in self._objects(file):
            self.num_rows += 1
            if isinstance(row, str):
                refused.add(self.num_rows, line, row)
                continue
            if not known.issuperset(row):
                self.names += [name for name in row if name not in known and isinstance(name, str)]
                known.update(row)
            for name in wanted:
                values[name].append(row.get(name))
            numbers.append(self.num_rows)
            lines.append(line)
            if len(numbers) == BATCH_ROWS:
                yield numbers, lines, values
                numbers, lines, values = [], [], {name: [] for name in wanted}
        if numbers:
            yield numbers, lines, values

    def add_late_keys(self) -> bool:
        """Searches all rows of JSON for keys that the first ones lack. Returns whether there are any."""
        before, refused = len(self.names), RefusedRows(self.path, skip=True)
        if self.kind in ("json", "array"):
            for _ in self.batches([], refused):
                pass
        return len(self.names) > before

    def _objects(self, file: IO[bytes]) -> Iterator[tuple[int | None, dict | str]]:
        """The objects of a JSON file with their lines, or what is wrong with them."""
        if self.kind == "array":
            for row in _array(self.text(file), self.error):
                good = isinstance(row, dict)
                yield None, row if good else f"expected a JSON object, found {shorten(row)}"
            return
        for number, line in enumerate(self._lines(self.text(file)), 1):
            if line.strip():
                row = _undecodable(line) or _value(line)
                good = isinstance(row, (dict, str))
                yield number, row if good else f"expected one JSON object per line, found {shorten(row[0])}"


def _is_blank(record: list[str] | str) -> bool:
    """Whether a record is that of a blank line; one of empty fields is not."""
    return len(record) < 2 and not "".join(record).strip()


def _columns(rows: list[list[str]], names: list[str], places: list[int]) -> dict[str, list]:
    """The named columns of rows; they are in these places."""
    columns = list(zip(*rows, strict=True))
    return {name: list(columns[i]) for name, i in zip(names, places, strict=True)}


def _undecodable(text: str) -> str | None:
    """What is wrong with text that was not UTF-8."""
    found = None if text.isascii() else _UNDECODABLE.search(text)
    if not found:
        return None
    return f"is not UTF-8 (byte 0x{ord(found.group()) - 0xDC00:02x}); name the file's --encoding, such as latin-1"


class _Feed:
    """The lines of blocks for a csv.reader. It remembers those of the current record and can give them again.

    Attributes:
        waiting: lines that were not taken.
        taken: the lines of the current record.
        first: the number of its first line, or, between records, of the next one.
    """

    def __init__(self, blocks: Iterator[list[str]]):
        self._blocks = blocks
        self.waiting, self.taken = deque[str](), list[str]()
        self.first, self._size = 1, 0

    def block(self) -> list[str]:
        """The lines that wait, or those of the next block; none at the end of the file."""
        if not self.waiting:
            self.waiting.extend(next(self._blocks, ()))
        return list(self.waiting)

    def take_all(self) -> None:
        """Takes the lines that wait, each as a record."""
        self.first += len(self.waiting)
        self.waiting.clear()

    def begin(self) -> None:
        """Before a record, and after the last one."""
        self.first += len(self.taken)
        self.taken, self._size = [], 0

    def give_back(self) -> None:
        """Takes only the first line for the record; the others come again."""
        self.waiting.extendleft(reversed(self.taken[1:]))
        self.taken = self.taken[:1]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self.waiting and not self.block():
            raise StopIteration
        line = self.waiting.popleft()
        self.taken.append(line)
        self._size += len(line)
        if len(self.taken) > MOST_LINES or self._size > MOST_LINE:
            raise csv.Error(f"{len(self.taken):,} lines follow")
        return line


def _are_rows(lines: list[str], delimiter: str, width: int) -> bool:
    """Whether each line of a record looks like a row of `width` fields by itself: a stray quote and another one made
    them one."""
    fields = [line.split(delimiter) for line in lines]
    return width > 1 and all(len(row) == width and row[0].strip('" \r\n') for row in fields)


def _value(line: str) -> Any:
    """The object on a line of JSON, or of Python as some data sets have it; text that says what is wrong, or a tuple
    with a value that is no object. Nothing is executed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON: {str(error)[:200]}"
        if not line.lstrip().startswith("{'"):
            return problem
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of unknown escapes
                row = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return "is neither JSON nor a Python literal"
    return row if isinstance(row, dict) else (row,)


def _array(text: io.TextIOWrapper, error: Callable[[object], InputError]) -> Iterator[Any]:
    """The elements of a JSON array, one at a time. Raises InputError where it is not one."""
    decoder, chunk, row = json.JSONDecoder(), 1 << 16, 0
    buffer = text.read(chunk)
    place = buffer.index("[") + 1
    while True:
        start = _GAP.match(buffer, place).end()  # type: ignore[union-attr]
        if buffer[start : start + 1] == "]":
            if (buffer[start + 1 :] + text.read(chunk)).strip():
                raise error(f"text follows the JSON array after row {row}")
            return
        problem: Exception | None = None
        try:
            element, place = decoder.raw_decode(buffer, start)
        except (ValueError, RecursionError) as cut_off:
            problem, place = cut_off, len(buffer)
        if place - start > MOST_LINE:
            raise error(f"row {row + 1} has more than {MOST_LINE:,} characters; is it an array of rows?")
        if problem:
            more = text.read(max(chunk, len(buffer) - start))
            if not more:
                raise error(f"row {row + 1} is not JSON, or the array does not end: {problem}")
            buffer, place = buffer[start:] + more, 0
            continue
        row += 1
        if wrong := _undecodable(buffer[start:place]):
            raise error(f"row {row} {wrong}")
        yield element


def _values(column: pa.Array) -> list:
    """A Parquet column as Python objects. Times are cut to microseconds, the precision of datetime; numbers in 16 or 32
    bits that cannot be told from their neighbours are Rounded."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", kind.tz), safe=False)
    values = column.to_pylist()
    bits = 24 if pa.types.is_float32(kind) else 11 if pa.types.is_float16(kind) else 0
    if bits:
        return [value if value is None else whole(value, bits) for value in values]
    if pa.types.is_fixed_size_binary(kind):
        return [value if value is None else value.hex() for value in values]
    return values


# --- Finding out what a file is ---------------------------------------------------------------------------------------


def open_source(path: str, flag: str, layout: Layout | None = None) -> Source:
    """Finds out the format and the columns of a file. Raises InputError if it does not exist or cannot be read."""
    if not path:
        raise InputError(f"--{flag} is missing; give a {FORMATS}")
    source, layout = Source(path, flag), layout or Layout()
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        for magic, name in OTHER_FILES.items():
            if start.startswith(magic):
                raise source.error(f"is {name}; give a {FORMATS}")
        source.compression = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), "")
        with source.open() as file:
            head = file.read(1 << 16)
        if not head.strip():
            raise source.error("is empty")
        if head[257:262] == b"ustar":
            raise source.error("is a tar archive; unpack it and name one of its files")
        _recognize(source, head, layout)
        with source.open() as file:
            _read_head(source, file, layout)
    except FileNotFoundError:
        raise InputError(f"--{flag} {path}: no such file") from None
    except RuntimeError as error:  # of zipfile, for a password
        raise source.error(f"cannot be read: {error}") from None
    except UNREADABLE as error:
        raise source.error(f"cannot be read: {error}") from None
    return source


def _recognize(source: Source, head: bytes, layout: Layout) -> None:
    """Sets the kind and the encoding, from the first bytes."""
    if head.startswith(b"PAR1"):
        source.kind = "parquet"
        return
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    source.encoding = next((name for mark, name in marks.items() if head.startswith(mark)), "utf-8-sig")
    if layout.encoding and source.encoding == "utf-8-sig":
        is_utf_8 = codecs.lookup(layout.encoding).name in ("utf-8", "utf-8-sig") or _is_utf_8(source, head)
        source.encoding = "utf-8-sig" if is_utf_8 else layout.encoding
    elif source.encoding == "utf-8-sig" and b"\0" in head:
        raise source.error("is neither Parquet nor UTF-8 text; for UTF-16 give --encoding utf-16-le")
    start = source.text(io.BytesIO(head)).read(1 << 10).lstrip("\ufeff \t\r\n") if head else ""
    if start[:1] == "[" and not layout.delimiter and re.match(r"\[\s*([{\]]|$)", start):
        source.kind = "array"
    elif start[:1] in ("{", "[") and not layout.delimiter:
        source.kind = "json"


def _is_utf_8(source: Source, head: bytes) -> bool:
    """Whether a file is UTF-8 beyond doubt: with letters beyond ASCII, and nothing else."""
    decoder, beyond = codecs.getincrementaldecoder("utf-8")(), False
    try:
        with source.open() as file:
            while part := file.read(1 << 20):
                beyond = not decoder.decode(part).isascii() or beyond
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return beyond and b"\0" not in head


def _read_head(source: Source, file: IO[bytes], layout: Layout) -> None:
    """Sets the columns, and the layout of delimited text."""
    if source.kind == "parquet":
        parquet = pyarrow.parquet.ParquetFile(file)
        source.names = parquet.schema_arrow.names
        batch = next(parquet.iter_batches(HEAD_ROWS), None)
        columns = {} if batch is None else dict(zip(source.names, map(_values, batch.columns), strict=True))
        source.empty = frozenset(name for name, values in columns.items() if all(map(is_empty, values)))
    elif source.kind == "delimited":
        sample = [line for line, _ in zip(source._lines(source.text(file, newline="")), range(HEAD_ROWS), strict=False)]
        given = layout.delimiter if sample and layout.delimiter in sample[0] else ""  # else of the other file
        source.delimiter = given or _delimiter_of(source, sample)
        reader = source if len(source.delimiter) == 1 else Source(source.path, source.flag, quoted=False)
        reader.delimiter, reader.encoding = source.delimiter, source.encoding
        content = io.BytesIO("".join(sample).encode(source.encoding, "surrogateescape"))
        try:
            found = [row for _, rows in reader._records(content) for row in rows]
        except ReadAgain:
            found = [line.rstrip("\r\n").split(source.delimiter) for line in sample if line.strip()]
            source.quoted = True  # reading the file finds it out again, and says so
            source.notes.clear()
        if not found or isinstance(found[0], str):
            raise source.error(f"line 1 {found[0]}" if found else "is empty")
        rows = [row for row in found if isinstance(row, list)]
        source.header = _has_header(source, rows[0], layout)
        source.names = list(map(str.strip, rows[0])) if source.header else [str(i + 1) for i in range(len(rows[0]))]
        data = [row for row in rows[source.header :] if len(row) == len(source.names)]
        empty = [name for i, name in enumerate(source.names) if data and all(is_empty(row[i]) for row in data)]
        source.empty = frozenset(empty)
    else:
        keys: dict[str, bool] = {}
        problem = ""
        for row, _ in zip(source._objects(file), range(HEAD_ROWS), strict=False):
            if isinstance(row[1], dict):
                for name, value in row[1].items():
                    if not isinstance(name, str):
                        continue
                    keys[name] = keys.get(name, True) and is_empty(value)
            else:
                problem = problem or f"line {row[0] or 1}: {row[1]}"
        if not keys:
            raise source.error(problem or "has no rows")
        source.names, source.empty = list(keys), frozenset(name for name, empty in keys.items() if empty)


def _delimiter_of(source: Source, sample: list[str]) -> str:
    """The delimiter that stands in the first line, and, where several do, as often in all others."""
    bare = [re.sub(r'"[^"\n]*"', "", line) for line in sample[:100] if line.strip()]
    if not bare or "\t" in bare[0]:
        return "\t" if bare else ","
    there = [one for one in DELIMITERS if one in bare[0]]
    if len(there) > 1:
        even = [one for one in there if len({line.count(one) for line in bare}) == 1]
        there = ["::"] if "::" in even else even or there
    if len(there) > 1:
        raise source.error(
            f"{' and '.join(map(repr, there))} could each separate its columns; name one with --delimiter"
        )
    return there[0] if there else ","


def _has_header(source: Source, first: list[str], layout: Layout) -> bool:
    """Whether the first line has names. Raises InputError if it looks like data and no flag says that it is."""
    data = sum(map(_is_data, first))
    names = sum(map(is_known_name, first))
    named = any(cell.strip() in layout.names and not _is_data(cell) for cell in first)
    if named or names > min(data, 1) or not (data or layout.no_header):
        return True
    if layout.no_header:
        return False
    cells = ", ".join(shorten(cell.strip(), 30) for cell in first[:6])
    raise source.error(
        f"line 1 looks like a row, not like the names of columns: {cells}; give --no_header True, and name columns by "
        "number, such as --user_column 1"
    )


def _is_data(cell: str) -> bool:
    """Whether a cell is a number or a date, which are no names."""
    text = cell.strip()
    return bool(
        re.match(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}", text) or re.fullmatch(r"[+-]?\d+([.,]\d+)?(e[+-]?\d+)?", text)
    )
