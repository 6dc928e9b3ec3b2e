"""Later purchases of an existing data set: item ids and SIDs stay, and the new rows are what was bought since."""

import ast
import csv
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from helpers import read_rows, run_command, sft_flags, strings
from raw_bolts import contents, refused
from raw_files import T0, written

import sft
from scripts.prepare_data import prepare_data

DAY = 86_400


def log_of(path: Path, events: list[tuple]) -> str:
    """Writes a log of (user, item, time) and returns its path."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("who", "what", "when"), *events])
    return str(path)


def items_of(path: Path, items: list[str]) -> str:
    names = "".join(f"{item}\tRed {['nut', 'bolt'][place % 2]} {place}\n" for place, item in enumerate(items))
    return str(written(path, f"id\tname\n{names}"))


COLUMNS = {"user_column": "who", "item_column": "what", "time_column": "when"}


def prepared_of(tmp_path: Path, events: list[tuple], items: list[str], **flags) -> Path:
    """The data set of a log."""
    files = {"interactions": log_of(tmp_path / "log.csv", events), "items": items_of(tmp_path / "items.tsv", items)}
    small = {"category": "T", "codes": 4, "levels": 2, "min_interactions": 2, "output_dir": str(tmp_path / "week_1")}
    prepare_data(**{**files, **COLUMNS, **small, **flags})
    return tmp_path / "week_1"


def rows_of(path: Path) -> list[tuple]:
    """The rows of a file: user, history of item ids, item id."""
    return [
        (row["user_id"], tuple(map(str, ast.literal_eval(row["history_item_id"]))), row["item_id"])
        for row in read_rows(path)
    ]


def numbers_of(folder: Path) -> dict[str, str]:
    """original id -> item id."""
    metadata = json.loads((folder / "index" / "T.item.json").read_text())
    return {fields["original_id"]: item for item, fields in metadata.items()}


def plain_rows(events, numbers, after=-1, max_history=10, min_interactions=2, drop_repeats=False, session_gap=0.0):
    """The rows of purchases later than `after`, by plain loops: histories are slices of what a user bought."""
    rows = []
    for user in dict.fromkeys(user for user, _, _ in events):
        mine = dict.fromkeys((time, item) for who, item, time in events if who == user)
        histories: list[list] = []
        last = 0
        for time, item in sorted(mine, key=lambda event: event[0]):
            if not histories or (session_gap and time - last > session_gap * 60):
                histories.append([])
            histories[-1].append((time, item))
            last = time
        for session, bought in enumerate(histories, 1):
            bought = [(time, numbers[item]) for time, item in bought if item in numbers]
            if drop_repeats:
                bought = [one for i, one in enumerate(bought) if not i or bought[i - 1][1] != one[1]]
            name = f"{user}/{session}" if session_gap else user
            for place in range(1, len(bought) if len(bought) >= min_interactions else 0):
                past = [item for _, item in bought[max(0, place - max_history) : place]]
                if bought[place][0] > after:
                    rows.append((bought[place][0], (name, tuple(past), bought[place][1])))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


ITEMS = [f"W{i}" for i in range(8)]


def two_weeks() -> tuple[list[tuple], list[tuple]]:
    """Purchases of 12 users in a first week, and in a second one; no two at the same time."""
    rng = random.Random(3)
    times = rng.sample(range(2 * 7 * DAY), 180)
    events = [(f"u{rng.randrange(12)}", rng.choice(ITEMS), T0 + time) for time in times]
    return [[event for event in events if (event[2] < T0 + 7 * DAY) is first] for first in (True, False)]


def test_later_purchases_become_rows_of_the_same_ids(tmp_path, capsys):
    """Old items, SIDs and rows stay to the byte; what cannot be a row is counted."""
    old, later = two_weeks()
    first = prepared_of(tmp_path, old, [*ITEMS, "X1"])
    last = max(time for _, _, time in old)
    later += [("n1", "W1", last + DAY), ("n1", "W2", last + 2 * DAY)]  # a new user with two, of whom one makes a row
    later += [("n2", "W1", last + DAY), ("u0", "X1", last + DAY), ("u1", "X1", last + DAY), ("u1", "X2", last + DAY)]
    late = [("u3", "W5", T0 - DAY), ("n3", "W5", T0 - DAY), ("n3", "W6", T0 - 1)]  # two make no row, and one is first
    late += [later[0]]  # twice
    log = log_of(tmp_path / "longer.csv", [*later, *old, *late])
    before = contents(first)
    capsys.readouterr()
    prepare_data(dataset=str(first), interactions=log, output_dir=str(tmp_path / "week_2"))
    printed = capsys.readouterr().out
    assert contents(first) == before
    after = contents(tmp_path / "week_2")
    assert {**before, "dataset.json": b""} == {name: after[name] for name in before} | {"dataset.json": b""}
    assert {*after} - {*before} == {"new/T_1.csv"}

    rows = rows_of(tmp_path / "week_2" / "new" / "T_1.csv")
    expected = plain_rows([*later, *old, *late], numbers_of(first), last)
    assert rows == expected and ("n1", (numbers_of(first)["W1"],), numbers_of(first)["W2"]) in rows
    cells = read_rows(tmp_path / "week_2" / "new" / "T_1.csv")[0]
    info = [line.split("\t") for line in (first / "info" / "T.txt").read_text().splitlines()]
    assert [cells["item_sid"], cells["item_title"], cells["item_id"]] in info

    assert (
        f": {len(rows)} rows; left out: 1 twice in the log, 3 of other items, 1 of users with fewer than 2, 1 the"
        in printed
    )
    assert "note: 2 items of later purchases, such as 'X1', are none of" in printed
    users = len({user for user, _, _ in rows})
    assert f"new/T_1.csv: {len(rows)} rows of {users} users, 1 of whom have no row in" in printed
    assert "note: 2 purchases until 2017-07-2" in printed and "warning" not in printed

    # A third week goes on after the second, and has its rows too.
    third = [*later, *old, *late, ("u0", "W1", T0 + 30 * DAY), ("u0", "W3", T0 + 31 * DAY)]
    flags = {"dataset": str(tmp_path / "week_2"), "interactions": log_of(tmp_path / "third.csv", third)}
    prepare_data(**flags, output_dir=str(tmp_path / "week_3"))
    assert [row[2] for row in rows_of(tmp_path / "week_3" / "new" / "T_2.csv")] == [
        numbers_of(first)["W1"],
        numbers_of(first)["W3"],
    ]
    assert (tmp_path / "week_3" / "new" / "T_1.csv").read_bytes() == after["new/T_1.csv"]
    assert "note: 2 purchases until" in capsys.readouterr().out  # the same ones as a week ago


def test_new_items_and_their_purchases_come_together(tmp_path, capsys):
    old, later = two_weeks()
    first = prepared_of(tmp_path, old, ITEMS)
    bought = [(user, "N1", time + 1) for user, _, time in later[:9]]
    new = items_of(tmp_path / "new.tsv", ["N1"])
    flags = {"dataset": str(first), "interactions": log_of(tmp_path / "longer.csv", [*old, *later, *bought])}
    prepare_data(**flags, add_items=new, item_column="what", output_dir=str(tmp_path / "week_2"))
    numbers = numbers_of(tmp_path / "week_2")
    assert numbers == {**numbers_of(first), "N1": "8"}
    rows = rows_of(tmp_path / "week_2" / "new" / "T_1.csv")
    assert rows == plain_rows([*old, *later, *bought], numbers, max(time for _, _, time in old))
    assert sum(item == "8" for _, _, item in rows) == 9
    for name in ("index", "info"):
        grown, was = (next((folder / name).glob("T*[xt]*")) for folder in (tmp_path / "week_2", first))
        assert grown.read_bytes().startswith(was.read_bytes()[:-1])
    # A whole catalogue every week has nothing new in some.
    again = {**flags, "dataset": str(tmp_path / "week_2"), "add_items": new, "item_column": "what"}
    capsys.readouterr()
    refused({**again, "output_dir": str(tmp_path / "none")}, "no purchase after")
    log = log_of(tmp_path / "next.csv", [*old, *later, *bought, ("u1", "N1", T0 + 30 * DAY)])
    prepare_data(**{**again, "interactions": log, "output_dir": str(tmp_path / "next")})
    assert "note: --add_items" in (out := capsys.readouterr().out) and "none of its 1 rows is a new item" in out
    assert len(rows_of(tmp_path / "next" / "new" / "T_2.csv")) == 1
    assert numbers_of(tmp_path / "next") == numbers_of(tmp_path / "week_2")
    # And items alone keep the rows.
    more = items_of(tmp_path / "more.tsv", ["N2"])
    prepare_data(dataset=str(tmp_path / "week_2"), add_items=more, output_dir=str(tmp_path / "week_3"))
    assert rows_of(tmp_path / "week_3" / "new" / "T_1.csv") == rows and numbers_of(tmp_path / "week_3")["N2"] == "9"


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_slices_of_histories(seed, tmp_path, capsys):
    """Whatever the settings, with equal times, duplicates, late rows and names that have commas and slashes."""
    rng = random.Random(seed)
    users = ["a/1", "b,c", 'q"x', "é", *(f"u{i}" for i in range(rng.randint(2, 6)))]
    events = [
        (rng.choice(users), rng.choice(ITEMS), T0 + 60 * rng.randrange(rng.choice([60, 400])))
        for _ in range(rng.randint(120, 260))
    ]
    settings = {
        "max_history": rng.choice([1, 3, 10]),
        "min_interactions": rng.randint(1, 4),
        "drop_repeats": rng.random() < 0.5,
        "session_gap": rng.choice([0.0, 0.0, 40.0]),
    }
    border = sorted(time for _, _, time in events)[len(events) * 2 // 3]
    delayed = rng.random() < 0.5
    old = [event for event in events if event[2] <= border and not (delayed and rng.random() < 0.1)]
    first = prepared_of(tmp_path, old, ITEMS[: rng.randint(5, 8)], **settings, split=rng.choice(["time", "last"]))
    flags = {"dataset": str(first), "interactions": log_of(tmp_path / "all.csv", events)}
    capsys.readouterr()
    numbers = numbers_of(first)
    latest = json.loads((first / "dataset.json").read_text())["latest"] / 1e6
    expected = plain_rows(events, numbers, latest, **settings)
    if not expected:  # as with a high --min_interactions, and short sessions
        refused({**flags, "output_dir": str(tmp_path / "week_2")}, "makes a row")
        return
    prepare_data(**flags, output_dir=str(tmp_path / "week_2"))
    rows = rows_of(tmp_path / "week_2" / "new" / "T_1.csv")
    assert Counter(rows) == Counter(expected)
    assert "warning" not in capsys.readouterr().out
    record = json.loads((tmp_path / "week_2" / "dataset.json").read_text())
    counts = record["added"][-1]["rows"]
    of_before = [row for split in ("train", "valid", "test") for row in rows_of(first / split / "T.csv")]
    assert len(plain_rows(events, numbers, **settings)) == len(of_before) + len(rows) + counts["unseen"]
    if not delayed:  # then each row is an old one, a new one, or one of a user that the k-core dropped
        assert not Counter([*of_before, *rows]) - Counter(plain_rows(events, numbers, **settings))
    # Of the later purchases, each is a row or left out for one reason.
    left_out = sum(count for reason, count in counts.items() if reason not in ("new/T_1.csv", "unseen", "lacking"))
    assert len(rows) + left_out == sum(time > latest for _, _, time in events)


def test_a_log_that_lost_old_purchases_is_a_warning(tmp_path, capsys):
    old, later = two_weeks()
    first = prepared_of(tmp_path, old, ITEMS)
    of_u0 = sum(row[0] == "u0" for split in ("train", "valid", "test") for row in rows_of(first / split / "T.csv"))
    log = log_of(tmp_path / "longer.csv", [event for event in [*old, *later] if event[0] != "u0"])
    prepare_data(dataset=str(first), interactions=log, output_dir=str(tmp_path / "week_2"))
    assert f"lacks the purchases of {of_u0} rows of" in capsys.readouterr().out


def test_later_files_that_lost_leading_zeros_are_named(tmp_path, capsys):
    """Their purchases would be of other users and of unknown items, and a catalogue would have each item twice."""
    events = [(f"0{user}", f"00{(user + step) % 4}", T0 + user + DAY * step) for user in range(6) for step in range(6)]
    first = prepared_of(tmp_path, [event for event in events if event[2] < T0 + 4 * DAY], ["000", "001", "002", "003"])
    bare = [(user.lstrip("0") or "0", item, time) for user, item, time in events]
    bare += [("00", "2", T0 + 9 * DAY), ("00", "002", T0 + 9 * DAY)]
    flags = {"dataset": str(first), "add_items": items_of(tmp_path / "new.tsv", ["1", "2", "002", "4"])}
    capsys.readouterr()
    prepare_data(
        **flags, interactions=log_of(tmp_path / "bare.csv", bare), item_column="what", output_dir=str(tmp_path / "2")
    )
    printed = capsys.readouterr().out
    assert (
        "new.tsv has ids of " in printed and "1 differ by leading zeros only, such as '001' and '1'; write" in printed
    )
    assert f"bare.csv that are none of {first}: 5 differ by leading zeros only, such as '01' and '1'; write" in printed
    prepare_data(dataset=str(first), interactions=log_of(tmp_path / "log.csv", events), output_dir=str(tmp_path / "3"))
    assert "leading zeros" not in capsys.readouterr().out
    unlike = [(user, item.lstrip("0") or "0", time) for user, item, time in events]
    told = {
        "dataset": str(first),
        "interactions": log_of(tmp_path / "log.csv", unlike),
        "output_dir": str(tmp_path / "4"),
    }
    refused(told, "with the same ids")
    assert "3 differ by leading zeros only, such as '001' and '1'; write them alike" in capsys.readouterr().out


def test_a_later_return_is_no_new_row(tmp_path, capsys):
    old, later = two_weeks()
    items = items_of(tmp_path / "items.tsv", ITEMS)
    flags = {**COLUMNS, "items": items, "category": "T", "codes": 4, "levels": 2, "min_interactions": 2}

    def log(name, events, column="qty"):
        rows = "".join(f"{user},{item},{time},{quantity}\n" for (user, item, time), quantity in events)
        return str(written(tmp_path / name, f"who,what,when,{column}\n{rows}"))

    returned = [((user, item, time + 1), -1) for user, item, time in [old[0], later[0]]]
    events = [(event, 1) for event in [*old, *later]]
    prepare_data(interactions=log("log", [*events[: len(old)], returned[0]]), output_dir=str(tmp_path / "1"), **flags)
    assert "1 rows with a negative qty are returns, and left out" in capsys.readouterr().out
    given = {"dataset": str(tmp_path / "1"), "interactions": log("longer", [*events, *returned])}
    prepare_data(output_dir=str(tmp_path / "2"), **given)
    rows = rows_of(tmp_path / "2" / "new" / "T_1.csv")
    end = max(time for _, _, time in old)
    assert rows == plain_rows([*old, *later], numbers_of(tmp_path / "1"), end)
    assert "2 rows with a negative qty" in (out := capsys.readouterr().out) and "no column qty" not in out
    prepare_data(**{**given, "interactions": log("renamed", events, "menge")}, output_dir=str(tmp_path / "3"))
    assert "renamed has no column qty, so its returns count as purchases" in capsys.readouterr().out


def test_a_log_that_gives_no_new_rows_is_refused(tmp_path):
    old, later = two_weeks()
    first = prepared_of(tmp_path, old, ITEMS)
    end = max(time for _, _, time in old)
    flags = {"dataset": str(first), "output_dir": str(tmp_path / "week_2")}

    def given(events):
        return {**flags, "interactions": log_of(tmp_path / "longer.csv", events)}

    refused(given(later), "give old and new purchases together, with the same ids")
    refused(given([(user, f"other {item}", time) for user, item, time in [*old, *later]]), "with the same ids")
    refused(given(old), "no purchase after 2017-07-2")
    refused({**given([*old, *later]), "end_date": "2017-07-13"}, "give old and new purchases together")
    refused({**given([*old, *later]), "levels": 4}, "--levels is for a new data set; the settings are those of")
    refused({**given([*old, *later]), "title_column": "x"}, "--title_column: without --add_items it does nothing")
    refused({**given([*old, *later]), "rating_column": "x"}, "--rating_column: without --min_rating it does nothing")
    refused({**given([*old, *later]), "user_column": "x"}, "--user_column x is not a column")
    refused({**given([*old, *later]), "interactions": "nowhere.csv"}, "--interactions nowhere.csv: no such file")
    refused({**given([*old, *later]), "dataset": str(tmp_path)}, "has no dataset.json")
    refused(given([*old, ("u0", "W1", "soon")]), "when: expected a date or seconds since 1970")
    result = run_command("scripts/prepare_data.py", **given(old))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and str(end) not in result.stderr

    record = json.loads((first / "dataset.json").read_text())
    for change in ({"latest": "1"}, {"latest": None}, {"arguments": {**record["arguments"], "max_history": "9"}}):
        (first / "dataset.json").write_text(json.dumps({**record, **change}))
        refused(given([*old, *later]), "dataset.json is not what prepare_data.py wrote")
    (first / "dataset.json").write_text(json.dumps({**record, "arguments": {**record["arguments"], "max_history": 0}}))
    refused(given([*old, *later]), "--max_history 0: must be above 0")
    del record["latest"]
    (first / "dataset.json").write_text(json.dumps(record))
    refused(given([*old, *later]), "does not say when its purchases end, because it is of an earlier release")


def test_a_filtered_log_is_filtered_again(log, tmp_path):
    """Events, ratings, times and columns are those of the data set; only what the file looks like is said again."""
    filters = {"events": "buy", "event_column": "what", "min_rating": 2.0, "min_interactions": 2, "levels": 2}
    flags = {**log, **filters, "skip_bad_rows": True, "output_dir": str(tmp_path / "week_1")}
    prepare_data(**flags, end_date="2018-01-01")
    prepare_data(
        dataset=str(tmp_path / "week_1"),
        interactions=log["interactions"],
        skip_bad_rows=True,
        output_dir=str(tmp_path / "week_2"),
    )
    lines = Path(log["interactions"]).read_text().splitlines()[1:-1]
    bought = [line.split(";") for line in lines if line.split(";")[3] == "buy" and line.split(";")[4] != "1"]
    events = [(user, item, int(when[3:5]) * DAY + int(when[-2:])) for user, item, when, *_ in bought]
    rows = rows_of(tmp_path / "week_2" / "new" / "T_1.csv")
    assert Counter(rows) == Counter(plain_rows(events, numbers_of(tmp_path / "week_1"), 2 * DAY - 1)) and rows


def test_sft_takes_the_new_rows(base, tmp_path, capsys):
    old, later = two_weeks()
    first = prepared_of(tmp_path, old, ITEMS)
    log = log_of(tmp_path / "longer.csv", [*old, *later])
    prepare_data(dataset=str(first), interactions=log, output_dir=str(tmp_path / "week_2"))
    week = tmp_path / "week_2"
    files = {"train": week / "new" / "T_1.csv", "valid": week / "test" / "T.csv"}
    files |= {name: week / "index" / f"T.{name}.json" for name in ("index", "item")}
    more = {"category": "T", "tasks": "sid_history_to_sid", "dry_run": True}
    sft.train(**strings(sft_flags(files, base, tmp_path / "run", **more)))
    assert "examples;" in capsys.readouterr().out
