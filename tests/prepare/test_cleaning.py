"""Duplicates, k-core, histories and splits on disk, against plain twins in memory."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_files import read

from minionerec.errors import InputError
from minionerec.prepare import cells, cleaning

# (user, item, time): few of each, so that duplicates, ties and cores occur
INTERACTIONS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 9)), max_size=120)
NUM_ITEMS = 7


def spooled(rows, folder) -> cleaning.Spool:
    """Rows in a spool, in several batches."""
    spool = cleaning.Spool(str(folder), cleaning.INTERACTION, parts=4)
    for start in range(0, len(rows), 50):
        batch = np.array(rows[start : start + 50], cleaning.INTERACTION)
        spool.append(batch["user"] % spool.parts, batch)
    return spool


def held(spool) -> list[tuple[int, int, int]]:
    return [row for part in spool for row in part.tolist()]


def plain_order(rows):
    """What `order_and_drop_duplicates` leaves, by user."""
    return {
        user: sorted(dict.fromkeys(row for row in rows if row[0] == user), key=lambda row: row[2])
        for user in {row[0] for row in rows}
    }


def by_user(rows):
    users = {}
    for row in rows:
        users.setdefault(row[0], []).append(row)
    return users


def plain_core(rows, least):
    """One user or item after the other goes, until none has fewer."""
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= least and items[row[1]] >= least]
        if len(kept) == len(rows):
            return rows
        rows = kept


@given(INTERACTIONS)
def test_order_and_duplicates(tmp_path_factory, rows):
    spool = spooled(rows, tmp_path_factory.mktemp("spool") / "s")
    cleaning.order_and_drop_duplicates(spool)
    assert by_user(held(spool)) == plain_order(rows)


@given(INTERACTIONS, st.integers(1, 6))
def test_the_core_is_the_largest_in_which_all_have_enough(tmp_path_factory, rows, least):
    spool = spooled(sorted(rows), tmp_path_factory.mktemp("spool") / "s")
    alive = cleaning.k_core(spool, NUM_ITEMS, least)
    expected = plain_core(sorted(rows), least)
    assert sorted(held(spool)) == expected
    assert set(np.flatnonzero(alive).tolist()) == {row[1] for row in expected}
    counts = {"interactions": len(expected), "users": len(by_user(expected)), "items": len({r[1] for r in expected})}
    assert cleaning.counts_of(spool, NUM_ITEMS) == counts


def plain_rows(rows, max_history):
    """(user, time, history, target, rows of the user after it, all of them)."""
    made = []
    for user, own in plain_order(rows).items():
        for place in range(1, len(own)):
            history = [item for _, item, _ in own[max(0, place - max_history) : place]]
            made.append((user, own[place][2], history, own[place][1], len(own) - 1 - place, len(own) - 1))
    return made


@given(INTERACTIONS, st.integers(1, 12), st.sampled_from(["time", "last"]))
def test_rows_histories_and_splits(tmp_path_factory, rows, max_history, split):
    folder = tmp_path_factory.mktemp("spool")
    spool = spooled(rows, folder / "s")
    cleaning.order_and_drop_duplicates(spool)
    expected = plain_rows(rows, max_history)
    try:
        found, sizes = cleaning.rows_of(spool, str(folder / "r"), np.arange(NUM_ITEMS) + 100, max_history, split)
    except InputError as error:
        (problem,) = error.problems
        assert "none is left for" in problem
        # 8:1:1 of nine rows leaves one empty; with `last` some user must have three rows.
        assert len(expected) < 10 if split == "time" else max((row[5] for row in expected), default=0) < 3
        return
    batches = list(cleaning.in_time_order(found, sum(sizes.values()), split))
    made = [row for batch in batches for row in batch.tolist()]
    seen = [(user, time, [int(i) - 100 for i in past if i >= 0], item - 100) for user, item, time, _, past in made]
    assert Counter(map(str, seen)) == Counter(str(row[:4]) for row in expected)
    times = [row[2] for row in made]
    assert times == sorted(times)
    for user in {row[0] for row in made}:  # ties of a user stay in the order of the file
        assert [row[3] for row in seen if row[0] == user] == [row[3] for row in expected if row[0] == user]
    assert Counter(cleaning.SPLITS[row[3]] for row in made) == sizes
    if split == "time":
        cuts = [len(made) * 8 // 10, len(made) * 9 // 10]
        assert [row[3] for row in made] == [(i >= cuts[0]) + (i >= cuts[1]) for i in range(len(made))]
    else:
        for user in {row[0] for row in made}:
            own = [row[3] for row in made if row[0] == user]
            assert own == ([0] if len(own) == 1 else [0, 2] if len(own) == 2 else [0] * (len(own) - 2) + [1, 2])


def test_a_row_has_no_more_room_than_the_longest_history(tmp_path):
    spool = spooled([(0, i % NUM_ITEMS, i) for i in range(12)] + [(1, i, i) for i in range(3)], tmp_path / "s")
    cleaning.order_and_drop_duplicates(spool)
    rows, _ = cleaning.rows_of(spool, str(tmp_path / "r"), np.arange(NUM_ITEMS), 10**9, "time")
    assert {len(row["history"]) for part in rows for row in part} == {11}


def test_one_part_at_a_time_is_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    spool = cleaning.Spool(str(tmp_path / "s"), cleaning.INTERACTION)
    for _ in range(20):
        batch = np.zeros(5000, cleaning.INTERACTION)
        batch["user"], batch["time"] = rng.integers(0, 3000, 5000), rng.integers(0, 10**9, 5000)
        spool.append(batch["user"] % spool.parts, batch)
    cleaning.order_and_drop_duplicates(spool)
    sizes = [len(part) for part in spool]
    assert sum(sizes) == 100_000 and max(sizes) < 2 * min(sizes)
    rows, counts = cleaning.rows_of(spool, str(tmp_path / "r"), np.arange(1), 10, "time")
    sizes = [len(part) for part in rows]
    assert sum(sizes) == sum(counts.values()) == 97_000 and max(sizes) < 2 * 97_000 / 64


def test_equal_times_do_not_fail(tmp_path):
    rows = [(user, item, 5) for user in range(20) for item in range(7)]
    spool = spooled(rows, tmp_path / "s")
    cleaning.order_and_drop_duplicates(spool)
    _, sizes = cleaning.rows_of(spool, str(tmp_path / "r"), np.arange(NUM_ITEMS), 10, "time")
    assert sizes == {"train": 96, "valid": 12, "test": 12}
    with pytest.raises(InputError, match="--split time: of 0 rows none is left for train and valid and test"):
        cleaning.rows_of(spooled([], tmp_path / "e"), str(tmp_path / "f"), np.arange(1), 10, "time")


def spool_of(tmp_path, rows) -> cleaning.Spool:
    spool = cleaning.Spool(str(tmp_path / "spool"), cleaning.INTERACTION)
    records = np.array(rows, cleaning.INTERACTION)
    spool.append(records["user"] % spool.parts, records)
    return spool


def test_repeats_and_sessions(tmp_path):
    minute = 60 * 10**6
    spool = spool_of(
        tmp_path, [(0, 5, 0), (0, 5, minute), (0, 6, 2 * minute), (0, 5, 40 * minute), (64, 5, 41 * minute)]
    )
    assert cleaning.drop_repeats(spool) and not cleaning.drop_repeats(spool)
    assert [record["item"] for records in spool for record in records] == [5, 6, 5, 5]
    sessions = cleaning.split_sessions(spool, 30 * minute)
    users = [record["user"] for records in spool for record in records]
    assert users == [0, 0, 1, 2] and sessions.tolist() == [0, 0, 64]
    names = [f"u{i}" for i in range(65)]
    assert cleaning.session_names(names, sessions) == ["u0/1", "u0/2", "u64/1"]


def test_the_time_window_counts_its_days(tmp_path):
    path = tmp_path / "file"
    days = ["2016-09-30T23:59:59", "2016-10-01", "2017-05-05", "2018-11-30T23:59:59.999999", "2018-12-01"]
    path.write_text("user,item,time\n" + "".join(f"u,i,{day}\n" for day in days))
    inside = [time for _, _, time in read(path, cleaning.time_window("2016-10", "2018-11"))]
    assert inside == [cells.microseconds(day) for day in days[1:4]]
    assert cleaning.time_window("", "") == (0, np.iinfo(np.int64).max)
    with pytest.raises(InputError) as error:
        cleaning.time_window("2018-13", "soon")
    assert len(error.value.problems) == 2
    with pytest.raises(InputError, match="--start_date 2018 is after --end_date 2017"):
        cleaning.time_window("2018", "2017")
