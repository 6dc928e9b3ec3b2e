"""Keeps where the targets of test rows stand in the rankings of runs, and compares runs row by row.

The models and rankings of RESULTS.md are too large to keep. places.csv has what metrics and intervals need: for every
test row and run the place of the target's SID, from 1, and that of the target's item; nothing where it is not among the
50 that were ranked.

    python -m benchmarks.places --add "LoRA=out/lora/result.json" --test_data_path test.csv --info_file info.txt \\
        --train_file train.csv
    python -m benchmarks.places --against LoRA
"""

import csv
import os

from benchmarks.common import print_table
from minionerec import cli
from minionerec.data.files import read_info_items, read_interactions, read_json
from minionerec.data.items import read_targets
from minionerec.errors import InputError
from minionerec.metrics import rank_of
from minionerec.statistics import Bootstrap, Estimate, row_metrics

PLACES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "places.csv")
LENGTH = 50  # of the rankings
METRICS = ("HR@1", "HR@10", "NDCG@10", "MRR", "HR@50")
Places = dict[str, list[str]]  # a column for each run, one of SIDs and one of items


def places(
    add: str = "",
    test_data_path: str = "",
    info_file: str = "",
    train_file: str = "",
    against: str = "",
    path: str = PLACES,
) -> None:
    """Adds a run, or prints a table of all of them.

    Args:
        add: name=result.json of a run that evaluate.py ranked with 50 beams; a run of that name is replaced.
        test_data_path: of that evaluation.
        info_file: the catalogue.
        train_file: orders items that share a SID.
        against: a run; ratios to it are printed, with their 95% intervals.
        path: the file of places.
    """
    known = read(path) if os.path.exists(path) else {}
    if add:
        name, _, result = add.rpartition("=")
        write(path, known | places_of(name, result, test_data_path, info_file, train_file))
        return
    if against and against not in known:
        raise InputError(f"--against {against!r}: is no run of {path}")
    if not known:
        raise InputError(f"--path {path}: is not there; add a run")
    runs = [name for name in known if f"{name}, items" in known]
    found = {name: row_metrics(ranks(known[name]), LENGTH) for name in runs}
    of_items = {name: row_metrics(ranks(known[f"{name}, items"]), LENGTH) for name in runs}
    bootstrap, rows = Bootstrap(len(next(iter(known.values()), []))), []
    for name in runs:
        row = {"": name} | {metric: f"{found[name][metric].mean():.4f}" for metric in METRICS}
        row |= {f"items {metric}": f"{of_items[name][metric].mean():.4f}" for metric in ("HR@10", "NDCG@10")}
        if against:
            for metric in METRICS:
                row[f"{metric} / {against}"] = _cell(bootstrap.ratio([found[name][metric]], [found[against][metric]]))
        rows.append(row)
    print_table(rows)


def places_of(name: str, result: str, test_data_path: str, info_file: str, train_file: str) -> Places:
    """The columns of a run."""
    items, targets = read_targets(read_info_items(info_file), info_file, train_file, test_data_path)
    rows = read_json(result)
    sids = [row.sid for row in read_interactions(test_data_path, "test_data_path", titles=False)]
    longest = min(LENGTH, len(items.sids))
    if [row["output"] for row in rows] != sids or any(len(row["predict"]) < longest for row in rows):
        raise InputError(f"--add {result}: does not rank {LENGTH} SIDs for each row of {test_data_path}")
    of_sids, of_items = [], []
    for row, target in zip(rows, targets, strict=True):
        ranking = row["predict"][:LENGTH]
        of_sids.append(_place(rank_of(row["output"], ranking)))
        of_items.append(_place(items.rank_of(target, ranking, LENGTH)))
    return {name: of_sids, f"{name}, items": of_items}


def ranks(column: list[str]) -> list[int | None]:
    """Places from 0; None for a target that was not found."""
    return [int(place) - 1 if place else None for place in column]


def read(path: str) -> Places:
    """The columns of a file of places."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return {name: [row[number] for row in rows] for number, name in enumerate(header)}


def write(path: str, columns: Places) -> None:
    """One line for each test row, in the order of the test file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _place(rank: int | None) -> str:
    return "" if rank is None else str(rank + 1)


def _cell(ratio: Estimate) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


if __name__ == "__main__":
    cli.run(places)
