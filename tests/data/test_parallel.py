import csv
import os
import random
import sys

import pytest
from helpers import COLUMNS

from minionerec.data import files as data_files
from minionerec.data import parallel
from minionerec.errors import InputError


def write_rows(path, num_rows: int, bad: dict[int, list[str]]) -> str:
    """Rows with quoted line breaks, of which those in `bad` are replaced."""
    rng = random.Random(num_rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(num_rows):
            past = [rng.choice(['Bolt, 3/8"', "it's\na nut", "", "Ö"]) for _ in range(rng.randint(1, 3))]
            title = rng.choice(["", "Bolt"])
            good = ["u\n", past, title, "[]", "0", ["<a>"] * len(past), "<b>"]
            writer.writerow(bad.get(number, good))
    return str(path)


def outcome(path: str):
    try:
        return data_files.check_rows(path, "train_file", ["<a>", "<b>"])
    except InputError as error:
        return error.problems


@pytest.fixture
def in_three_parts(monkeypatch):
    """Files of any size are checked in three processes; the list has an entry for each that was started."""
    monkeypatch.setattr(parallel, "BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    started = []
    start = parallel._start
    monkeypatch.setattr(parallel, "_start", lambda *args: started.append(1) or start(*args))
    return started


@pytest.mark.slow
def test_several_processes_find_what_one_finds(tmp_path, in_three_parts, monkeypatch):
    """The same counts, and the same problems in the same order, up to the number of those that are not listed."""
    wrong = ["u", "['x']", "y", "[]", "0", "['<a>']", "<z>"]
    short, no_list = wrong[:2], [*wrong[:5], "<a>", "<b>"]
    cases = {
        "right": {},
        "few": {1: short, 3000: no_list, 5000: wrong},
        "many": dict.fromkeys(range(7, 7000, 900), wrong) | {2000: short},
    }
    for name, bad in cases.items():
        path = write_rows(tmp_path / f"{name}.csv", 7000, bad)
        found = outcome(path)
        assert len(in_three_parts) == 2
        in_three_parts.clear()
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "BYTES", 1 << 30)
            alone = outcome(path)
        assert found == alone and not in_three_parts
        assert sum(found.values()) == 7000 if name == "right" else len(found) == min(len(bad), 5) + (len(bad) > 5)
    with open(path, "ab") as file:
        file.write(b"\xff")
    assert "is not UTF-8 text" in outcome(path)[0]


@pytest.mark.slow
def test_a_part_whose_process_ends_is_checked_here(tmp_path, in_three_parts, monkeypatch):
    path = write_rows(tmp_path / "t.csv", 4000, {})
    for program in ("/bin/false", "/bin/true", sys.executable):
        monkeypatch.setattr(sys, "executable", program)
        assert sum(outcome(path).values()) == 4000


def test_a_small_file_starts_no_process_and_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert parallel.num_parts(0) == parallel.num_parts(parallel.BYTES) == 1
    assert parallel.num_parts(parallel.BYTES * 3) == 3 and parallel.num_parts(parallel.BYTES * 100) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parallel.num_parts(parallel.BYTES * 100) == 2
