"""Cleans interactions: duplicates, items without an entry, k-core, order, histories, splits.

Interactions are kept on disk, 16 bytes each, in parts by user, and one part at a time is in memory. So memory grows
with the users and items of a data set, and very little with its interactions.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, tzinfo
from typing import Literal

import numpy as np

from minionerec.errors import InputError

INTERACTION = np.dtype([("user", "<i4"), ("item", "<i4"), ("time", "<i8")])  # time in microseconds since 1970
PARTS = 64  # of a spool
SPLITS = ("train", "valid", "test")
EDGE_SAMPLE = 1 << 16  # times in the sample that splits rows into parts by time


def time_window(start_date: str, end_date: str, zone: tzinfo = UTC) -> tuple[int, int]:
    """The first microsecond since 1970 (UTC) of `start_date`, and the first after `end_date`. Each is a year, a month
    or a day of `zone` such as 2018, 2018-10 or 2018-10-31, or "" for no limit. Raises InputError for anything else."""
    problems, limits = [], [0, np.iinfo(np.int64).max]
    for place, (flag, text) in enumerate((("start_date", start_date), ("end_date", end_date))):
        try:
            if text:
                if not re.fullmatch(r"\d{4}(-\d\d(-\d\d)?)?", text):
                    raise ValueError
                unit: Literal["Y", "M", "D"] = "Y" if len(text) == 4 else "M" if len(text) == 7 else "D"
                moment = np.datetime64(text) + np.timedelta64(place, unit)  # the next year, month or day
                day: datetime = moment.astype("datetime64[us]").item()
                limits[place] = round(day.replace(tzinfo=zone).timestamp() * 1e6)
        except (ValueError, OverflowError, AttributeError):  # not a date, or one after the year 9999
            problems.append(f"--{flag} {text!r}: expected a year, a month or a day, such as 2018-10-31")
    if not problems and limits[0] >= limits[1]:
        problems.append(f"--start_date {start_date} is after --end_date {end_date}")
    if problems:
        raise InputError(problems)
    return limits[0], limits[1]


class Spool:
    """Records of one dtype on disk, in parts that each fit in memory."""

    def __init__(self, folder: str, dtype: np.dtype, parts: int = PARTS):
        self.dtype, self.parts = dtype, parts
        os.makedirs(folder)
        self._paths = [os.path.join(folder, str(part)) for part in range(parts)]

    def clear(self) -> None:
        """Drops all records."""
        for path in filter(os.path.exists, self._paths):
            os.remove(path)

    def append(self, part: np.ndarray, records: np.ndarray) -> None:
        """Adds records [n] to the parts `part` [n]; records of a part keep their order."""
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=self.parts))
        for number, rows in enumerate(np.split(order, ends[:-1])):
            if len(rows):
                with open(self._paths[number], "ab") as file:
                    file.write(records[rows].tobytes())  # `tofile` would lose what no longer fits, without an error

    def load(self, part: int) -> np.ndarray:
        """The records of a part."""
        path = self._paths[part]
        return np.fromfile(path, self.dtype) if os.path.exists(path) else np.empty(0, self.dtype)

    def replace(self, part: int, records: np.ndarray) -> None:
        """Overwrites a part."""
        with open(self._paths[part], "wb") as file:
            file.write(records.tobytes())

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.load, range(self.parts))


def counts_of(spool: Spool, num_items: int) -> dict[str, int]:
    """The numbers of interactions, users and items in a spool by user."""
    interactions = users = 0
    seen: np.ndarray = np.zeros(num_items, bool)
    for records in spool:
        interactions += len(records)
        users += len(np.unique(records["user"]))
        seen[records["item"]] = True
    return {"interactions": interactions, "users": users, "items": int(seen.sum())}


def order_and_drop_duplicates(spool: Spool) -> None:
    """Sorts the interactions of every user by time, equal times in the order of the file, and keeps the first of those
    with equal user, item and time. The same item at another time is another purchase and stays."""
    for part, records in enumerate(spool):
        # Stable, so the first of equal records in the file comes first.
        same = np.lexsort((records["item"], records["time"], records["user"]))
        again = same[1:][records[same[1:]] == records[same[:-1]]]
        keep: np.ndarray = np.ones(len(records), bool)
        keep[again] = False
        records = records[keep]
        spool.replace(part, records[np.lexsort((records["time"], records["user"]))])


def keep_items(spool: Spool, known: np.ndarray) -> None:
    """Drops the interactions with items that are not `known` [items]."""
    for part, records in enumerate(spool):
        spool.replace(part, records[known[records["item"]]])


def keep_users(spool: Spool, least: int) -> None:
    """Drops the interactions of users with fewer than `least`. The parts must be sorted by user."""
    for part, records in enumerate(spool):
        _, sizes = _runs(records["user"])
        spool.replace(part, records[np.repeat(sizes >= least, sizes)])


def busiest(spool: Spool) -> tuple[int, int]:
    """The user with the most interactions, and how many; (0, 0) if there is none. The parts must be sorted by user."""
    most = (0, 0)
    for records in spool:
        starts, sizes = _runs(records["user"])
        if len(sizes) and sizes.max() > most[1]:
            most = int(records["user"][starts[sizes.argmax()]]), int(sizes.max())
    return most


def latest(spool: Spool) -> int:
    """The time of the last interaction; 0 if there is none."""
    return max((int(records["time"].max()) for records in spool if len(records)), default=0)


def drop_repeats(spool: Spool) -> bool:
    """Drops the interactions with the same item as the one before, of the same user, and returns whether there were
    any. The parts must be sorted by user and time."""
    found = False
    for part, records in enumerate(spool):
        again = (records["user"][1:] == records["user"][:-1]) & (records["item"][1:] == records["item"][:-1])
        if again.any():
            found = True
            spool.replace(part, records[np.r_[True, ~again]])
    return found


def split_sessions(spool: Spool, gap: int) -> np.ndarray:
    """Makes a user of each session: interactions of a user that follow each other by at most `gap` microseconds. The
    parts must be sorted by user and time. Returns the user of each session, [sessions]."""
    users: list[np.ndarray] = []
    num_sessions = 0
    for part, records in enumerate(spool):
        new = (records["user"][1:] != records["user"][:-1]) | (np.diff(records["time"]) > gap)
        starts = np.r_[True, new][: len(records)]
        users.append(records["user"][starts])
        records["user"] = num_sessions + np.cumsum(starts) - 1
        num_sessions += len(users[-1])
        spool.replace(part, records)
    return np.concatenate(users)


def session_names(users: Sequence[str], sessions: np.ndarray) -> list[str]:
    """The names of sessions, from the user of each: the user's own, and the number of the session."""
    seen = Counter[int]()
    names = []
    for user in sessions.tolist():
        seen[user] += 1
        names.append(f"{users[user]}/{seen[user]}")
    return names


def k_core(spool: Spool, num_items: int, least: int) -> np.ndarray:
    """Drops users and items with fewer than `least` interactions, repeatedly until all that are left have that many.

    Returns whether each item is left, [items]. The parts of the spool must be sorted by user.
    """
    alive: np.ndarray = np.ones(num_items, bool)
    while True:
        counts: np.ndarray = np.zeros(num_items, np.int64)
        dropped = False
        for part, records in enumerate(spool):
            kept = records[alive[records["item"]]]
            _, sizes = _runs(kept["user"])
            kept = kept[np.repeat(sizes >= least, sizes)]
            counts += np.bincount(kept["item"], minlength=num_items)
            if len(kept) < len(records):
                dropped = True
                spool.replace(part, kept)
        alive = counts >= least
        if not dropped and np.array_equal(alive, counts > 0):
            return alive & (counts > 0)


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal values start, and how long they are."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.empty(0, np.int64)
    return starts, np.diff(np.r_[starts, len(values)])


def rows_of(
    spool: Spool, folder: str, item_ids: np.ndarray, max_history: int, split: str, after: int | None = None
) -> tuple[Spool, dict[str, int]]:
    """Next-item rows, in parts by the time of their target, and the number of rows in each split. There is a row for
    every interaction that has an earlier one of the same user.

    Args:
        spool: interactions in parts sorted by user and time.
        folder: for the new spool.
        item_ids: the number that each item has in the rows, [items].
        max_history: how many of the most recent items of a history are kept.
        split: `last` marks for each user the last row as test, the one before it as valid, and the others as train. A
            user with two rows has none for valid, a user with one row has it for train. With `time`, `in_time_order`
            marks them.
        after: only rows whose target is later than this, and all of them are for train.

    Rows have `user`, `item`, `time`, `split` (an index into SPLITS) and `history`, [max_history] or the longest one if
    that is shorter, padded on the left with -1. Raises InputError if a split gets no row, but
    not with `after`.
    """
    longest = max((int(_runs(records["user"])[1].max()) for records in spool if len(records)), default=1)
    max_history = min(max_history, max(longest - 1, 1))  # a row takes as much space as its longest history
    row_type = np.dtype(
        [("user", "<i4"), ("item", "<i4"), ("time", "<i8"), ("split", "u1"), ("history", "<i4", (max_history,))]
    )
    edges = _edges(spool)
    rows = Spool(folder, row_type)
    counts: np.ndarray = np.zeros(len(SPLITS), np.int64)
    for records in spool:
        starts, sizes = _runs(records["user"])
        start: np.ndarray = np.repeat(starts, sizes)
        size: np.ndarray = np.repeat(sizes, sizes)
        at = np.flatnonzero(np.arange(len(records)) > start)
        batch: np.ndarray = np.zeros(len(at), row_type)
        batch["user"], batch["time"] = records["user"][at], records["time"][at]
        items = item_ids[records["item"]]
        batch["item"] = items[at]
        past = at[:, None] + np.arange(-max_history, 0)
        batch["history"] = np.where(past < start[at][:, None], -1, items[np.maximum(past, 0)])
        if after is not None:
            batch = batch[batch["time"] > after]
        elif split == "last":
            later, made = start[at] + size[at] - 1 - at, size[at] - 1  # rows of the user after this one, and in all
            batch["split"] = np.where((later == 0) & (made > 1), 2, np.where((later == 1) & (made > 2), 1, 0))
        counts += np.bincount(batch["split"], minlength=len(SPLITS))
        part = np.asarray(np.searchsorted(edges, batch["time"], side="right"))
        rows.append(part, batch)
    if after is not None:
        return rows, {SPLITS[0]: int(counts.sum())}
    if split == "time":
        counts = np.diff([0, *_cuts(counts.sum()), counts.sum()])
    sizes_of = dict(zip(SPLITS, counts.tolist(), strict=True))
    empty = [name for name, count in sizes_of.items() if not count]
    if empty:
        raise InputError(
            f"--split {split}: of {sum(sizes_of.values())} rows none is left for {' and '.join(empty)}; "
            "give more interactions or a smaller --min_interactions"
        )
    return rows, sizes_of


def _cuts(total: int) -> tuple[int, int]:
    """Where validation and test start in the order of time: after 80% and 90% of the rows."""
    return int(total * 8 // 10), int(total * 9 // 10)


def _edges(spool: Spool) -> np.ndarray:
    """Times, from a sample, that split the interactions into even parts (as even as equal times allow)."""
    total = sum(map(len, spool))
    sample = np.sort(np.concatenate([records["time"][:: 1 + total // EDGE_SAMPLE] for records in spool]))
    places = np.linspace(0, len(sample), PARTS, endpoint=False, dtype=int)[1:]
    return sample[places[places < len(sample)]]  # empty if no interaction is left


def in_time_order(rows: Spool, total: int, split: str) -> Iterator[np.ndarray]:
    """The `total` rows of `rows_of` by the time of their target, one part at a time. With the split `time`, the first
    80% are for training, the next 10% for validation, the rest for the test."""
    valid, test = _cuts(total)
    place = 0
    for batch in rows:
        batch = batch[np.argsort(batch["time"], kind="stable")]
        if split == "time":
            places = np.arange(place, place + len(batch))
            batch["split"] = (places >= valid).astype(np.uint8) + (places >= test)
        place += len(batch)
        yield batch
