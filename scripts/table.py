"""Prints a Markdown table of evaluated training runs and the popularity baseline, and plots it.

python scripts/table.py --train_file train.csv --test_data_path test.csv --runs "base=out/base,LoRA SFT=out/lora"
python scripts/table.py ... --runs "full=out/full,LoRA=out/lora_42,LoRA=out/lora_43" --intervals True
python scripts/table.py ... --info_file info.txt --runs "LoRA=out/lora,with SASRec=out/lora/blended.json"
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli
from minionerec.data.files import count_rows, read_info_items, read_interactions
from minionerec.data.items import Items, read_targets
from minionerec.errors import InputError, Problems
from minionerec.flags import check_new_file
from minionerec.metrics import popularity, rank_of, ranking_metrics

if TYPE_CHECKING:
    import numpy as np

RANKING = ("HR@1", "HR@5", "HR@10", "HR@50", "NDCG@5", "NDCG@10", "MRR")
OF_ITEMS = ("items HR@10", "items NDCG@10")
RELATIVE = ("HR@10", "NDCG@10", "MRR")
COSTS = ("trainable", "time (s)", "peak memory (GB)", "checkpoint (MB)")
RESAMPLES = 1000
RESULT = "result.json"


@dataclass(frozen=True)
class Rows:
    """The test rows: the SID of each target, and where items share SIDs, the items and the number of each target."""

    sids: list[str]
    items: Items | None
    targets: list[int | None]

    def metrics(self, rankings: Sequence[Sequence[str]], length: int) -> "dict[str, np.ndarray]":
        """The metrics of every row, [rows] each; their means are those of the run."""
        import numpy as np

        places = {"": [rank_of(*row) for row in zip(self.sids, rankings, strict=True)]}
        if self.items:
            pairs = zip(self.targets, rankings, strict=True)
            places["items "] = [self.items.rank_of(target, ranking, length) for target, ranking in pairs]
        found: dict[str, np.ndarray] = {}
        for prefix, ranks in places.items():
            of_rows = [ranking_metrics([rank], length) for rank in ranks]
            found |= {prefix + name: np.array([row[name] for row in of_rows]) for name in of_rows[0]}
        return found


class Runs:
    """The metrics of runs, each of one or more seeds, and their intervals."""

    def __init__(self, seeds_of: "dict[str, list[dict[str, np.ndarray]]]", rows: int, intervals: bool):
        import numpy as np

        self.seeds_of, self.intervals, self.names = seeds_of, intervals, list(seeds_of)
        # The same resampled rows for every run, so that ratios compare equal rows.
        self.drawn = np.random.default_rng(0).integers(0, rows, (RESAMPLES, rows))

    def has(self, name: str, metric: str) -> bool:
        """Whether the rankings of a run are long enough for a metric."""
        return metric in self.seeds_of[name][0]

    def row_means(self, name: str, metric: str) -> "np.ndarray":
        """[rows], the means over seeds."""
        import numpy as np

        return np.mean([seed[metric] for seed in self.seeds_of[name]], axis=0)

    def seed_means(self, name: str, metric: str) -> "np.ndarray":
        """[seeds], the means over rows."""
        import numpy as np

        return np.array([seed[metric].mean() for seed in self.seeds_of[name]])

    def with_interval(self, name: str, metric: str) -> tuple[float, float, float]:
        """The mean, and the ends of its interval."""
        values = self.row_means(name, metric)
        return values.mean(), *_interval(values[self.drawn].mean(axis=1))

    def cell(self, name: str, metric: str) -> str:
        """A metric of a run as text."""
        if not self.has(name, metric):
            return ""
        mean, low, high = self.with_interval(name, metric)
        more = f" [{low:.4f}, {high:.4f}]{_deviation(self.seed_means(name, metric))}" if self.intervals else ""
        return f"{mean:.4f}{more}"

    def ratio(self, name: str, method: str, metric: str) -> str:
        """The ratio to the same stage of a method in a row above; empty if there is none, or rankings are too short."""
        other = " ".join([method, *name.split(" ")[1:]])
        if other not in self.names[: self.names.index(name)] or not self.has(name, metric):
            return ""
        ours, theirs = self.row_means(name, metric), self.row_means(other, metric)
        text = f"{ours.mean() / theirs.mean():.3f}"
        if self.intervals:
            low, high = _interval(ours[self.drawn].mean(axis=1) / theirs[self.drawn].mean(axis=1))
            text += f" [{low:.3f}, {high:.3f}]"
            if len(self.seeds_of[name]) == len(self.seeds_of[other]):
                text += _deviation(self.seed_means(name, metric) / self.seed_means(other, metric), digits=3)
        return text


def _interval(samples: "np.ndarray") -> tuple[float, float]:
    import numpy as np

    low, high = np.percentile(samples, (2.5, 97.5))
    return low, high


def _deviation(values: "np.ndarray", digits: int = 4) -> str:
    import numpy as np

    return f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""


def table(
    train_file: str = "",
    test_data_path: str = "",
    info_file: str = "",
    runs: str = "",
    intervals: bool = False,
    against: str = "",
    figure: str = "",
) -> None:
    """Prints the table.

    Args:
        train_file: CSV of training interactions, for the popularity baseline.
        test_data_path: CSV of the test interactions that the runs were evaluated on.
        info_file: the catalogue; given, and where items share SIDs, the metrics of items are printed too. Items that
            share a SID follow each other in a ranking, the most bought in train_file first.
        runs: name=folder of every run, separated by commas; a folder contains metrics.json and result.json, or the name
            of another result in it follows: name=folder/blended.json. Folders with the same name are the seeds of one
            run, in the same order for all runs, and their mean is printed.
        intervals: print 95% bootstrap intervals over the test rows, and the standard deviation over seeds (for a ratio,
            that of the ratios seed by seed).
        against: methods to compare with, separated by commas: with full, the HR@10, NDCG@10 and MRR of "lora SFT" are
            also printed as a fraction of those of "full SFT".
        figure: PNG file for a bar chart with the intervals.
    """
    # Check the files and the names.
    problems = Problems()
    problems.attempt(count_rows, train_file, "train_file", titles=False)
    tests = problems.attempt(lambda: list(read_interactions(test_data_path, "test_data_path", titles=False)))
    listed = (problems.attempt(read_info_items, info_file) or []) if info_file else []
    items, targets = None, list[int | None]()
    if not problems and len(listed) > len({item.sid for item in listed}):
        found = problems.attempt(read_targets, listed, info_file, train_file, test_data_path)
        items, targets = found or (None, [])
    results = results_of(problems, runs)
    if figure:
        check_new_file(problems, "figure", figure, "the plot")
    references = [word for word in against.split(",") if word]
    for word in references:
        if not any(name.split(" ")[0] == word for name in results):
            problems.add(f"--against {word!r}: no name of a run starts with it; the names are {', '.join(results)}")
    for path in (path for seeds in results.values() for path in seeds):
        for file in (os.path.join(os.path.dirname(path), "metrics.json"), path):
            if not os.path.isfile(file):
                problems.add(f"--runs: {file}: no such file; train and evaluate the run first")
    problems.check()
    assert tests  # nothing was wrong

    # Read the rankings. MRR grows with their length, so all are cut to the shortest.
    rows = Rows([row.sid for row in tests], items, targets)
    ranked = {path: _rankings(path, rows, test_data_path) for seeds in results.values() for path in seeds}
    length = min(len(rankings[0]) for rankings in ranked.values())
    top = popularity((row.sid for row in read_interactions(train_file, "train_file", titles=False)), length)
    top = [sid for sid in top if items is None or sid in items.of_sid]
    seeds_of = {"popularity": [rows.metrics([top] * len(tests), length)]}
    for name, seeds in results.items():
        seeds_of[name] = [rows.metrics([ranking[:length] for ranking in ranked[path]], length) for path in seeds]
    found_runs = Runs(seeds_of, len(tests), intervals)

    # Print. Rankings may be too short for a metric.
    compared = [(method, metric) for method in references for metric in RELATIVE]
    metrics = [metric for metric in (*RANKING, *OF_ITEMS) if found_runs.has("popularity", metric)]
    header = [*metrics, *(f"{metric} / {method}" for method, metric in compared), *COSTS]
    print("| | " + " | ".join(header) + " |")
    print("|---" * (1 + len(header)) + "|")
    for name in seeds_of:
        cells = [found_runs.cell(name, metric) for metric in metrics]
        cells += [found_runs.ratio(name, method, metric) for method, metric in compared]
        print(f"| {name} | " + " | ".join(cells + _costs(results.get(name, []))) + " |")
    if figure:
        from minionerec.plots import plot_bars

        os.makedirs(os.path.dirname(figure) or ".", exist_ok=True)
        panels: dict[str, dict[str, tuple[float, float, float]]] = {"HR@10": {}, "NDCG@10": {}, "MRR": {}}
        for metric, bars in panels.items():
            named = (name for name in seeds_of if found_runs.has(name, metric))
            bars.update({name: found_runs.with_interval(name, metric) for name in named})
        plot_bars(panels, figure)


def results_of(problems: Problems, runs: str) -> dict[str, list[str]]:
    """The result files under each name of `--runs`; what is wrong with it goes to `problems`."""
    return {
        name: [path if path.endswith(".json") else os.path.join(path, RESULT) for path in paths]
        for name, paths in folders_of(problems, runs).items()
    }


def folders_of(problems: Problems, runs: str) -> dict[str, list[str]]:
    """The folders under each name of `--runs`; what is wrong with it goes to `problems`."""
    folders: dict[str, list[str]] = {}
    for run in (run for run in runs.split(",") if run):
        name, equals, folder = run.partition("=")
        if equals:
            folders.setdefault(name, []).append(folder)
        else:
            problems.add(f"--runs: {run!r} is not a name=folder pair; paths must not contain a comma")
    if not folders:
        problems.add(f"--runs {runs!r}: give name=folder pairs, separated by commas")
    return folders


def _read(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _rankings(path: str, rows: Rows, test_data_path: str) -> list[list[str]]:
    """The rankings of a result file. Raises InputError where it is one of other rows or of another catalogue."""
    result = _read(path)
    if len(result) != len(rows.sids):
        raise InputError(f"--runs: {path} ranks {len(result)} rows, {test_data_path} has {len(rows.sids)}")
    rankings = [row["predict"] for row in result]
    lacking = {sid for ranking in rankings for sid in ranking}.difference(rows.items.of_sid if rows.items else ())
    if rows.items and lacking:
        raise InputError(f"--runs: {path} ranks {min(lacking)}, which --info_file lacks")
    return rankings


def _costs(results: list[str]) -> list[str]:
    """The cells of COSTS, with the mean time and the highest peak over the seeds; empty cells for no runs."""
    if not results:
        return [""] * len(COSTS)
    costs = [_read(os.path.join(os.path.dirname(path), "metrics.json")) for path in results]
    return [
        f"{costs[0]['trainable_parameters']:,}",
        f"{sum(cost['seconds'] for cost in costs) / len(costs):.0f}",
        f"{max(cost['peak_memory_gb'] for cost in costs):.2f}",
        f"{costs[0]['checkpoint_mb']:.1f}",
    ]


if __name__ == "__main__":
    cli.run(table)
