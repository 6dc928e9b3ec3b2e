"""Rows of the purchases that are later than those of an existing data set, with its item ids and SIDs.

The log that is given has old and new purchases, because a row's history has both. A row is new if it is later than the
last purchase of the data set; purchases of before that the data set lacks count in histories only. Items are those of
the data set, whether or not the log has enough purchases of them.
"""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np

from minionerec.data.files import shorten
from minionerec.errors import InputError, Problems
from minionerec.flags import Flags
from minionerec.prepare import cleaning, row_files, sources, writing
from minionerec.prepare.build import LostZeros, ReadInteractions, Step, input_of, note_step, print_steps
from minionerec.prepare.settings import PrepareFlags

# The settings of a data set that also hold for later purchases. Its end_date does not: they are after it.
KEPT = (
    *("time_format", "time_zone", "events", "min_rating", "drop_repeats", "session_gap", "min_interactions"),
    *("max_history", "start_date"),
)


def settings_of(flags: PrepareFlags, record: writing.Record) -> PrepareFlags:
    """`flags` with the settings of a data set, and its columns where the flags name none. Raises InputError if its
    record does not have them."""
    where = f"--dataset {flags.dataset}: {writing.RECORD}"
    if "latest" not in record:
        raise InputError(
            f"{where} does not say when its purchases end, because it is of an earlier release; prepare it again, and "
            "train on it, before you add purchases"
        )
    problems = Problems()
    try:
        arguments: dict = {**record["arguments"]}
        values = {name: arguments[name] for name in KEPT}
        recorded = record["inputs"]["interactions"]["columns"]
        columns = {f"{role}_column": name for role, name in recorded.items() if role != "quantity"}  # it has no flag
        for name, value in {**values, **columns}.items():
            if type(value) not in (type(getattr(PrepareFlags, name)), *[float] * (name == "min_rating")):
                raise ValueError(f"{name} is {value!r}")
        if type(record["latest"]) is not int or not 0 <= record["latest"] < sources.LATEST:
            raise ValueError(f"latest is {record['latest']!r}")
        given = {name: getattr(flags, name) for name in (*columns, "time_format") if getattr(flags, name)}
        settings = replace(flags, **{**values, **columns, **given})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} is not what prepare_data.py wrote: {error!r}"[:400]) from None
    Flags.check(settings, problems)
    settings.check_columns(problems)
    problems.check()
    return settings


@dataclass(frozen=True)
class _Tally:
    """Interactions of a log that make rows, by user [users]: `before` the end of the data set, and `after` it; and the
    number of `firsts`, later ones that make none, because they are the first of their user."""

    before: np.ndarray
    after: np.ndarray
    firsts: int


def _tally(spool: cleaning.Spool, owners: np.ndarray, num_users: int, latest: int) -> _Tally:
    """What is in a spool sorted by user and time; `owners` are the users of its users, which may be sessions."""
    before, after = (np.zeros(num_users, np.int64) for _ in range(2))
    firsts = 0
    for records in spool:
        first = np.r_[True, records["user"][1:] != records["user"][:-1]][: len(records)]
        late = records["time"] > latest
        users = owners[records["user"]]
        before += np.bincount(users[~first & ~late], minlength=num_users)
        after += np.bincount(users[~first & late], minlength=num_users)
        firsts += int((first & late).sum())
    return _Tally(before, after, firsts)


def _old_rows(dataset: str, record: writing.Record, sessions: bool) -> Counter[str]:
    """The number of rows of each user in the files of a data set."""
    found = Counter[str]()
    for name in writing.row_files_of(record):
        with open(os.path.join(dataset, name), encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            next(rows, None)
            found.update(row[0].rpartition("/")[0] if sessions else row[0] for row in rows)
    return found


@dataclass(frozen=True)
class _Cleaned:
    """A log after the cleaning.

    Attributes:
        steps: what each step left.
        left_out: reason -> the number of later purchases that were left out for it.
        owners: the user of each user of the spool, which is a session if the data set has sessions.
        item_ids: of the items of the log, [items]; -1 for those that the data set does not have.
        unknown: of these, the ids that were bought later.
    """

    steps: list[Step]
    left_out: dict[str, int]
    owners: np.ndarray
    item_ids: np.ndarray
    unknown: list[str]


def _clean(
    spool: cleaning.Spool, raw: sources.RawInteractions, settings: PrepareFlags, latest: int, numbers: dict[str, int]
) -> _Cleaned:
    """Cleans a log as that of the data set was, but for the k-core: items count that have a number in `numbers`, and
    users with enough purchases of them. A session ends where it did, whatever was bought in it."""
    steps = [Step(step, count) for step, count in raw.steps.items()]
    later: list[tuple[str, int]] = []  # why a step leaves purchases out, and the number of later ones that are left

    def note(step: str, reason: str) -> None:
        note_step(spool, raw, steps, step)
        later.append((reason, sum(int((records["time"] > latest).sum()) for records in spool)))

    note("in the time window", "")
    cleaning.order_and_drop_duplicates(spool)
    note("without duplicates", "twice in the log")
    owners, who = np.arange(len(raw.users)), "users"
    if settings.session_gap:
        gap = round(min(settings.session_gap * 60e6, sources.LATEST))
        owners, who = cleaning.split_sessions(spool, gap), "sessions"
        note_step(spool, raw, steps, f"in sessions ({settings.session_gap:g} min)")
    item_ids = np.array([numbers.get(item, -1) for item in raw.items], np.int32)
    bought: np.ndarray = np.zeros(len(raw.items), bool)
    for records in spool:
        bought[records["item"][records["time"] > latest]] = True
    cleaning.keep_items(spool, item_ids >= 0)
    note("of items of --dataset", "of other items")
    if settings.drop_repeats:
        cleaning.drop_repeats(spool)
        note("without repeats", "repeats")
    cleaning.keep_users(spool, settings.min_interactions)
    least = settings.min_interactions
    note(f"of {who} with {least}", f"of {who} with fewer than {least}")
    left_out = {reason: before - now for (_, before), (reason, now) in pairwise(later)}
    ids = list(raw.items)
    return _Cleaned(steps, left_out, owners, item_ids, [ids[i] for i in np.flatnonzero(bought & (item_ids < 0))])


def add_rows(
    folder: str,
    settings: PrepareFlags,
    record: writing.Record,
    bought: ReadInteractions,
    spool: cleaning.Spool,
    metadata: dict[str, dict[str, str]],
    sids: Sequence[str],
    scratch: str,
) -> tuple[dict[str, Any], int]:
    """Writes the new rows of the log that was read to a file of their own in `folder`, which has the other files of the
    data set, and says what became of every later purchase.

    Returns what dataset.json records, and the time of the last purchase in microseconds. Raises InputError where the
    log has none of the old purchases, or makes no new row.
    """
    path, raw, latest, names = bought.source.path, bought.raw, record["latest"], list(bought.raw.users)
    until = f"{datetime.fromtimestamp(latest / 1e6, settings.zone):%Y-%m-%d %H:%M:%S}"
    numbers = {fields["original_id"]: int(item) for item, fields in metadata.items()}
    log = _clean(spool, raw, settings, latest, numbers)

    # Compare with the rows that the data set has.
    old = _old_rows(settings.dataset, record, bool(settings.session_gap))
    for what, known, ids in (("items", numbers, raw.items), ("users", old, raw.users)):
        zeros = LostZeros(known)
        for one in ids:
            zeros.wanted(one)
        if remedy := zeros.remedy():
            print(f"warning: {what} of {path} that are none of {settings.dataset}: {remedy}")
    tally = _tally(spool, log.owners, len(names), latest)
    if not tally.before.any():
        raise InputError(
            f"--interactions {path}: none of its {raw.num_rows:,} rows is a purchase of the users and items of "
            f"{settings.dataset} until {until}; give old and new purchases together, with the same ids"
        )
    had = np.array([old[name] for name in names])
    lacking = sum(old.values()) - int(np.minimum(had, tally.before).sum())
    unseen = int(np.maximum(tally.before - had, 0).sum())
    new_users = int(((had == 0) & (tally.after > 0)).sum())
    rows, sizes = cleaning.rows_of(
        *(spool, os.path.join(scratch, "rows"), log.item_ids, settings.max_history, settings.split), after=latest
    )
    count = sizes["train"]

    # Say what became of the later purchases.
    first = f"the first of their {'session' if settings.session_gap else 'user'}"
    left_out = {reason: number for reason, number in {**log.left_out, first: tally.firsts}.items() if number}
    print_steps(raw, log.steps)
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())
    print(f"later than {until}: {count:,} rows{f'; left out: {reasons}' if reasons else ''}")
    if log.unknown:
        print(
            f"note: {len(log.unknown):,} items of later purchases, such as {shorten(log.unknown[0])}, are none of "
            f"{settings.dataset}; --add_items in this command gives them IDs, and these purchases rows"
        )
    if unseen:
        print(
            f"note: {unseen:,} purchases until {until} make no row, although {settings.dataset} has none of them; they "
            "count in histories"
        )
    quantity = record["inputs"]["interactions"]["columns"].get("quantity")
    if quantity is not None and bought.columns[bought.roles.index("quantity")] is None:
        print(f"warning: {path} has no column {quantity}, so its returns count as purchases")
    if lacking:
        print(
            f"warning: {path} lacks the purchases of {lacking:,} rows of {settings.dataset}; histories are without "
            "them; give old and new purchases together"
        )
    if not count:
        raise InputError(
            f"--interactions {path}: no purchase after {until}, the last of {settings.dataset}, makes a row"
        )

    # Write.
    name = f"new/{record['category']}_{len(writing.row_files_of(record)) - len(cleaning.SPLITS) + 1}.csv"
    users = cleaning.session_names(names, log.owners) if settings.session_gap else names
    titles = [fields["title"] for fields in metadata.values()]
    batches = cleaning.in_time_order(rows, count, "last")  # which leaves the marks as they are
    row_files.write_rows([os.path.join(folder, name)], batches, users, sids, titles)
    print(
        f"{name}: {count:,} rows of {int((tally.after > 0).sum()):,} users, {new_users:,} of whom have no row in "
        f"{settings.dataset}"
    )
    made: dict[str, Any] = {
        "inputs": {"interactions": input_of(bought.source, bought.roles, bought.columns)},
        "interactions": [step.to_json() for step in log.steps],
        "rows": {name: count, **left_out, "unseen": unseen, "lacking": lacking},
    }
    return made, max(latest, cleaning.latest(spool))
