"""Reads the interactions and items of raw files. Every row is used or refused: their numbers add up to those of the
file, and are printed."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from typing import TypeVar, cast

import numpy as np

from minionerec.data.files import shorten
from minionerec.errors import InputError
from minionerec.prepare.cells import (
    LATEST,
    DatesAsNumbers,
    identifier,
    is_shortened,
    not_an_id,
    number_of,
    sign_of,
    text_of,
    time_reader,
    times_of,
)
from minionerec.prepare.cleaning import INTERACTION, Spool
from minionerec.prepare.formats import ReadAgain, RefusedRows, Source
from minionerec.process_memory import without_collector

SHOWN_ROWS = 3  # of those that are left out
MOST_KNOWN = 1 << 20  # ids that are remembered as they were read
MOST_EVENTS = 1000  # kinds of events that are counted, for a message
BEFORE_LOGS = int(datetime(1990, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
EXPECTED_TIME = "expected a date or seconds since 1970, from 1970 to 2099"


@dataclass(frozen=True)
class Wanted:
    """Which interactions count, and how they are read.

    Attributes:
        window: the first microsecond of the time window, and the first after it.
        events: kinds of events; none for all.
        min_rating: the lowest rating; None for all.
        time_format: as in `cells.time_reader`.
        zone: of times that name none.
        skip_bad_rows: leave out rows that cannot be used.
    """

    window: tuple[int, int] = (0, LATEST)
    events: frozenset[str] = frozenset()
    min_rating: float | None = None
    time_format: str = ""
    zone: tzinfo = UTC
    skip_bad_rows: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the columns that are read."""
        asked = (*["event"] * bool(self.events), *["rating"] * (self.min_rating is not None))
        return ("user", "item", "time", "quantity", *asked)


@dataclass
class RawInteractions:
    """What was read from an interactions file.

    Attributes:
        num_rows: rows of the file.
        refused: of them, those that cannot be used.
        steps: step -> the rows that are left after it, of those that count.
        earliest, latest: of their times, in microseconds.
        users, items: id -> number, for those that count, in the order of their first row.
    """

    num_rows: int = 0
    refused: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    earliest: int = LATEST
    latest: int = 0
    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)


Read = TypeVar("Read")


def read_all(source: Source, find: Callable[[], list[str | None]], read: Callable[[list[str | None]], Read]) -> Read:
    """What `read` makes of the columns that `find` finds. It reads again where the file turned out to be of another
    form, or a key that its first rows lack is one of the columns."""
    try:
        columns = find()
    except InputError:
        if not source.add_late_keys():
            raise
        columns = find()
    while True:
        try:
            with without_collector():
                result = read(columns)
        except ReadAgain:
            continue
        known, columns = columns, find()
        if columns == known:
            return result


def summary(source: Source, refused: RefusedRows, columns: Sequence[str | None]) -> list[str]:
    """Lines that say which columns were used, and how many rows."""
    named = ", ".join(name for name in columns if name is not None)
    left_out = f", {refused.count:,} left out" if refused.count else ""
    total = f"{source.num_rows:,} rows, {source.num_rows - refused.count:,} read{left_out}"
    shown = [f"left out: {line}" for line in refused.lines[:SHOWN_ROWS]]
    return [*dict.fromkeys(source.notes), *shown, f"{source.path}: {total} (columns {named})"]


def read_interactions(
    source: Source, columns: Sequence[str | None], wanted: Wanted, spool: Spool
) -> tuple[RawInteractions, RefusedRows]:
    """Reads the interactions that count into `spool`, in parts by user.

    Args:
        columns: of the roles of `wanted`. That of the quantity may be None. A row with a quantity below 0 is a return,
            and no purchase. One of 0 may be a view, a cancelled line, or a purchase of unknown size, and counts.

    Memory grows with users and items, not with rows. Raises InputError naming the first bad cells.
    """
    spool.clear()
    refused = RefusedRows(source.path, wanted.skip_bad_rows)
    read, numbers_as_dates, seen = RawInteractions(), DatesAsNumbers(), Counter[str]()
    users, items, ids = read.users, read.items, dict[str, str | None]()
    time_of = time_reader(wanted.time_format, wanted.zone)
    chosen = f"events {', '.join(sorted(wanted.events))}" if wanted.events else ""
    rated = f"rated {wanted.min_rating:g} or more" if wanted.min_rating is not None else ""
    sold = f"with {columns[3]} of 0 or more" if columns[3] is not None else ""
    without, returned, zeros = 0, 0, 0
    read.steps = dict.fromkeys([step for step in (chosen, sold, rated) if step], 0)
    for rows, lines, cells in source.batches(columns, refused):
        # Leave out other events, returns, and low ratings.
        kept = list(range(len(rows)))
        if chosen:
            events = ["" if cell is None else str(cell).strip() for cell in cells[4]]
            seen.update(events if len(seen) < MOST_EVENTS else ())
            without += events.count("")
            kept = [i for i in kept if events[i] in wanted.events]
            read.steps[chosen] += len(kept)
        if sold:
            signs = {i: sign_of(cells[3][i]) for i in kept}
            kept = [i for i in kept if signs[i] != -1]
            returned += len(signs) - len(kept)
            zeros += sum(sign == 0 for sign in signs.values())
            read.steps[sold] += len(kept)
        if rated:
            ratings = {i: number_of(cells[-1][i]) for i in kept}
            for i in [i for i in kept if ratings[i] is None]:
                refused.add(rows[i], lines[i], f"expected a number, found {shorten(cells[-1][i])}", columns[-1])
            kept = [i for i in kept if (rating := ratings[i]) is not None and rating >= wanted.min_rating]  # type: ignore[operator]
            read.steps[rated] += len(kept)

        # Read their cells.
        user_cells, item_cells, time_cells = (
            column if len(kept) == len(rows) else [column[i] for i in kept] for column in cells[:3]
        )
        times: Sequence[int | None] = times_of(time_cells, wanted.time_format, time_of)
        user_ids = _ids_of(user_cells, ids)
        item_ids = _ids_of(item_cells, ids)
        if None in times or None in user_ids or None in item_ids:
            good = []
            for place, i in enumerate(kept):
                bad = _bad_cells(
                    columns, wanted, (user_cells[place], item_cells[place], time_cells[place]),
                    (user_ids[place], item_ids[place], times[place]),
                )  # fmt: skip
                for column, problem in bad:
                    refused.add(rows[i], lines[i], problem, column)
                if not bad:
                    good.append(place)
            times, time_cells = [times[i] for i in good], [time_cells[i] for i in good]
            user_ids, item_ids = [user_ids[i] for i in good], [item_ids[i] for i in good]
        if not times:
            continue

        # Keep those in the time window.
        batch: np.ndarray = np.zeros(len(times), INTERACTION)
        batch["time"] = times  # and none of them is None
        if not wanted.time_format:
            numbers_as_dates.see(time_cells, batch["time"])
        read.earliest = min(read.earliest, int(batch["time"].min()))
        read.latest = max(read.latest, int(batch["time"].max()))
        inside = (batch["time"] >= wanted.window[0]) & (batch["time"] < wanted.window[1])
        if not inside.all():
            places = np.flatnonzero(inside).tolist()
            batch, user_ids, item_ids = batch[inside], [user_ids[i] for i in places], [item_ids[i] for i in places]
        batch["user"] = [users.setdefault(user, len(users)) for user in cast(list[str], user_ids)]
        batch["item"] = [items.setdefault(item, len(items)) for item in cast(list[str], item_ids)]
        spool.append(batch["user"] % spool.parts, batch)
    read.num_rows, read.refused = source.num_rows, refused.count
    if without:
        source.notes.append(
            f"note: {source.path}: {without:,} rows without {columns[4]} are left out; where a shop writes it in the "
            "first row of an order only, copy it to the others"
        )
    if returned:
        source.notes.append(
            f"note: {source.path}: {returned:,} rows with a negative {columns[3]} are returns, and left out"
        )
    if zeros and not chosen:
        source.notes.append(
            f"note: {source.path}: {zeros:,} rows with a {columns[3]} of 0 count as purchases; if they were cancelled, "
            "leave them out of the file"
        )
    _check(source, columns, wanted, read, refused, seen, numbers_as_dates)
    return read, refused


def _ids_of(cells: Sequence[object], known: dict[str, str | None]) -> list[str | None]:
    """The ids of cells; `known` remembers those of texts, which repeat."""
    if {*map(type, cells)} != {str}:
        return [identifier(cell) for cell in cells]
    texts = cast(Sequence[str], cells)
    if len(known) > MOST_KNOWN:
        known.clear()
    known.update((text, identifier(text)) for text in {*texts}.difference(known))
    return list(map(known.__getitem__, texts))


def _bad_cells(
    columns: Sequence[str | None], wanted: Wanted, cells: Sequence[object], values: Sequence[object]
) -> list[tuple[str | None, str]]:
    """The columns of user, item and time that could not be read in a row, and what is wrong with each."""
    expected = f"expected a time of the form {wanted.time_format}" if wanted.time_format else EXPECTED_TIME
    if is_shortened(cells[2]):
        expected = "lost digits when a spreadsheet shortened it; save the column as whole numbers"
    text = cells[2].strip() if isinstance(cells[2], str) and not is_shortened(cells[2]) else ""
    hint = (
        "; give --time_format, such as '%m/%d/%Y %H:%M'"
        if not wanted.time_format and re.search(r"\d\D+\d", text)
        else ""
    )
    problems = (not_an_id("user", cells[0]), not_an_id("item", cells[1]), expected)
    return [
        (columns[i], f"{problems[i]}, found {shorten(cells[i])}{hint if i == 2 else ''}")
        for i, value in enumerate(values)
        if value is None
    ]


def _check(
    source: Source,
    columns: Sequence[str | None],
    wanted: Wanted,
    read: RawInteractions,
    refused: RefusedRows,
    seen: Counter[str],
    numbers_as_dates: DatesAsNumbers,
) -> None:
    """Raises InputError where nothing is left, or times were misread."""
    refused.check(source.num_rows)
    for step, left in read.steps.items():
        if not left:
            those = ", ".join(f"{event} {times:,}" for event, times in seen.most_common(8)) if seen else ""
            raise source.error(
                f"none of its {source.num_rows:,} rows is left: {step}{f'; it has {those}' * bool(those)}"
            )
    problem = numbers_as_dates.problem()
    if problem:
        raise source.error(f"{columns[2]}: {problem}")
    if read.latest < BEFORE_LOGS and not wanted.time_format:
        date = datetime.fromtimestamp(read.latest / 1e6, UTC).date()
        source.notes.append(
            f"note: {source.path}, {columns[2]}: numbers are read as seconds since 1970, and the latest time is then "
            f"{date}; give --time_format if they are something else"
        )


@dataclass(slots=True)
class RawItem:
    """An item of an items file, with cleaned texts. `row` counts from 0."""

    original_id: str
    row: int
    title: str
    description: str
    brand: str
    categories: str
    price: str = ""


def read_items(
    source: Source, columns: Sequence[str | None], wanted: Callable[[str], bool], skip_bad_rows: bool = False
) -> tuple[list[RawItem], dict[str, int], RefusedRows]:
    """The items with a title whose id is `wanted`, in the order of the file. If an id occurs again, the first counts.

    Args:
        columns: of item, title, description, features, brand, categories and price; all but the first two may be None.

    Returns the items; the number of rows, and of those that were left out because they cannot be used, the id is not
    wanted or repeated, or the title is missing; and the rows that cannot be used. Raises InputError naming the first
    bad cells, unless they are to be skipped.
    """
    refused = RefusedRows(source.path, skip_bad_rows)
    counts = {"rows": 0, "not_wanted": 0, "repeated": 0, "untitled": 0, "refused": 0}
    found: dict[str, RawItem] = {}
    for rows, lines, columns_of_cells in source.batches(columns, refused):
        for row, line, cells in zip(rows, lines, zip(*columns_of_cells, strict=True), strict=True):
            item_cell, title, description, features, *others = cells
            item, title_text, text = identifier(item_cell), text_of(title), text_of(description)
            if item is None:
                refused.add(row, line, f"{not_an_id('item', item_cell)}, found {shorten(item_cell)}", columns[0])
                continue
            for name, cell, read in ((columns[1], title, title_text), (columns[2], description, text)):
                if read is None:
                    refused.add(row, line, f"expected text or a list of texts, found {shorten(cell)}", name)
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
                brand, categories, price = (text_of(cell, separator=", ") or "" for cell in others)
                found[item] = RawItem(item, row - 1, title_text, text, brand, categories, price)
    counts["rows"], counts["refused"] = source.num_rows, refused.count
    refused.check(source.num_rows)
    return list(found.values()), counts, refused
