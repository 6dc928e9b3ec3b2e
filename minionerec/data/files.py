"""Readers of the files of the public MiniOneRec release, with every check that can be made before a model is loaded.

| file | content |
|---|---|
| index (`*.index.json`) | item id -> its semantic ID (SID) as a list of tokens |
| metadata (`*.item.json`) | item id -> title, description |
| info (tab-separated, whatever its extension) | SID, title, item id |
| interactions (`*.csv`) | one next-item event a row; histories are the text of a Python list, oldest first |

Nothing here executes data: list cells are read with `ast.literal_eval`. Only the standard library is imported, so a
command can check its input before it pays for torch.
"""

import ast
import csv
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minionerec.errors import InputError

csv.field_size_limit(sys.maxsize)

SID_COLUMNS = ("history_item_sid", "item_sid")
TITLE_COLUMNS = ("history_item_title", "item_title")

MOST_PROBLEMS = 5  # of one file that are printed one by one


class FileProblems:
    """The problems of one file: the first few in full, the others counted."""

    def __init__(self, path: str):
        self.path = path
        self.lines: list[str] = []
        self.count = 0

    def add(self, place: str, problem: str) -> None:
        self.count += 1
        if self.count <= MOST_PROBLEMS:
            self.lines.append(f"{self.path}{place}: {problem}")

    def check(self) -> None:
        if self.count > MOST_PROBLEMS:
            self.lines.append(f"{self.path}: {self.count - MOST_PROBLEMS} more problems like these")
        if self.lines:
            raise InputError(self.lines)


def shorten(value: object, width: int = 80) -> str:
    """`repr(value)` cut to `width` characters, for messages."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def is_text(value: object) -> bool:
    """Whether a value is text that can be written: escapes in JSON and lists can name half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Item:
    """A catalogue entry. `sid` is the SID's tokens written together. A missing text is empty."""

    sid: str
    title: str
    description: str


@dataclass(frozen=True)
class Catalogue:
    """All items by id, in the order of the index file; the distinct SID tokens, sorted; and the tokens of every SID."""

    items: dict[str, Item]
    sid_tokens: list[str]
    tokens_of: dict[str, list[str]]

    @property
    def sids(self) -> set[str]:
        return set(self.tokens_of)

    def items_with_text(self) -> list[Item]:
        """The items that have a title or a description, for the tasks between them and SIDs."""
        return [item for item in self.items.values() if item.title or item.description]


@dataclass(frozen=True, slots=True)
class Interaction:
    """One row of an interactions file: a history, oldest first, and the item that followed. A missing title is
    empty."""

    sid_history: list[str]
    title_history: list[str]
    sid: str
    title: str

    def without_oldest(self) -> "Interaction":
        return Interaction(self.sid_history[1:], self.title_history[1:], self.sid, self.title)


def _open(path: str, flag: str, newline: str | None = None):
    if not path:
        raise InputError(f"--{flag} is missing; give the path of a file")
    if not os.path.isfile(path):
        raise InputError(f"--{flag} {path}: no such file")
    return open(path, encoding="utf-8-sig", newline=newline)


def _read_json_object(path: str, flag: str) -> dict:
    with _open(path, flag) as file:
        try:
            data = json.load(file)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--{flag} {path}: is not JSON: {error}") from None
    if not isinstance(data, dict) or not data:
        raise InputError(f"--{flag} {path}: expected a non-empty object of item ids")
    return data


def read_catalogue(sid_index_path: str, item_meta_path: str | None = None) -> Catalogue:
    """The items of an index file, with titles and descriptions where a metadata file is given.

    Items without an entry in the metadata keep empty texts. Raises InputError naming file, item and value.
    """
    index = _read_json_object(sid_index_path, "sid_index_path")
    metadata = _read_json_object(item_meta_path, "item_meta_path") if item_meta_path is not None else {}
    problems = FileProblems(sid_index_path)
    tokens_of: dict[str, list[str]] = {}
    for item, tokens in index.items():
        if not isinstance(tokens, list) or not tokens or not all(is_text(t) and t.strip() for t in tokens):
            problems.add(f", item {item!r}", f"expected a list of SID tokens, found {shorten(tokens)}")
        elif (other := tokens_of.setdefault("".join(tokens), tokens)) != tokens:
            problems.add(f", item {item!r}", f"{shorten(tokens)} and {shorten(other)} are the same text; rename tokens")
    problems.check()
    problems = FileProblems(item_meta_path or "")
    items = {}
    for item, tokens in index.items():
        texts = _item_texts(metadata.get(item, {}), item, problems)
        if texts is not None:
            items[item] = Item("".join(tokens), *texts)
    problems.check()
    if metadata and not any(item.title or item.description for item in items.values()):
        raise InputError(
            f"--item_meta_path {item_meta_path}: none of the items of {sid_index_path} has a title or a description "
            "there; do the two files belong together?"
        )
    return Catalogue(items, sorted({token for tokens in index.values() for token in tokens}), tokens_of)


def read_titles_and_descriptions(item_meta_path: str) -> list[str]:
    """The texts of a metadata file, for a tokenizer to learn from."""
    metadata = _read_json_object(item_meta_path, "item_meta_path")
    problems = FileProblems(item_meta_path)
    texts = [_item_texts(fields, item, problems) for item, fields in metadata.items()]
    problems.check()
    texts = [title for title, _ in texts] + [description for _, description in texts]
    if not any(texts):
        raise InputError(
            f"--item_meta_path {item_meta_path}: no item has a title or a description; is it the metadata?"
        )
    return texts


def _item_texts(fields: object, item: str, problems: FileProblems) -> tuple[str, str] | None:
    """Title and description of an entry of the metadata, or None where one is no text, which `problems` then holds."""
    if not isinstance(fields, dict):
        problems.add(f", item {item!r}", f"expected an object with a title, found {shorten(fields)}")
        return None
    title, description = _text(fields.get("title")), _description(fields.get("description"))
    if title is not None and description is not None:
        return title, description
    name = "title" if title is None else "description"
    problems.add(
        f", item {item!r}",
        f"{name} must be text or a list of texts, found {shorten(fields[name])}; write null where there is none",
    )
    return None


# What Python writes for a float that is not a number, and so pandas for a missing text that was turned into one.
NAN = "nan"


def _text(value: object) -> str | None:
    """The text of a JSON value, empty for null, NaN and "nan"; the texts of a list are joined. None for anything else,
    such as an object or a number."""
    if isinstance(value, list):
        parts = [_text(part) for part in value if not isinstance(part, list)]  # no list in a list
        return " ".join(filter(None, parts)) if len(parts) == len(value) and None not in parts else None
    if value is None or value != value:
        return ""
    if not is_text(value):
        return None
    value = value.strip()
    return "" if value == NAN else value


def _description(value: object) -> str | None:
    """`_text` of a description; published files often hold the text of a list of paragraphs."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        parts = _list_cell(value, missing=True)
        return _text(value if parts is None else parts)
    return _text(value)


def read_info(path: str, catalogue: Catalogue | None = None) -> list[str]:
    """The distinct SIDs of an info file, in its order. Lines are SID, title and item id, separated by tabs.

    Raises InputError for a line of another shape, an empty file, and, given a catalogue, an item whose SID differs
    between the two files.
    """
    problems = FileProblems(path)
    sids: dict[str, None] = {}
    with _open(path, "info_file", newline="\n") as file:
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
                sids[sid] = None
                if catalogue is not None:
                    known = catalogue.items.get(item)
                    if known is None:
                        problems.add(f", line {number}", f"item {item!r} is not in the index file")
                    elif known.sid != sid:
                        problems.add(f", line {number}", f"item {item!r} is {sid} here and {known.sid} in the index")
        except UnicodeDecodeError as error:
            raise InputError(f"--info_file {path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    problems.check()
    if not sids:
        raise InputError(f"--info_file {path}: is empty")
    return list(sids)


# A list of texts as Python writes it, without escapes: read several times as fast as by `ast`, with the same result.
_TEXT = r"""(?:'[^'\\\n\r\0]*'|"[^"\\\n\r\0]*")"""
_PLAIN_TEXT = re.compile(_TEXT)
_PLAIN_LIST = re.compile(rf"\[{_TEXT}(?:, {_TEXT})*\]")


def _list_cell(text: str, missing: bool = False) -> list[str] | None:
    """The texts of a list cell, or None where the cell is no list of texts. With `missing`, None and nan, as Python
    writes them, are empty texts."""
    if _PLAIN_LIST.fullmatch(text):
        return [part[1:-1] for part in _PLAIN_TEXT.findall(text)]
    try:
        if not missing:
            value = ast.literal_eval(text)
        elif isinstance(body := ast.parse(text.lstrip(" \t"), mode="eval").body, ast.List):
            value = ["" if _is_missing(part) else ast.literal_eval(part) for part in body.elts]
        else:
            return None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    return value if isinstance(value, list) and all(map(is_text, value)) else None


def _is_missing(node: ast.expr) -> bool:
    """Whether an element of a list is None or nan."""
    return (isinstance(node, ast.Constant) and node.value is None) or (isinstance(node, ast.Name) and node.id == NAN)


def read_interactions(
    path: str, flag: str, sids: Iterable[str] | None = None, titles: bool = True
) -> Iterator[Interaction]:
    """The rows of an interactions file, streamed: memory does not grow with the file.

    Args:
        path: a CSV file with the columns SID_COLUMNS and, with `titles`, TITLE_COLUMNS; others are ignored.
        flag: the name of the flag that gave the path, for messages.
        sids: the SIDs that may occur; None takes any.

    Raises InputError after the last row, naming file, line and value of the first bad cells.
    """
    known = set(sids) if sids is not None else None
    problems = FileProblems(path)
    rows = 0
    with _open(path, flag, newline="") as file:
        reader = csv.DictReader(file)
        try:
            needed = SID_COLUMNS + (TITLE_COLUMNS if titles else ())
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"--{flag} {path}: column {', '.join(missing)} is missing; "
                    f"the file has {', '.join(reader.fieldnames or ()) or 'no header'}"
                )
            for row in reader:
                rows += 1
                interaction, problem = _interaction(row, titles, known)
                if problem:
                    problems.add(f", line {reader.line_num}", problem)
                else:
                    yield interaction
        except UnicodeDecodeError as error:
            raise InputError(f"--{flag} {path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except csv.Error as error:
            raise InputError(f"--{flag} {path}, line {reader.line_num}: is not CSV: {error}") from None
    problems.check()
    if not rows:
        raise InputError(f"--{flag} {path}: has no rows")


def _interaction(
    row: dict[str, str | None], titles: bool, known: set[str] | None
) -> tuple[Interaction, None] | tuple[None, str]:
    """A checked row, or what is wrong with it."""
    for column in SID_COLUMNS + (TITLE_COLUMNS if titles else ()):
        if row[column] is None:
            return None, f"the row ends before column {column}"
    sid = row["item_sid"].strip()
    sid_history = _list_cell(row["history_item_sid"])
    title_history = _list_cell(row["history_item_title"], missing=True) if titles else []
    for column, value in (("history_item_sid", sid_history), ("history_item_title", title_history)):
        if value is None:
            return None, f"{column} must be a list of texts such as ['a', 'b'], found {shorten(row[column])}"
    if not sid_history:
        return None, "history_item_sid is empty; a row needs at least one past item"
    if titles and len(title_history) != len(sid_history):
        return None, f"history_item_title has {len(title_history)} entries, history_item_sid {len(sid_history)}"
    if known is not None:
        for value in [sid, *sid_history]:
            if value not in known:
                return None, f"SID {shorten(value)} is not in the index or info file"
    elif not sid:
        return None, "item_sid is empty"
    title = row["item_title"].strip() if titles else ""
    if NAN in title_history:
        title_history = ["" if text == NAN else text for text in title_history]
    return Interaction(sid_history, title_history, sid, "" if title == NAN else title), None


def count_rows(path: str, flag: str, sids: Iterable[str] | None = None, titles: bool = True) -> int:
    """Checks a whole interactions file and counts its rows. Raises InputError as `read_interactions` does."""
    return sum(1 for _ in read_interactions(path, flag, sids, titles))


def sample_rows(rows: Iterable, count: int, sample: int, seed: int) -> Iterator:
    """`sample` of the `count` rows, chosen at random, in their order; all of them when `sample` is -1."""
    if sample < 0 or sample >= count:
        yield from rows
        return
    chosen = set(random.Random(seed).sample(range(count), sample))
    yield from (row for number, row in enumerate(rows) if number in chosen)
