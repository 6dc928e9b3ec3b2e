"""What a request for recommendations may say, on a line of a file or in the body of a POST, checked.

    {"history": ["12", "<a_1><b_2><c_3>", "Bolt, M4"], "K": 5, "exclude_seen": true, "allow": ["7", "8"],
     "deny": ["9"], "where": "brand=3M"}

Only "history" is needed; null stands for what is not given. Only the standard library is imported.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minionerec.data.files import (
    MOST_PROBLEMS,
    FileProblems,
    is_text,
    open_text,
    parse_json,
    read_histories,
    shorten,
)
from minionerec.data.items import ExcludeSeen, ItemColumns, Items, left_out
from minionerec.errors import InputError, Problems

MOST_HISTORY = 1_000  # items of a history; longer ones are refused, since a model reads a few dozen
LISTS = ("history", "allow", "deny")
KEYS = {"history", "K", "exclude_seen", "allow", "deny", "where"}


class RequestProblems(Problems):
    """What is wrong with one request: the first few problems, and the number of the others. A request may name 100,000
    items; the answer must not be longer than it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def extend(self, problems: Iterable[str]) -> None:
        for problem in problems:
            self.add(problem)

    def add(self, problem: str) -> None:
        self.total += 1
        if self.total <= MOST_PROBLEMS:
            self.append(problem)

    def check(self) -> None:
        if self.total > MOST_PROBLEMS:
            self.append(f"{self.total - MOST_PROBLEMS:,} more problems like these")
        super().check()


@dataclass(frozen=True)
class Request:
    """A checked request. Items are numbers in `Items.all`.

    Attributes:
        given: the history as it was written.
        history: for each of its entries, oldest first, the items that it stands for.
        K: how many items to recommend.
        without: items that are not to be recommended.
        only: sets of items, all of which a recommended item must be in.
    """

    given: list[str]
    history: list[list[int]]
    K: int
    without: frozenset[int] = frozenset()
    only: tuple[frozenset[int], ...] = ()


class RequestReader:
    """Checks requests against a catalogue, and fills in what they do not say."""

    def __init__(
        self,
        items: Items,
        columns: ItemColumns | None,
        K: int,
        most: int,
        exclude_seen: ExcludeSeen = False,
        only: tuple[frozenset[int], ...] = (),
    ):
        """
        Args:
            columns: of the item file, for "where"; None where no such file was given.
            K, exclude_seen: where a request does not say.
            most: the largest K, the number of beams.
            only: as in `Request`, for every request.
        """
        self.items, self.columns, self.K, self.most = items, columns, K, most
        self.exclude_seen, self.only = exclude_seen, only

    def read(self, data: object, most_listed: int | None = None) -> Request:
        """The request in a JSON value, with at most `most_listed` items in "allow" and in "deny". Raises InputError
        with what is wrong with it."""
        if not isinstance(data, dict):
            raise InputError(f'expected an object such as {{"history": ["12", "40"]}}, found {shorten(data)}')
        problems = RequestProblems()
        for name in sorted(set(data) - KEYS, key=str):
            problems.add(f"{shorten(name)} is unknown; a request may have {', '.join(sorted(KEYS))}")
        data = {name: value for name, value in data.items() if value is not None}
        most = {"history": MOST_HISTORY, "allow": most_listed, "deny": most_listed}
        given = {name: problems.attempt(_texts, name, data.get(name, []), most[name]) or [] for name in LISTS}
        if not given["history"] and not problems:
            problems.add('"history" is missing or empty; give at least one item')
        K, exclude_seen, where = data.get("K", self.K), data.get("exclude_seen", self.exclude_seen), data.get("where")
        if type(K) is not int or not 1 <= K <= self.most:
            problems.add(f'"K" must be a whole number from 1 to {self.most} (--num_beams), found {shorten(K)}')
        if not isinstance(exclude_seen, bool) and exclude_seen != "earlier":
            problems.add(f'"exclude_seen" must be true, false or "earlier", found {shorten(exclude_seen)}')
        found = {name: self._find(problems, name, texts) for name, texts in given.items()}
        only = list(self.only)
        if "allow" in data:
            only.append(frozenset(number for numbers in found["allow"] for number in numbers))
        if where is not None:
            chosen = problems.attempt(self._where, where)
            only += [chosen] if chosen else []
        problems.check()
        denied = {number for numbers in found["deny"] for number in numbers}
        without = frozenset(denied | left_out(found["history"], exclude_seen))
        return Request(given["history"], found["history"], K, without, tuple(only))

    def _find(self, problems: Problems, name: str, texts: list[str]) -> list[list[int]]:
        found = [problems.attempt(self._find_one, name, text) for text in texts]
        return [numbers for numbers in found if numbers is not None]

    def _find_one(self, name: str, text: str) -> list[int]:
        try:
            return self.items.find(text)
        except InputError as error:
            raise InputError(f'"{name}": {error}') from None

    def _where(self, condition: object) -> frozenset[int]:
        if self.columns is None:
            raise InputError('"where" needs --item_meta_path, the file with the columns of the items')
        if not isinstance(condition, str):
            raise InputError(f'"where" must be text such as "brand=3M", found {shorten(condition)}')
        return self.columns.where(condition)

    def read_file(self, path: str) -> Iterator[Request]:
        """The requests of the file of --histories, streamed: a CSV file with histories, or JSON lines.

        Raises InputError after the last row, naming the lines of the first bad ones.
        """
        problems = FileProblems(f"--histories {path}")
        count = 0
        read = _csv_histories if path.lower().endswith(".csv") else _json_lines
        for line, data in read(path, problems):
            count += 1
            try:
                yield self.read(data)
            except InputError as error:
                for problem in error.problems:
                    problems.add(f", line {line}", problem)
        problems.check()
        if not count:
            raise InputError(f"--histories {path}: has no rows")

    def parse_history(self, text: str) -> object:
        """The history on a command line: a JSON list, one item, or ids and SIDs separated by commas."""
        text = text.strip()
        if self.items.knows(text):
            return [text]
        if text.startswith("["):
            try:
                return json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"--history {shorten(text)}: is not a JSON list: {error}") from None
        return [part.strip() for part in text.split(",")]


def _texts(name: str, value: object, most: int | None) -> list[str]:
    """A list of at most `most` texts; item ids may be written as numbers."""
    if not isinstance(value, list):
        raise InputError(f'"{name}" must be a list of items, found {shorten(value)}')
    if most is not None and len(value) > most:
        raise InputError(f'"{name}" has {len(value):,} items; at most {most:,} are allowed')
    texts = [str(part) if type(part) is int and abs(part) < 10**18 else part for part in value]
    for part in texts:
        if not is_text(part):
            raise InputError(f'"{name}" must be a list of item ids, SIDs or titles, found {shorten(part)} in it')
    return texts


def _csv_histories(path: str, problems: FileProblems) -> Iterator[tuple[int, object]]:
    for line, history in read_histories(path, problems):
        yield line, {"history": history}


def _json_lines(path: str, problems: FileProblems) -> Iterator[tuple[int, object]]:
    with open_text(path, "histories") as file:
        try:
            for line, text in enumerate(file, 1):
                if text.strip():
                    try:
                        yield line, parse_json(text)
                    except (ValueError, RecursionError) as error:
                        problems.add(f", line {line}", f"is not JSON: {error}")
        except UnicodeDecodeError as error:
            raise InputError(f"--histories {path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
