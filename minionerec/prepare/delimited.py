"""The lines of a text file, and the records of delimited text: well-formed ones many at a time, the others one by one,
so that none is lost to a stray quote.

They are read with the standard library's `csv`, which says where a quoted field ends; pyarrow's reader takes the rows
between two stray quotes for one field.
"""

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from minionerec.errors import InputError

BLOCK = 1 << 19  # characters that are read at a time
MOST_LINE = 16 << 20  # characters of a line, or of a row that spans lines
MOST_LINES = 1000  # of a row with quoted line breaks
_ENDS = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")
_UNDECODABLE = re.compile("[\udc80-\udcff]")  # how `surrogateescape` gives out bytes that are not text

Error = Callable[[object], InputError]  # makes the error of a file from what is wrong with it
Record = list[str] | str  # its cells, or what is wrong with it


class StrayQuote(Exception):
    """A quote opens a field that does not end, in the line `args[0]` of text that is separated by tabs: there it is
    text."""


def blocks(text: io.TextIOWrapper, error: Error) -> Iterator[list[str]]:
    """The lines of a file, with their ends, many at a time. Raises InputError for one that is too long to be one."""
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
            raise error(f"line {number} has more than {MOST_LINE:,} characters; is it a file of rows?")
        number += len(lines)
        if lines:
            yield lines
    if rest:
        yield [rest]


def undecodable(text: str) -> str | None:
    """What is wrong with text that was not UTF-8."""
    found = None if text.isascii() else _UNDECODABLE.search(text)
    if not found:
        return None
    try:  # Chinese in GBK is also some text in latin-1
        text.encode("utf-8", "surrogateescape").decode("gb18030")
        names = "gb18030 or cp1252"
    except UnicodeDecodeError:
        names = "cp1252 or latin-1"
    return f"is not UTF-8 (byte 0x{ord(found.group()) - 0xDC00:02x}); name the file's --encoding, such as {names}"


def read_records(
    lines: Iterator[list[str]], delimiter: str, quoted: bool
) -> Iterator[tuple[Sequence[int], list[Record]]]:
    """The records of delimited text, some at a time, with the numbers of their first lines. Blank lines are no records.

    Args:
        lines: as `blocks` gives them.
        quoted: whether a field may stand in quotes.

    Raises StrayQuote.
    """
    feed, width = _Feed(lines), 0
    while block := feed.block():
        first, records = feed.first, _at_once(block, delimiter, quoted)
        at: Sequence[int]
        if records is None:
            at, records = _one_by_one(feed, delimiter, width)
        else:
            at = range(first, first + len(records))
            feed.take_all()
            if not {0, 1}.isdisjoint(map(len, records)):
                pairs = [(line, one) for line, one in zip(at, records, strict=True) if not _is_blank(one)]
                at, records = [line for line, _ in pairs], [one for _, one in pairs]
        if records:
            width = width or (0 if isinstance(records[0], str) else len(records[0]))
            yield at, records


def _at_once(lines: list[str], delimiter: str, quoted: bool) -> list[Record] | None:
    """The records of lines, each of which is one, or None if not all of them are."""
    if len(delimiter) > 1:
        cells = [line.rstrip("\r\n").split(delimiter) for line in lines]
    elif not quoted:
        cells = list(csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE))
    else:
        try:
            cells = list(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error:
            return None
        if len(cells) < len(lines):
            return None
    if undecodable("".join(lines)):
        return [undecodable(line) or row for line, row in zip(lines, cells, strict=True)]
    return cast(list[Record], cells)


def _one_by_one(feed: "_Feed", delimiter: str, width: int) -> tuple[list[int], list[Record]]:
    """The records up to where one ends with a block, read with care: after a quote that is not closed, reading goes on
    in the next line. `width`: of the first record, 0 before it."""
    at: list[int] = []
    records: list[Record] = []
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while feed.waiting:
        feed.begin()
        problem, cells = None, list[str]()
        try:
            cells = next(reader)
        except csv.Error as error:
            problem = f"a quote opens a field that does not end as in CSV ({error}); write it as two quotes"
        width = width or len(cells)
        if not problem and len(feed.taken) > 1 and _are_rows(feed.taken, delimiter, width):
            problem = "a quote opens a field, and all lines up to the next quote look like rows"
        if problem:
            feed.give_back()
            reader = csv.reader(feed, delimiter=delimiter, strict=True)
            if delimiter == "\t":
                raise StrayQuote(feed.first)
        if problem or not _is_blank(cells):
            at.append(feed.first)
            records.append(problem or undecodable("".join(feed.taken)) or cells)
    feed.begin()
    return at, records


def _is_blank(record: Record) -> bool:
    """Whether a record is that of a blank line; one of empty fields is not."""
    return len(record) < 2 and not "".join(record).strip()


def _are_rows(lines: list[str], delimiter: str, width: int) -> bool:
    """Whether each line of a record looks like a row of `width` fields by itself: a stray quote and another one made
    them one."""
    fields = [line.split(delimiter) for line in lines]
    return width > 1 and all(len(row) == width and row[0].strip('" \r\n') for row in fields)


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
