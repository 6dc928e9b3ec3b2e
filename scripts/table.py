"""Prints a Markdown table of evaluated training runs and the popularity baseline, and plots it.

python scripts/table.py --train_file train.csv --test_data_path test.csv --runs "base=out/base,LoRA SFT=out/lora"
python scripts/table.py ... --runs "full=out/full,LoRA=out/lora_42,LoRA=out/lora_43" --intervals True
"""

import os
import sys
from typing import TYPE_CHECKING, TypedDict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli
from minionerec.checkpoint import read_json
from minionerec.data.files import count_rows, read_interactions
from minionerec.errors import InputError, Problems
from minionerec.flags import check_new_file
from minionerec.metrics import popularity, rank_of

if TYPE_CHECKING:
    import numpy as np

    from minionerec.statistics import Bootstrap, Estimate

    Seeds = list[dict[str, np.ndarray]]  # the metrics of every test row, for each seed of a run

RANKING = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")
RELATIVE = ("HR@10", "NDCG@10", "MRR")
# The costs in metrics.json, and their columns.
COSTS = {
    "trainable_parameters": "trainable",
    "seconds": "time (s)",
    "peak_memory_gb": "peak memory (GB)",
    "checkpoint_mb": "checkpoint (MB)",
}


class Ranked(TypedDict):
    """A row of result.json: the target and the ranking."""

    output: str
    predict: list[str]


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
    all_folders = [folder for seeds in folders.values() for folder in seeds]
    costs = {folder: problems.attempt(read_costs, folder) or {} for folder in all_folders}
    results = {folder: problems.attempt(read_rankings, folder) or [] for folder in all_folders}
    for folder, ranked in results.items():
        if ranked and rows and len(ranked) != rows:
            problems.add(f"--runs: {folder} ranks {len(ranked)} rows, {test_data_path} has {rows}")
    if figure:
        check_new_file(problems, "figure", figure, "the plot")
    references = [word for word in against.split(",") if word]
    for word in references:
        if not any(name.split(" ")[0] == word for name in folders):
            problems.add(f"--against {word!r}: no name of a run starts with it; the names are {', '.join(folders)}")
    problems.check()
    assert rows  # nothing was wrong

    from minionerec.statistics import Bootstrap

    found = metrics_of(folders, results, train_file, test_data_path)
    bootstrap = Bootstrap(rows)
    compared = [(method, metric) for method in references for metric in RELATIVE]
    header = [*RANKING, *(f"{metric} / {method}" for method, metric in compared), *COSTS.values()]
    print("| | " + " | ".join(header) + " |")
    print("|---" * (1 + len(header)) + "|")
    for name in found:
        cells = [_mean_cell(bootstrap, found[name], metric, intervals) for metric in RANKING]
        cells += [_ratio_cell(bootstrap, found, name, method, metric, intervals) for method, metric in compared]
        cells += _cost_cells([costs[folder] for folder in folders.get(name, [])])
        print(f"| {name} | " + " | ".join(cells) + " |")
    if figure:
        _plot(found, bootstrap, figure)


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


def read_rankings(folder: str) -> list[Ranked]:
    """The rankings of an evaluated run. Raises InputError where there are none."""
    path = os.path.join(folder, "result.json")
    rows: object = read_json(path) if os.path.isfile(path) else None
    if not isinstance(rows, list) or not rows or not all(map(_is_ranked, rows)):
        raise InputError(f"--runs: {path}: holds no rankings of evaluate.py; evaluate the run first")
    return rows


def _is_ranked(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("output"), str) and isinstance(row.get("predict"), list)


def read_costs(folder: str) -> dict[str, float]:
    """What a run cost, by the names of COSTS. Raises InputError where that is not known."""
    path = os.path.join(folder, "metrics.json")
    metrics: object = read_json(path) if os.path.isfile(path) else None
    known = metrics if isinstance(metrics, dict) else {}
    costs = {name: known[name] for name in COSTS if isinstance(known.get(name), int | float)}
    if len(costs) < len(COSTS):
        raise InputError(f"--runs: {path}: does not say what the training cost; train the run first")
    return costs


def metrics_of(
    folders: dict[str, list[str]], results: dict[str, list[Ranked]], train_file: str, test_data_path: str
) -> "dict[str, Seeds]":
    """The metrics of popularity and of every run, by name. MRR grows with the length of a ranking, so all are cut to
    the shortest."""
    from minionerec.statistics import row_metrics

    length = min(len(ranked[0]["predict"]) for ranked in results.values())
    top = popularity((row.sid for row in read_interactions(train_file, "train_file", titles=False)), length)
    popular = [rank_of(row.sid, top) for row in read_interactions(test_data_path, "test_data_path", titles=False)]
    ranks = {
        folder: [rank_of(row["output"], row["predict"][:length]) for row in ranked]
        for folder, ranked in results.items()
    }
    found = {"popularity": [row_metrics(popular, length)]}
    return found | {name: [row_metrics(ranks[folder], length) for folder in seeds] for name, seeds in folders.items()}


def _mean_cell(bootstrap: "Bootstrap", seeds: "Seeds", metric: str, intervals: bool) -> str:
    if metric not in seeds[0]:  # rankings are too short for it
        return ""
    return _cell(bootstrap.mean([seed[metric] for seed in seeds]), 4, intervals)


def _ratio_cell(
    bootstrap: "Bootstrap", found: "dict[str, Seeds]", name: str, method: str, metric: str, intervals: bool
) -> str:
    """The ratio to the same stage of a method, such as that of "full SFT" for "lora SFT"; empty if it is in no row
    above, or rankings are too short."""
    order, other = list(found), " ".join([method, *name.split(" ")[1:]])
    if other not in order[: order.index(name)] or metric not in found[name][0]:
        return ""
    ours, theirs = ([seed[metric] for seed in found[run]] for run in (name, other))
    return _cell(bootstrap.ratio(ours, theirs), 3, intervals)


def _cell(estimate: "Estimate", digits: int, intervals: bool) -> str:
    text = f"{estimate.value:.{digits}f}"
    if intervals:
        text += f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
        text += "" if estimate.deviation is None else f" ± {estimate.deviation:.{digits}f}"
    return text


def _cost_cells(seeds: list[dict[str, float]]) -> list[str]:
    """The cells of COSTS, with the mean time and the highest peak over the seeds; empty cells for none."""
    if not seeds:
        return [""] * len(COSTS)
    return [
        f"{seeds[0]['trainable_parameters']:,}",
        f"{sum(cost['seconds'] for cost in seeds) / len(seeds):.0f}",
        f"{max(cost['peak_memory_gb'] for cost in seeds):.2f}",
        f"{seeds[0]['checkpoint_mb']:.1f}",
    ]


def _plot(found: "dict[str, Seeds]", bootstrap: "Bootstrap", figure: str) -> None:
    """Plots the metrics of RELATIVE as bars with their intervals."""
    from minionerec.plots import plot_bars

    panels: dict[str, dict[str, tuple[float, float, float]]] = {metric: {} for metric in RELATIVE}
    for metric, bars in panels.items():
        for name in (name for name in found if metric in found[name][0]):
            estimate = bootstrap.mean([seed[metric] for seed in found[name]])
            bars[name] = estimate.value, estimate.low, estimate.high
    os.makedirs(os.path.dirname(figure) or ".", exist_ok=True)
    plot_bars(panels, figure)


if __name__ == "__main__":
    cli.run(table)
