"""Prints a Markdown table of evaluated training runs and the popularity baseline, and plots it.

python scripts/table.py --train_file train.csv --test_data_path test.csv --runs "base=out/base,LoRA SFT=out/lora"
python scripts/table.py ... --runs "full=out/full,LoRA=out/lora_42,LoRA=out/lora_43" --intervals True
"""

import json
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli
from minionerec.data.files import count_rows, read_interactions
from minionerec.errors import InputError, Problems
from minionerec.flags import check_new_file
from minionerec.metrics import popularity, rank_of, ranking_metrics

RANKING = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")
RELATIVE = ("HR@10", "NDCG@10", "MRR")
COSTS = ("trainable", "time (s)", "peak memory (GB)", "checkpoint (MB)")
RESAMPLES = 1000
RESULT = "result.json"


def table(
    train_file: str = "",
    test_data_path: str = "",
    runs: str = "",
    intervals: bool = False,
    against: str = "",
    figure: str = "",
) -> None:
    """Prints the table.

    Args:
        train_file: CSV of training interactions, for the popularity baseline.
        test_data_path: CSV of the test interactions that the runs were evaluated on.
        runs: name=folder of every run, separated by commas; a folder contains metrics.json and result.json. Folders
            with the same name are the seeds of one run, in the same order for all runs, and their mean is printed.
        intervals: print 95% bootstrap intervals over the test rows, and the standard deviation over seeds (for a ratio,
            that of the ratios seed by seed).
        against: methods to compare with, separated by commas: with full, the HR@10, NDCG@10 and MRR of "lora SFT" are
            also printed as a fraction of those of "full SFT".
        figure: PNG file for a bar chart with the intervals.
    """
    problems = Problems()
    problems.attempt(count_rows, train_file, "train_file", titles=False)
    rows = problems.attempt(count_rows, test_data_path, "test_data_path", titles=False)
    folders = folders_of(problems, runs)
    if figure:
        check_new_file(problems, "figure", figure, "the plot")
    references = [word for word in against.split(",") if word]
    for word in references:
        if not any(name.split(" ")[0] == word for name in folders):
            problems.add(f"--against {word!r}: no name of a run starts with it; the names are {', '.join(folders)}")
    for folder in (folder for seeds in folders.values() for folder in seeds):
        for name in ("metrics.json", RESULT):
            if not os.path.isfile(os.path.join(folder, name)):
                problems.add(f"--runs: {os.path.join(folder, name)}: no such file; train and evaluate the run first")
    problems.check()

    import numpy as np

    def values_of(ranks: list[int | None], length: int) -> dict[str, np.ndarray]:
        """The metrics of every row, [rows] each; their means are those of the run."""
        row_metrics = [ranking_metrics([rank], length) for rank in ranks]
        return {name: np.array([row[name] for row in row_metrics]) for name in row_metrics[0]}

    results = {folder: _read(os.path.join(folder, RESULT)) for seeds in folders.values() for folder in seeds}
    for folder, result in results.items():
        if len(result) != rows:
            raise InputError(f"--runs: {folder} ranks {len(result)} rows, {test_data_path} has {rows}")
    # MRR grows with the length of a ranking, so all are cut to the shortest.
    length = min(len(result[0]["predict"]) for result in results.values())

    def values_in(folder: str) -> dict[str, np.ndarray]:
        return values_of([rank_of(row["output"], row["predict"][:length]) for row in results[folder]], length)

    top = popularity((row.sid for row in read_interactions(train_file, "train_file", titles=False)), length)
    popular = [rank_of(row.sid, top) for row in read_interactions(test_data_path, "test_data_path", titles=False)]
    seeds_of = {"popularity": [values_of(popular, length)]}
    seeds_of |= {name: [values_in(folder) for folder in seeds] for name, seeds in folders.items()}
    order = list(seeds_of)
    # The same resampled rows for every run, so that ratios compare equal rows.
    drawn = np.random.default_rng(0).integers(0, rows, (RESAMPLES, rows))

    def row_means(name: str, metric: str) -> np.ndarray:
        """[rows], the means over seeds."""
        return np.mean([seed[metric] for seed in seeds_of[name]], axis=0)

    def seed_means(name: str, metric: str) -> np.ndarray:
        """[seeds], the means over rows."""
        return np.array([seed[metric].mean() for seed in seeds_of[name]])

    def interval(samples: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(samples, (2.5, 97.5))
        return low, high

    def deviation(values: np.ndarray, digits: int = 4) -> str:
        return f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""

    def cell(name: str, metric: str) -> str:
        if metric not in seeds_of[name][0]:
            return ""
        values = row_means(name, metric)
        text = f"{values.mean():.4f}"
        if intervals:
            low, high = interval(values[drawn].mean(axis=1))
            text += f" [{low:.4f}, {high:.4f}]{deviation(seed_means(name, metric))}"
        return text

    def ratio(name: str, method: str, metric: str) -> str:
        """The ratio to the same stage of a method in a row above; empty if there is none, or rankings are too short."""
        other = " ".join([method, *name.split(" ")[1:]])
        if other not in order[: order.index(name)] or metric not in seeds_of[name][0]:
            return ""
        ours, theirs = row_means(name, metric), row_means(other, metric)
        text = f"{ours.mean() / theirs.mean():.3f}"
        if intervals:
            low, high = interval(ours[drawn].mean(axis=1) / theirs[drawn].mean(axis=1))
            text += f" [{low:.3f}, {high:.3f}]"
            if len(seeds_of[name]) == len(seeds_of[other]):
                text += deviation(seed_means(name, metric) / seed_means(other, metric), digits=3)
        return text

    compared = [(method, metric) for method in references for metric in RELATIVE]
    header = [*RANKING, *(f"{metric} / {method}" for method, metric in compared), *COSTS]
    print("| | " + " | ".join(header) + " |")
    print("|---" * (1 + len(header)) + "|")
    for name in seeds_of:
        cells = [cell(name, metric) for metric in RANKING]
        cells += [ratio(name, method, metric) for method, metric in compared]
        print(f"| {name} | " + " | ".join(cells + _costs(folders.get(name, []))) + " |")
    if figure:
        from minionerec.plots import plot_bars

        os.makedirs(os.path.dirname(figure) or ".", exist_ok=True)
        panels: dict[str, dict[str, tuple[float, float, float]]] = {"HR@10": {}, "NDCG@10": {}, "MRR": {}}
        for metric, bars in panels.items():
            for name in (name for name in seeds_of if metric in seeds_of[name][0]):
                values = row_means(name, metric)
                bars[name] = (values.mean(), *interval(values[drawn].mean(axis=1)))
        plot_bars(panels, figure)


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


def _costs(folders: list[str]) -> list[str]:
    """The cells of COSTS, with the mean time and the highest peak over the seeds; empty cells for no folders."""
    if not folders:
        return [""] * len(COSTS)
    costs = [_read(os.path.join(folder, "metrics.json")) for folder in folders]
    return [
        f"{costs[0]['trainable_parameters']:,}",
        f"{sum(cost['seconds'] for cost in costs) / len(costs):.0f}",
        f"{max(cost['peak_memory_gb'] for cost in costs):.2f}",
        f"{costs[0]['checkpoint_mb']:.1f}",
    ]


if __name__ == "__main__":
    cli.run(table)
