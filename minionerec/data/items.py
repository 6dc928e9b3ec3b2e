"""The items of a catalogue, found by id, SID or title, and the SIDs that stand for them. Several items may share a SID.

Only the standard library is imported.
"""

import difflib
import itertools
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal, TypeVar

from minionerec.data.files import (
    ITEM_COLUMN,
    FileProblems,
    InfoItem,
    Interaction,
    check_is_file,
    is_text,
    read_interactions,
    read_item_ids,
    shorten,
)
from minionerec.errors import InputError

ExcludeSeen = bool | Literal["earlier"]  # what of a history is not recommended again: see `left_out`
T = TypeVar("T", bound=Hashable)


class Items:
    """The items of an info file, by number: their place in the file.

    Attributes:
        all: the items; `all[number]` has ids, title and SID.
        number_of: item id -> number.
        named: what requests may name an item by, id or original id -> number.
        notes: lines about ids that they may not.
        of_sid: SID -> numbers of its items, the most popular first; SIDs are in the order of the file.
        sids: the distinct SIDs.
    """

    def __init__(
        self, items: Iterable[InfoItem], source: str, purchases: Iterable[str] = (), only_original_ids: bool = False
    ):
        """
        Args:
            source: the info file, for messages.
            purchases: the ids of items that were bought, each as often as it was. Items that share a SID are ordered by
                them; ties keep the order of the file.
            only_original_ids: requests name items by those, and never by the ids of the info file. Else they may use
                both, unless an original id is the id of another item.

        Raises InputError for an item without an id, or two with the same one. A repeated line counts once.
        """
        self.all = list(dict.fromkeys(items))
        self.number_of = {item.id: number for number, item in enumerate(self.all)}
        if len(self.number_of) < len(self.all) or "" in self.number_of:
            problems, seen = FileProblems(f"--info_file {source}"), dict[str, InfoItem]()
            for item in self.all:
                if not item.id:
                    problems.add("", f"{item.sid} has no item id")
                elif (other := seen.setdefault(item.id, item)) is not item:
                    problems.add("", f"item {item.id!r} is listed as {other.sid} and as {item.sid}, or with two titles")
            problems.check()
        self.only_original_ids, self.notes = only_original_ids, list[str]()
        self.named = self._named()
        bought = Counter(purchases)
        self.of_sid: dict[str, list[int]] = {}
        for number, item in enumerate(self.all):
            self.of_sid.setdefault(item.sid, []).append(number)
        for numbers in self.of_sid.values():
            if len(numbers) > 1:
                numbers.sort(key=lambda number: -bought[self.all[number].id])
        self.sids = list(self.of_sid)

    def __len__(self) -> int:
        return len(self.all)

    def _named(self) -> dict[str, int]:
        originals: dict[str, int] = {}
        other: dict[str, InfoItem] = {}  # original id -> another item that it may mean
        for number, item in enumerate(self.all):
            if item.original_id and originals.setdefault(item.original_id, number) != number:
                other[item.original_id] = item
        if self.only_original_ids:
            without = [item.id for item in self.all if not item.original_id]
            if without:
                raise InputError(
                    f"--original_ids: {len(without):,} items have no original_id in --item_meta_path, such as "
                    f"{shorten(without[0])}; prepare_data.py writes them"
                )
            if other:
                raise InputError(
                    f"--original_ids: {len(other):,} belong to several items, such as {shorten(min(other))}"
                )
            return originals
        other |= {
            text: self.all[self.number_of[text]]
            for text, number in originals.items()
            if self.number_of.get(text, number) != number
        }
        if other:
            self.notes.append(
                f"note: requests name items by the ids of the info file: {len(other):,} original ids could mean two "
                f"items, such as {shorten(min(other))}; --original_ids True takes original ids only"
            )
            return self.number_of
        return {**self.number_of, **originals}

    def id_of(self, number: int) -> str:
        """What requests name an item by."""
        item = self.all[number]
        return item.original_id if self.only_original_ids else item.id

    @property
    def num_sharing(self) -> int:
        """How many items share their SID with another one."""
        return sum(len(numbers) for numbers in self.of_sid.values() if len(numbers) > 1)

    @cached_property
    def of_title(self) -> dict[str, list[int]]:
        """Title -> numbers of the items that have it."""
        of_title = defaultdict(list)
        for number, item in enumerate(self.all):
            if item.title:
                of_title[item.title].append(number)
        return dict(of_title)

    def find(self, text: str) -> list[int]:
        """The numbers of the items that an id, a SID or a title stands for: of one item, or of all that share a SID.

        Where a text can be read in several ways, an id comes before a SID, and a SID before a title. Raises InputError
        for an unknown text, or a title of items with different SIDs.
        """
        text = text.strip()
        if text in self.named:
            return [self.named[text]]
        found = self.of_sid.get(text) or self.of_title.get(text)
        if not found:
            hint = "; items are named by their original_id" if text in self.number_of else ""
            if len(parts := text.split()) > 1 and all(part in self.named for part in parts):
                hint = "; separate items by commas"
            raise InputError(f"{shorten(text)} is no item id, SID or title of the info file{hint}")
        if len({self.all[number].sid for number in found}) > 1:
            ids = ", ".join(map(self.id_of, found[:5]))
            raise InputError(f"{shorten(text)} is the title of several items; give an id: {ids}")
        return found

    def knows(self, text: str) -> bool:
        """Whether a text is an item id, a SID or a title, even one of several items."""
        return any(text.strip() in known for known in (self.named, self.of_sid, self.of_title))

    def search(self, words: str, most: int) -> Iterator[InfoItem]:
        """At most `most` items: the one with this id, then those whose titles contain all the words, in any case, in
        the order of the file."""
        wanted = words.casefold().split()
        named = self.named.get(words.strip())
        titled = (i for i, title in enumerate(self._folded_titles) if all(word in title for word in wanted))
        numbers = itertools.chain([] if named is None else [named], (i for i in titled if i != named))
        return (self.all[number] for number in itertools.islice(numbers, most))

    @cached_property
    def _folded_titles(self) -> list[str]:
        return [item.title.casefold() for item in self.all]

    def rank_of(self, target: int | None, sids: Sequence[str], length: int) -> int | None:
        """The place of an item, from 0, among the first `length` items of ranked SIDs; None if it is not there. Those
        that share a SID follow each other, the most bought first."""
        ranked = self.ranked(sids, length)
        return ranked.index(target) if target in ranked else None

    def ranked(self, sids: Sequence[str], most: int) -> list[int]:
        """The numbers of the items of ranked SIDs, best first, at most `most`."""
        numbers: list[int] = []
        for sid in sids:
            numbers += self.of_sid[sid]
            if len(numbers) >= most:
                break
        return numbers[:most]


def left_out(history: Sequence[Collection[T]], exclude_seen: ExcludeSeen) -> set[T]:
    """What is not recommended again after a history, whose entries each stand for one thing or several: all of it, with
    "earlier" all but what the last entry stands for, or nothing."""
    seen = {one for entry in history for one in entry} if exclude_seen else set[T]()
    return seen.difference(*history[-1:]) if exclude_seen == "earlier" else seen


def seen_sids(row: Interaction, exclude_seen: ExcludeSeen) -> set[str]:
    """The SIDs of a row's history that are not recommended again."""
    return left_out([[sid] for sid in row.sid_history], exclude_seen)


def share_sids(listed: Sequence[InfoItem]) -> bool:
    """Whether some items of an info file share a SID. A repeated line is one item."""
    return len(set(listed)) > len({item.sid for item in listed})


def read_targets(
    listed: Sequence[InfoItem], info_file: str, train_file: str, test_file: str
) -> tuple[Items, list[int | None]]:
    """The items of an info file, those that share a SID ordered by the training file, if there is one, and the number
    of the item that each row of a test file has as its target; None for one that is not among them.

    Raises InputError where the test file does not name items, or names others than the info file.
    """
    purchases = read_item_ids(train_file, "train_file") if train_file else ()
    items = Items(listed, info_file, purchases)
    rows = read_interactions(test_file, "test_data_path", titles=False)
    targets = [items.number_of.get(item) for item in read_item_ids(test_file, "test_data_path")]
    for number, (target, row) in enumerate(zip(targets, rows, strict=True), 1):
        if target is not None and items.all[target].sid != row.sid:
            raise InputError(
                f"item {items.all[target].id!r} is {items.all[target].sid} in {info_file} and {row.sid} in {test_file}"
            )
        if target is None and row.sid in items.of_sid:
            known = items.all[items.of_sid[row.sid][0]].id
            raise InputError(
                f"{test_file}, row {number}: {ITEM_COLUMN} is no item of {info_file}, where {row.sid} is item {known!r}"
            )
    return items, targets


def read_item_list(path: str, flag: str, items: Items) -> frozenset[int]:
    """The items whose ids a file lists, one per line. Raises InputError, naming lines, for ids that are not known."""
    check_is_file(path, flag)
    problems, numbers = FileProblems(f"--{flag} {path}"), set()
    with open(path, encoding="utf-8-sig") as file:
        try:
            for line, text in enumerate(file, 1):
                item = text.strip()
                if item in items.named:
                    numbers.add(items.named[item])
                elif item:
                    problems.add(f", line {line}", f"item id {shorten(item)} is not in the info file")
        except UnicodeDecodeError as error:
            raise InputError(f"--{flag} {path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    problems.check()
    if not numbers:
        raise InputError(f"--{flag} {path}: lists no item ids")
    return frozenset(numbers)


class ItemColumns:
    """The columns of an item file (`*.item.json`), to choose items by their values."""

    def __init__(self, item_meta_path: str, items: Items, metadata: dict):
        """`metadata` is what the file has. Raises InputError where it has none of the items."""
        self.path = item_meta_path
        self.rows = [metadata.get(item.id) for item in items.all]
        self.names = sorted({name for row in self.rows if isinstance(row, dict) for name in row})
        self._numbers: dict[str, dict[str, set[int]]] = {}
        self._choices: dict[str, list[str]] | None = None
        self._amounts: dict[str, dict[int, float]] = {}
        if not self.names:
            raise InputError(f"--item_meta_path {item_meta_path}: has none of the items of the info file")

    def choices(self, most: int) -> dict[str, list[str]]:
        """The columns with values that several items share, each with at most `most` values as the file writes them,
        the most common first. Titles and descriptions are no choice."""
        if self._choices is None:
            found = {}
            for name in self.names:
                cells = (row.get(name) for row in self.rows if isinstance(row, dict))
                values = Counter(text for cell in cells for text in _parts(cell))
                if name not in ("title", "description") and values and len(values) * 2 <= values.total():
                    found[name] = [text for text, _ in values.most_common(most)]
            self._choices = found  # at once: requests are answered in several threads
        return self._choices

    def where(self, condition: str) -> frozenset[int]:
        """The items that `column=value` selects: those whose column is the value, is a list that contains it, or is
        text with commas, one part of which is it; in any case. Or those that `column<number` selects, or <=, > and >=:
        the first number in the column is compared. Raises InputError where there are none."""
        name, sign, value = map(str.strip, [*_SIGN.split(condition, maxsplit=1), "", ""][:3])
        if not sign or not value:
            raise InputError(f"where {shorten(condition)}: give column=value, such as brand=3M, or price<20")
        if name not in self.names:
            raise InputError(
                f"where {shorten(condition)}: {self.path} has no column {shorten(name)}; it has {', '.join(self.names)}"
            )
        return self._equal(name, value, condition) if sign == "=" else self._compared(name, sign, value, condition)

    def _equal(self, name: str, value: str, condition: str) -> frozenset[int]:
        if name not in self._numbers:
            numbers: dict[str, set[int]] = defaultdict(set)
            for number, row in enumerate(self.rows):
                if isinstance(row, dict):
                    for text in _values(row.get(name)):
                        numbers[text].add(number)
            self._numbers[name] = dict(numbers)
        found = self._numbers[name].get(value.casefold())
        if not found:
            known = self._numbers[name] if len(self._numbers[name]) <= MOST_COMPARED else ()
            close = difflib.get_close_matches(value.casefold(), known, n=1)
            hint = f"; did you mean {shorten(close[0])}?" if close else ""
            raise InputError(f"where {shorten(condition)}: no item has this value{hint}")
        return frozenset(found)

    def _compared(self, name: str, sign: str, value: str, condition: str) -> frozenset[int]:
        limit = _number(value)
        if limit is None:
            raise InputError(f"where {shorten(condition)}: {shorten(value)} is not a number")
        if name not in self._amounts:
            amounts = (
                (number, _number(row.get(name))) for number, row in enumerate(self.rows) if isinstance(row, dict)
            )
            self._amounts[name] = {number: amount for number, amount in amounts if amount is not None}
        compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[sign]
        found = frozenset(number for number, amount in self._amounts[name].items() if compare(amount, limit))
        if not found:
            known = len(self._amounts[name])
            raise InputError(
                f"where {shorten(condition)}: no item; {known:,} of {len(self.rows):,} have a number there"
            )
        return found


MOST_CHARACTERS = 1000  # of a text that are searched for a number; a request may bring a megabyte of digits
MOST_COMPARED = 1000  # values among which a mistyped one is searched; that takes up to a millisecond each

_SIGN = re.compile("(<=|>=|<|>|=)")
# Numbers as 1,299.00, 1'299.00 and 1 299.00, as 1.299,00, 1 299,00 and 3,50, and as 1299.0, .99 and 1e-05.
_THOUSANDS = r"\d{1,3}(?:[,'\u2019]\d{3})+(?:\.\d+)?|\d{1,3}(?:\s\d{3})+\.\d{1,2}"
_DECIMAL_COMMA = r"(?:\d{1,3}(?:[.\s]\d{3})+|\d+),\d{1,2}"
_PLAIN = r"(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][+-]?\d+(?!\w))?"
_NUMBER = re.compile(rf"-?(?:(?P<thousands>{_THOUSANDS})(?!\d|[,.]\d)|(?P<comma>{_DECIMAL_COMMA})(?![\d,.])|{_PLAIN})")


# Without decimals, a space may stand between two numbers, a dot before decimals, and commas between the values of a
# list. A currency next to them says that they group digits; of a dot, it must be one whose decimals have a comma.
_MAY_BE_GROUPED = re.compile(r"\d[\s.]\d{3}|,\d\d,")  # quick, for the others


def _with_currency(number: str, symbols: str, words: str) -> str:
    """A pattern for `number` after a currency, or before one, a price's dash, or the rest of `1 299 - 1 499 kr`."""
    currency = rf"(?:{symbols}|(?<![^\W\d_])(?:{words})(?![^\W\d_])\.?)"
    number = rf"{number}(?!\d|\.\d)"
    after = rf"[-\u2013\s\d.]{{0,20}}{currency}|[,:.][-\u2013\u2014]"
    return rf"{currency}\s?{number}(?!\w)|(?<![\d.,]){number}(?={after})"


_COMMA_SYMBOLS, _COMMA_WORDS = r"R\$|[€₫₺]", "kr|Kr|KR|SEK|NOK|DKK|ISK|EUR|BRL|Rp|IDR|VND|TL|TRY|Ft|HUF|lei|RON"
_OTHER_WORDS = "zł|PLN|Kč|CZK|руб|р|RUB|грн|UAH|лв|BGN|R|ZAR|Fr|CHF|CAD|USD|GBP"
_GROUPED = re.compile(
    "|".join(
        [
            _with_currency(r"[1-9]\d{0,2}(?:\s\d{3})+", r"[$£\u20a0-\u20cf]", f"{_COMMA_WORDS}|{_OTHER_WORDS}"),
            _with_currency(r"[1-9]\d{0,2}(?:\.\d{3})+", _COMMA_SYMBOLS, _COMMA_WORDS),
            _with_currency(r"\d{1,2}(?:,\d\d)+,\d{3}", "₹", "Rs|INR"),
            r"(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3}){2,}(?!\d|\.\d)",  # no decimals have two dots
            r"(?<![\d.,])[1-9]\d{0,2}(?:[\xa0\u2009\u202f]\d{3})+(?!\d)",  # spaces within a number
            r"^[1-9]\d{0,2}(?:\s\d{3})+$",
        ]
    )
)


def _number(value: object) -> float | None:
    """The first number of a cell, such as 3.4 of `$3.40 - $5.00`; None where there is none."""
    if isinstance(value, list):
        return next((number for part in value[:10] if (number := _number(part)) is not None), None)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if not isinstance(value, str):
        return float(value) if abs(value) < 1e300 else None  # not NaN either
    value = value[:MOST_CHARACTERS]
    if _MAY_BE_GROUPED.search(value):
        value = _GROUPED.sub(lambda grouped: re.sub(r"(?<=\d)[\s.,](?=\d)", "", grouped.group()), value.strip())
    found = _NUMBER.search(value)
    if found is None:
        return None
    text = found.group()
    if found["comma"]:
        text = text.replace(".", "").replace(",", ".")
    return float(re.sub(r"[,'\u2019\s]", "", text))


def _parts(value: object) -> Iterator[str]:
    """The values of a cell as it writes them, the whole of a text with commas left out."""
    if isinstance(value, list):
        for part in value:
            yield from () if isinstance(part, list) else _parts(part)
    elif isinstance(value, bool | int | float) or is_text(value):
        yield from dict.fromkeys(part for part in map(str.strip, str(value).split(",")) if part)


def _values(value: object) -> Iterator[str]:
    """The values that a cell of the item file stands for, without regard to case."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, list):
                yield from _values(part)
    elif isinstance(value, bool | int | float) or is_text(value):
        text = str(value).casefold().strip()
        yield from {text, *(part.strip() for part in text.split(","))} - {""}
