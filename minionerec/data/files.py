"""Reads the files of the public MiniOneRec release, and checks all that can be checked before a model is loaded.

| file | content |
|---|---|
| index (`*.index.json`) | item id -> its semantic ID (SID) as a list of tokens |
| metadata (`*.item.json`) | item id -> title, description |
| info (tab-separated, whatever its extension) | SID, title, item id |
| interactions (`*.csv`) | one next-item event per row; histories are the text of a Python list, oldest first |

Nothing here executes data: list cells are read with `ast.literal_eval`. Only the standard library is imported, so a
command can check its input before it spends seconds on importing torch.
"""

import ast
import csv
import hashlib
import io
import json
import os
import random
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TextIO, TypeGuard, cast

from minionerec.data import parallel
from minionerec.errors import InputError, Problems

csv.field_size_limit(sys.maxsize)

SID_COLUMNS = ("history_item_sid", "item_sid")
TITLE_COLUMNS = ("history_item_title", "item_title")
ITEM_COLUMN = "item_id"
ITEM_HISTORY_COLUMN = "history_item_id"
HISTORY_COLUMN = "history"  # of a file of requests
REQUEST_COLUMNS = ("K", "exclude_seen", "allow", "deny", "where")  # what JSON lines may also have

MOST_PROBLEMS = 5  # of one file that are listed; the others are only counted


class FileProblems:
    """The problems of one file, `named` as messages begin: the first few in full, and the number of the others."""

    def __init__(self, named: str):
        self.named = named
        self.lines: list[str] = []
        self.count = 0

    def add(self, place: str, problem: str) -> None:
        self.count += 1
        if self.count <= MOST_PROBLEMS:
            self.lines.append(f"{self.named}{place}: {problem}")

    def check(self) -> None:
        if self.count > MOST_PROBLEMS:
            self.lines.append(f"{self.named}: {self.count - MOST_PROBLEMS} more problems like these")
        if self.lines:
            raise InputError(self.lines)


def shorten(value: object, width: int = 80) -> str:
    """`repr(value)` cut to `width` characters, for messages."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that UTF-8 can encode: escapes in JSON and lists can stand for half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Item:
    """An item of the catalogue. `sid` is its SID tokens, joined. A missing text is empty."""

    sid: str
    title: str
    description: str


@dataclass(frozen=True)
class Catalogue:
    """The items of an index file.

    Attributes:
        items: item id -> item, in the order of the file.
        sid_tokens: the distinct SID tokens, sorted.
        tokens_of: SID -> its tokens.
    """

    items: dict[str, Item]
    sid_tokens: list[str]
    tokens_of: dict[str, list[str]]

    @property
    def sids(self) -> set[str]:
        return set(self.tokens_of)

    def items_with_text(self) -> list[Item]:
        """The items with a title or a description, for the tasks that go from these texts to SIDs and back."""
        return [item for item in self.items.values() if item.title or item.description]


@dataclass(frozen=True, slots=True)
class Interaction:
    """A row of an interactions file: a history, oldest first, and the item that followed. A missing title is empty."""

    sid_history: list[str]
    title_history: list[str]
    sid: str
    title: str

    def without_oldest(self, count: int) -> "Interaction":
        """Without the `count` oldest items of the history."""
        return Interaction(self.sid_history[count:], self.title_history[count:], self.sid, self.title)


def open_text(path: str, flag: str, newline: str | None = None) -> TextIO:
    if not path:
        raise InputError(f"--{flag} is missing; give the path of a file")
    check_is_file(path, flag)
    return open(path, encoding="utf-8-sig", newline=newline)


def check_is_file(path: str, flag: str) -> None:
    """Raises InputError if a flag does not name a file."""
    if not os.path.isfile(path):
        raise InputError(f"--{flag} {path}: {'is a folder, not a file' if os.path.isdir(path) else 'no such file'}")
    if not os.access(path, os.R_OK):
        raise InputError(f"--{flag} {path}: may not be read; its permissions forbid it")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes) -> object:
    """The value of a JSON text. Raises ValueError for other text, and for a key that occurs twice in an object: all but
    its last value would be lost."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{shorten(twice)} occurs twice in an object")
    return data


def read_json(path: str) -> dict:
    """What a JSON file holds. Raises InputError if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None


def read_json_object(path: str, flag: str) -> dict:
    with open_text(path, flag) as file:
        try:
            data = parse_json(file.read())
        except (ValueError, RecursionError) as error:
            raise InputError(f"--{flag} {path}: is not JSON: {error}") from None
    if not isinstance(data, dict) or not data:
        raise InputError(f"--{flag} {path}: expected a non-empty object with item ids as keys")
    return data


def read_catalogue(sid_index_path: str, item_meta_path: str | None = None) -> Catalogue:
    """The items of an index file, with titles and descriptions if a metadata file is given.

    Items without an entry in the metadata have empty texts. Raises InputError naming file, item and value.
    """
    missing = Problems()
    index = missing.attempt(read_json_object, sid_index_path, "sid_index_path") or {}
    metadata = {}
    if item_meta_path is not None:
        metadata = missing.attempt(read_json_object, item_meta_path, "item_meta_path") or {}
    missing.check()
    problems = FileProblems(f"--sid_index_path {sid_index_path}")
    tokens_of: dict[str, list[str]] = {}
    for item, tokens in index.items():
        if not isinstance(tokens, list) or not tokens or not all(is_text(t) and t.strip() for t in tokens):
            problems.add(f", item {item!r}", f"expected a list of SID tokens, found {shorten(tokens)}")
        elif (other := tokens_of.setdefault("".join(tokens), tokens)) != tokens:
            problems.add(f", item {item!r}", f"{shorten(tokens)} and {shorten(other)} join to one text; rename tokens")
    problems.check()
    problems = FileProblems(f"--item_meta_path {item_meta_path}")
    items = {}
    for item, tokens in index.items():
        texts = _item_texts(metadata.get(item, {}), item, problems)
        if texts is not None:
            items[item] = Item("".join(tokens), *texts)
    problems.check()
    if metadata and not any(item.title or item.description for item in items.values()):
        raise InputError(
            f"--item_meta_path {item_meta_path}: has no title and no description for any item of {sid_index_path}; "
            "do the two files belong together?"
        )
    return Catalogue(items, sorted({token for tokens in index.values() for token in tokens}), tokens_of)


def read_titles_and_descriptions(item_meta_path: str) -> list[str]:
    """The titles and descriptions of a metadata file, to train a tokenizer on."""
    metadata = read_json_object(item_meta_path, "item_meta_path")
    problems = FileProblems(f"--item_meta_path {item_meta_path}")
    entries = [_item_texts(fields, item, problems) for item, fields in metadata.items()]
    problems.check()
    good = [entry for entry in entries if entry is not None]  # all of them, or `check` has raised
    texts = [title for title, _ in good] + [description for _, description in good]
    if not any(texts):
        raise InputError(
            f"--item_meta_path {item_meta_path}: no item has a title or a description; is it the metadata?"
        )
    return texts


def _item_texts(fields: object, item: str, problems: FileProblems) -> tuple[str, str] | None:
    """Title and description of an entry of the metadata, or None if one of them is not text: see `problems` then."""
    if not isinstance(fields, dict):
        problems.add(f", item {item!r}", f"expected an object with a title, found {shorten(fields)}")
        return None
    title, description = _text(fields.get("title")), _description(fields.get("description"))
    if title is not None and description is not None:
        return title, description
    name = "title" if title is None else "description"
    problems.add(
        f", item {item!r}",
        f"{name} must be text or a list of texts, found {shorten(fields[name])}; write null for a missing one",
    )
    return None


# What programs write where a text is missing: Python and pandas, R, Excel, JSON, SQL and its dumps. They write it like
# this, so "Nan", "Null" and "none" are titles. pandas.read_csv takes the same words, without NaT and \N.
MISSING = frozenset(
    {"nan", "NaN", "-nan", "-NaN", "NaT", "<NA>", "None", "NA", "N/A", "n/a", "#N/A", "#NA", "#N/A N/A", "null", "NULL"}
    | {"\\N", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
)


def present(text: str) -> str:
    """The text without spaces at its ends; empty if it stands for a missing one."""
    text = text.strip()
    return "" if text in MISSING else text


def _text(value: object) -> str | None:
    """The text of a JSON value: empty for null, NaN and the words of MISSING; the texts of a list, joined. None for any
    other value, such as an object or a number."""
    if isinstance(value, list):
        parts = [_text(part) for part in value if not isinstance(part, list)]  # a list within a list is not text
        return " ".join(filter(None, parts)) if len(parts) == len(value) and None not in parts else None
    if value is None or value != value:
        return ""
    if not is_text(value):
        return None
    return present(value)


def _description(value: object) -> str | None:
    """`_text` of a description, which published files often write as the text of a Python list of paragraphs."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        parts = _list_cell(value, missing=True)
        return _text(value if parts is None else parts)
    return _text(value)


@dataclass(frozen=True, slots=True)
class InfoItem:
    """An item of an info file. `original_id` is the one of the shop, from the metadata, or empty."""

    id: str
    title: str
    sid: str
    original_id: str = ""


def read_info(path: str, catalogue: Catalogue | None = None) -> list[str]:
    """The distinct SIDs of an info file, in its order. Raises InputError as `read_info_items` does."""
    return list(dict.fromkeys(item.sid for item in read_info_items(path, catalogue)))


def read_info_items(path: str, catalogue: Catalogue | None = None) -> list[InfoItem]:
    """The items of an info file, in its order. Lines are SID, title and item id, separated by tabs.

    Raises InputError for a line of another form, an empty file, and, if a catalogue is given, an item whose SID differs
    between the two files.
    """
    problems = FileProblems(f"--info_file {path}")
    items: list[InfoItem] = []
    with open_text(path, "info_file", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\r\n")
                if not line.strip():
                    continue
                fields = line.split("\t")
                if len(fields) < 3 or not fields[0].strip():
                    problems.add(f", line {number}", f"expected SID<tab>title<tab>item id, found {shorten(line)}")
                    continue
                sid, item = fields[0].strip(), fields[-1].strip()
                items.append(InfoItem(item, present("\t".join(fields[1:-1])), sid))
                if catalogue is not None:
                    known = catalogue.items.get(item)
                    if known is None:
                        problems.add(f", line {number}", f"item {item!r} is not in the index file")
                    elif known.sid != sid:
                        problems.add(f", line {number}", f"item {item!r} is {sid} here and {known.sid} in the index")
        except UnicodeDecodeError as error:
            raise InputError(f"--info_file {path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    problems.check()
    if not items:
        raise InputError(f"--info_file {path}: is empty")
    return items


def with_original_ids(items: Iterable[InfoItem], metadata: dict) -> list[InfoItem]:
    """The items with the `original_id` of their entries in a metadata file, where they have one."""
    named = []
    for item in items:
        fields = metadata.get(item.id)
        original = fields.get("original_id") if isinstance(fields, dict) else None
        text = str(original).strip() if is_text(original) or type(original) is int else ""
        named.append(replace(item, original_id=text) if text else item)
    return named


def notes_on_titles(items: Iterable[InfoItem], metadata: dict, of: str) -> list[str]:
    """A warning if most items have another title in a metadata file, which `of` names, than in the info file: its ids
    then belong to other items, as in data that were prepared again, and so do original ids and columns."""
    rows = [(name, fields.get("title")) for name, fields in metadata.items() if isinstance(fields, dict)]
    titles = {name: present(title) for name, title in rows if is_text(title)}
    both = [item for item in items if item.title and titles.get(item.id)]
    other = [item.id for item in both if item.title.split() != titles[item.id].split()]
    if len(other) * 2 <= len(both):
        return []
    return [
        f"warning: {of} belongs to a different catalogue than the info file: {len(other)} of {len(both)} items have "
        f"other titles there, such as item {shorten(other[0])}, so its ids and columns are those of other items; give "
        "the item file that was written with the info file"
    ]


# A list of texts as Python writes it, with only quotes and backslashes escaped. These patterns read it several times as
# fast as `ast`, with the same result.
_TEXT = r"""(?:'[^'\\\n\r\0]*(?:\\['"\\][^'\\\n\r\0]*)*'|"[^"\\\n\r\0]*(?:\\['"\\][^"\\\n\r\0]*)*")"""
_PLAIN_TEXT = re.compile(_TEXT)
_PLAIN_LIST = re.compile(rf"\[{_TEXT}(?:, {_TEXT})*\]")
_PLAIN_NUMBERS = re.compile(r"\[\d+(?:, \d+)*\]", re.ASCII)
_ESCAPE = re.compile(r"\\(.)")


def _list_cell(text: str, missing: bool = False) -> list[str] | None:
    """The texts of a list cell, or None if the cell is not a list of texts. With `missing`, the elements None, nan
    and others that MISSING has are empty texts."""
    if _PLAIN_LIST.fullmatch(text):
        parts = [part[1:-1] for part in _PLAIN_TEXT.findall(text)]
        return parts if "\\" not in text else [_ESCAPE.sub(r"\1", part) for part in parts]
    try:
        if not missing:
            value = ast.literal_eval(text)
        elif isinstance(body := ast.parse(text.lstrip(" \t"), mode="eval").body, ast.List):
            value = ["" if _is_missing(part) else ast.literal_eval(part) for part in body.elts]
        else:
            return None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    if not isinstance(value, list) or joins_texts(text):
        return None
    texts = [_in_one_piece(part) if isinstance(part, str) else part for part in value]
    return texts if all(map(is_text, texts)) else None


def joins_texts(cell: str) -> bool:
    """Whether a Python literal has two texts with no comma between them, as numpy writes lists: Python joins them."""
    tokens = tokenize.generate_tokens(io.StringIO(cell.strip()).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    return (tokenize.STRING, tokenize.STRING) in pairwise(kinds)


def _in_one_piece(text: str) -> str:
    """Text in which two escapes for one letter, such as JSON writes for an emoji, are that letter."""
    try:
        return text if is_text(text) else text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return text


def _is_missing(node: ast.expr) -> bool:
    """Whether an element of a list is None, nan or another name that stands for a missing text."""
    return (isinstance(node, ast.Constant) and node.value is None) or (
        isinstance(node, ast.Name) and node.id in MISSING
    )


def read_interactions(
    path: str, flag: str, sids: Iterable[str] | None = None, titles: bool = True
) -> Iterator[Interaction]:
    """The rows of an interactions file, streamed: memory does not grow with the file.

    Args:
        path: a CSV file with the columns SID_COLUMNS and, with `titles`, TITLE_COLUMNS; others are ignored.
        flag: the name of the flag that gave the path, for messages.
        sids: the SIDs that may occur; None allows any.

    Raises InputError after the last row, naming file, line and value of the first bad cells.
    """
    known = set(sids) if sids is not None else None
    problems = FileProblems(f"--{flag} {path}")
    for line, cells in _csv_rows(path, flag, SID_COLUMNS + (TITLE_COLUMNS if titles else ())):
        interaction = _interaction(cells, titles, known)
        if isinstance(interaction, str):
            problems.add(f", line {line}", interaction)
        else:
            yield interaction
    problems.check()


def check_rows(
    path: str, flag: str, sids: Iterable[str] | None = None, titles: bool = True
) -> dict[tuple[bool, bool], int]:
    """Checks a whole interactions file, on several cores if it is large.

    Returns the numbers of rows, by whether they have the title of the target, and a title in the history. Raises
    InputError as `read_interactions` does.
    """
    parts = parallel.num_parts(os.path.getsize(path) if os.path.isfile(path) else 0)
    known = list(sids) if sids is not None else None
    found = parallel.in_parts(_check_part, parts, path=path, flag=flag, sids=known, titles=titles)
    problems = FileProblems(f"--{flag} {path}")
    bad = sorted((line, problem) for _, listed, _ in found for line, problem in listed)
    for line, problem in bad[:MOST_PROBLEMS]:
        problems.add(f", line {line}", problem)
    problems.count = sum(count for *_, count in found)
    problems.check()
    rows = Counter[tuple[bool, bool]]()
    for counted, *_ in found:
        rows.update({(target, history): count for target, history, count in counted})
    return dict(rows)


CHUNK = 1024  # rows that follow each other in a part


def _check_part(
    part: int, parts: int, path: str, flag: str, sids: list[str] | None, titles: bool
) -> tuple[list[tuple[bool, bool, int]], list[tuple[int, str]], int]:
    """Checks every `parts`-th chunk of an interactions file.

    Returns the counts of `check_rows`, the first few problems with their lines, and the number of problems.
    """
    known = set(sids) if sids is not None else None
    rows, listed, num_problems = Counter[tuple[bool, bool]](), list[tuple[int, str]](), 0
    read = _csv_rows(path, flag, SID_COLUMNS + (TITLE_COLUMNS if titles else ()))
    for number, (line, cells) in enumerate(read):
        if number // CHUNK % parts != part:
            continue
        interaction = _interaction(cells, titles, known)
        if not isinstance(interaction, str):
            rows[bool(interaction.title), any(map(str.strip, interaction.title_history))] += 1
        else:
            num_problems += 1
            if num_problems <= MOST_PROBLEMS:
                listed.append((line, interaction))
    return [(*texts, count) for texts, count in rows.items()], listed, num_problems


def count_rows(path: str, flag: str, sids: Iterable[str] | None = None, titles: bool = True) -> int:
    """Checks a whole interactions file and counts its rows. Raises InputError as `read_interactions` does."""
    return sum(check_rows(path, flag, sids, titles).values())


def read_histories(path: str, problems: FileProblems) -> Iterator[tuple[int, list]]:
    """The histories of a CSV file of --histories, each with its line: of the column HISTORY_COLUMN, whose lists may
    name items as requests do, or else the SIDs of an interactions file. The file needs no other column: those who are
    to get recommendations have no next item yet. Bad cells go to `problems`. Raises InputError where the file cannot be
    read.
    """
    with open_text(path, "histories", newline="") as file:
        try:
            header = next(csv.reader(file), [])
            column = HISTORY_COLUMN if HISTORY_COLUMN in header else SID_COLUMNS[0]
            ignored = [name for name in REQUEST_COLUMNS if name in header]
            if ignored:
                raise InputError(
                    f"--histories {path}: of a CSV file only the histories are read, not {', '.join(ignored)}; give "
                    "JSON lines, or drop the column"
                )
        except (UnicodeDecodeError, csv.Error):
            column = SID_COLUMNS[0]  # `_csv_rows` says what is wrong
    for line, (cell,) in _csv_rows(path, "histories", (column,)):
        history = "the row ends before it" if cell is None else _history(cell, column)
        if isinstance(history, str):
            problems.add(f", line {line}", history)
        else:
            yield line, history


def _history(cell: str, column: str) -> list | str:
    """The items of a cell, or what is wrong with it."""
    if column == SID_COLUMNS[0]:
        return _sid_history(cell)
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        value = None
    return value if isinstance(value, list) and not joins_texts(cell) else _not_a_list(column, cell)


def read_item_ids(path: str, flag: str) -> list[str]:
    """The item id of the target of every row of an interactions file, its column ITEM_COLUMN. Raises InputError where
    there is no such column, or the file cannot be read."""
    return [(cell or "").strip() for _, (cell,) in _csv_rows(path, flag, (ITEM_COLUMN,))]


def read_item_histories(path: str, flag: str) -> Iterator[list[str]]:
    """The item ids of the history of every row of an interactions file, its column ITEM_HISTORY_COLUMN. Raises
    InputError where there is no such column, a cell is not a list, or the file cannot be read."""
    for line, (cell,) in _csv_rows(path, flag, (ITEM_HISTORY_COLUMN,)):
        if cell and _PLAIN_NUMBERS.fullmatch(cell):
            yield cell[1:-1].split(", ")
            continue
        history = _history(cell or "", ITEM_HISTORY_COLUMN)
        if isinstance(history, str):
            raise InputError(f"--{flag} {path}, line {line}: {history}")
        yield [str(item).strip() for item in history]


def _csv_rows(path: str, flag: str, needed: tuple[str, ...]) -> Iterator[tuple[int, Sequence[str | None]]]:
    """The cells of the `needed` columns of a CSV file, each row with its line; None where the row ends before one.
    Blank lines are no rows. Raises InputError where the file lacks a column, cannot be read, or has no rows."""
    num_rows = 0
    with open_text(path, flag, newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            missing = [name for name in needed if name not in header]
            if missing:
                found = ", ".join(header) or "no header"
                found = found if len(found) <= 200 else f"{found[:199]}…"  # JSON in one line is one long header
                raise InputError(f"--{flag} {path}: column {', '.join(missing)} is missing; the file has {found}")
            place_of = {name: place for place, name in enumerate(header)}
            places = [place_of[name] for name in needed]
            last = max(places)
            for row in filter(None, reader):
                num_rows += 1
                if len(row) > last:
                    yield reader.line_num, [row[place] for place in places]
                else:
                    yield reader.line_num, [row[place] if place < len(row) else None for place in places]
        except UnicodeDecodeError as error:
            raise InputError(f"--{flag} {path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except csv.Error as error:
            raise InputError(f"--{flag} {path}, line {reader.line_num}: is not CSV: {error}") from None
    if not num_rows:
        raise InputError(f"--{flag} {path}: has no rows")


def _interaction(cells: Sequence[str | None], titles: bool, known: set[str] | None) -> Interaction | str:
    """A checked row from its cells in SID_COLUMNS and, with `titles`, TITLE_COLUMNS; or what is wrong with it."""
    if None in cells:
        return f"the row ends before column {(*SID_COLUMNS, *TITLE_COLUMNS)[cells.index(None)]}"
    sid_cell, target, title_cell, title = (
        cast(Sequence[str], cells) if titles else (*cast(Sequence[str], cells), "", "")
    )
    sid_history = _sid_history(sid_cell)
    if isinstance(sid_history, str):
        return sid_history
    title_history = _list_cell(title_cell, missing=True) if titles else []
    if title_history is None:
        return _not_a_list(TITLE_COLUMNS[0], title_cell)
    if titles and len(title_history) != len(sid_history):
        return f"history_item_title has {len(title_history)} entries, history_item_sid {len(sid_history)}"
    sid = target.strip()
    if known is not None:
        for value in [sid, *sid_history]:
            if value not in known:
                return f"SID {shorten(value)} is not in the index or info file"
    elif not sid:
        return "item_sid is empty"
    if not MISSING.isdisjoint(map(str.strip, title_history)):
        title_history = ["" if text.strip() in MISSING else text for text in title_history]
    return Interaction(sid_history, title_history, sid, present(title))


def _sid_history(cell: str) -> list[str] | str:
    """The SIDs of a history, or what is wrong with them, as text."""
    history = _list_cell(cell)
    if history is None:
        return _not_a_list(SID_COLUMNS[0], cell)
    return history or f"{SID_COLUMNS[0]} is empty; a row needs at least one past item"


def _not_a_list(column: str, cell: str) -> str:
    return f"{column} must be a list of texts with commas, such as ['a', 'b'], found {shorten(cell)}"


def sample_rows(rows: Iterable, count: int, sample: int, seed: int) -> Iterator:
    """`sample` of the `count` rows, chosen at random, in their order; all of them if `sample` is -1."""
    if sample < 0 or sample >= count:
        yield from rows
        return
    chosen = set(random.Random(seed).sample(range(count), sample))
    yield from (row for number, row in enumerate(rows) if number in chosen)
