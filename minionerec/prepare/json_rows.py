"""The rows of a file of JSON objects: one per line, or an array of them, or lines of Python literals as some data sets
have them.

They are read with `json`: pyarrow refuses a column whose type changes from line to line, as in the published metadata.
"""

import ast
import io
import json
import re
import warnings
from collections.abc import Iterator

from minionerec.data.files import shorten
from minionerec.prepare.delimited import MOST_LINE, Error, blocks, undecodable

_PYTHON = re.compile(r"\s*\{\s*[uU]?'")
_GAP = re.compile(r"[ \t\r\n,]*")


def read_objects(text: io.TextIOWrapper, is_array: bool, error: Error) -> Iterator[tuple[int | None, dict | str]]:
    """The objects of a file with their lines, or what is wrong with them."""
    if is_array:
        for row in _array(text, error):
            yield None, row if isinstance(row, dict) else f"expected a JSON object, found {shorten(row)}"
        return
    for number, line in enumerate((line for lines in blocks(text, error) for line in lines), 1):
        if line.strip():
            row = undecodable(line) or _object(line)
            if number == 1 and (line.strip() == "{" or _holds_objects(row)):
                raise error("is one JSON object; give an object per row: one on each line, or an array of them")
            yield number, row


def _holds_objects(row: dict | str) -> bool:
    """Whether an object is a file of its own, such as an item file: item id -> texts."""
    return isinstance(row, dict) and len(row) > 1 and all(isinstance(value, dict) for value in row.values())


def _object(line: str) -> dict | str:
    """The object on a line of JSON, or of Python; or what is wrong with it. Nothing is executed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not _PYTHON.match(line):
            return f"is not JSON: {str(error)[:200]}"
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of unknown escapes
                row = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return "is neither JSON nor a Python literal"
    return row if isinstance(row, dict) else f"expected one JSON object per line, found {shorten(row)}"


def _array(text: io.TextIOWrapper, error: Error) -> Iterator[object]:
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
        if wrong := undecodable(buffer[start:place]):
            raise error(f"row {row} {wrong}")
        yield element
