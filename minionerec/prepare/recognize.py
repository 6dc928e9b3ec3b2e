"""Finds out what a raw file is, by its first bytes and not by its name: its format, its encoding, and its columns."""

import codecs
import io
import os
import re
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO

import pyarrow.parquet

from minionerec.data.files import shorten
from minionerec.errors import InputError
from minionerec.prepare.cells import is_empty
from minionerec.prepare.columns import is_known_name
from minionerec.prepare.delimited import StrayQuote, blocks, read_records
from minionerec.prepare.formats import UNREADABLE, Source, values_of

HEAD_ROWS = 1000  # of a file that are searched for keys, and for columns that are empty
DELIMITERS = ("\t", ",", ";", "|", "::")
COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
OTHER_FILES = {
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"7z\xbc\xaf": "compressed by 7-Zip",
    b"SQLite": "SQLite",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of before 2007",
}
FORMATS = "CSV, TSV, JSON or Parquet file, compressed or not"


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


def open_source(path: str, flag: str, layout: Layout | None = None) -> Source:
    """Finds out the format and the columns of a file. Raises InputError if it does not exist or cannot be read."""
    if not path:
        raise InputError(f"--{flag} is missing; give a {FORMATS}")
    source, layout = Source(path, flag), layout or Layout()
    if os.path.isdir(path):
        raise InputError(f"--{flag} {path}: is a folder, not a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise source.error("is a pipe or a device, and has to be read more than once; write it to a file first")
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
    # A delimiter may be that of the other file, so what begins like an object is one all the same.
    if re.match(r"\[\s*\{\s*[\"']" if layout.delimiter else r"\[\s*([{\]]|$)", start):
        source.kind = "array"
    elif start[:1] in ("{", "[") and (not layout.delimiter or re.match(r"\{\s*[\"']", start)):
        source.kind = "json"


def _is_utf_8(source: Source, head: bytes) -> bool:
    """Whether a file is UTF-8 beyond doubt: with letters beyond ASCII, and nothing else."""
    try:
        with source.open() as file:
            text = io.TextIOWrapper(file, "utf-8")
            plain = [part.isascii() for part in iter(lambda: text.read(1 << 20), "")]
    except UnicodeDecodeError:
        return False
    return not all(plain) and b"\0" not in head


def _read_head(source: Source, file: IO[bytes], layout: Layout) -> None:
    """Sets the columns, and the layout of delimited text."""
    if source.kind == "parquet":
        parquet = pyarrow.parquet.ParquetFile(file)
        source.names = parquet.schema_arrow.names
        batch = next(parquet.iter_batches(HEAD_ROWS), None)
        columns = [] if batch is None else list(map(values_of, batch.columns))
        empty = [bool(columns) and all(map(is_empty, values)) for values in columns]
    elif source.kind == "delimited":
        rows = _read_delimited_head(source, file, layout)
        data = [row for row in rows[source.header :] if len(row) == len(source.names)]
        empty = [bool(data) and all(is_empty(row[i]) for row in data) for i in range(len(source.names))]
    else:
        keys: dict[str, bool] = {}
        problem = ""
        for line, row in islice(source.objects(file), HEAD_ROWS):
            if isinstance(row, str):
                problem = problem or f"line {line or 1}: {row}"
                continue
            for name, value in row.items():
                if isinstance(name, str):  # in a Python literal it may be anything
                    keys[name] = keys.get(name, True) and is_empty(value)
        if not keys:
            raise source.error(problem or "has no rows")
        source.names, empty = list(keys), list(keys.values())
    source.empty = frozenset(name for name, is_it in zip(source.names, empty, strict=False) if is_it)


def _read_delimited_head(source: Source, file: IO[bytes], layout: Layout) -> list[list[str]]:
    """The first rows of delimited text, the header among them. Sets its layout and the names of its columns."""
    lines = chain.from_iterable(blocks(source.text(file, newline=""), source.error))
    sample = list(islice(lines, HEAD_ROWS))
    given = layout.delimiter if sample and layout.delimiter in sample[0] else ""  # else of the other file
    source.delimiter = given or _delimiter_of(source, sample)
    try:
        found = [row for _, rows in read_records(iter([sample]), source.delimiter, quoted=True) for row in rows]
    except StrayQuote:  # reading the file finds it out again, and says so
        found = [line.rstrip("\r\n").split(source.delimiter) for line in sample if line.strip()]
    if not found or isinstance(found[0], str):
        raise source.error(f"line 1 {found[0]}" if found else "is empty")
    source.header = _has_header(source, found[0], layout)
    source.names = list(map(str.strip, found[0])) if source.header else [str(i + 1) for i in range(len(found[0]))]
    return [row for row in found if isinstance(row, list)]


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
    columns = "--user_column 1" if source.flag == "interactions" else "--item_column 1 --title_column 2"
    raise source.error(
        f"line 1 looks like a row, not like the names of columns: {cells}; give --no_header True, and name columns by "
        f"number, such as {columns}"
    )


def _is_data(cell: str) -> bool:
    """Whether a cell is a number or a date, which are no names."""
    text = cell.strip()
    return bool(
        re.match(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}", text) or re.fullmatch(r"[+-]?\d+([.,]\d+)?(e[+-]?\d+)?", text)
    )
