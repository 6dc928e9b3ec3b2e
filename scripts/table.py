"""Prints a Markdown table of evaluated training runs and the popularity baseline, and plots it.

python scripts/table.py --train_file train.csv --test_data_path test.csv --runs "base=out/base,LoRA SFT=out/lora"
python scripts/table.py ... --runs "full=out/full,LoRA=out/lora_42,LoRA=out/lora_43" --intervals True
python scripts/table.py ... --info_file info.txt --runs "LoRA=out/lora,with SASRec=out/lora/blended.json"
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli
from minionerec.data.files import Interaction, count_rows, read_info_items, read_interactions, read_json, shorten
from minionerec.data.items import ExcludeSeen, Items, read_targets, seen_sids, share_sids
from minionerec.errors import InputError, Problems
from minionerec.flags import check_new_file
from minionerec.metrics import metrics_path, popularity, rank_of
from minionerec.validation import is_number

if TYPE_CHECKING:
    import numpy as np

    from minionerec.statistics import Bootstrap, Estimate

    Seeds = list[dict[str, np.ndarray]]  # the metrics of every test row, for each seed of a run

RANKING = ("HR@1", "HR@5", "HR@10", "HR@50", "NDCG@5", "NDCG@10", "MRR")
OF_ITEMS = ("items HR@10", "items NDCG@10")
RELATIVE = ("HR@10", "NDCG@10", "MRR")
# The costs in metrics.json, and their columns.
COSTS = {
    "trainable_parameters": "trainable",
    "seconds": "time (s)",
    "peak_memory_gb": "peak memory (GB)",
    "checkpoint_mb": "checkpoint (MB)",
}


@dataclass(frozen=True)
class Targets:
    """What the test rows ask for: the rows, the SIDs of the catalogue if that is given, and where items share SIDs, the
    items and the number of each target."""

    rows: list[Interaction]
    catalogue: frozenset[str]
    items: Items | None
    numbers: list[int | None]

    @property
    def sids(self) -> list[str]:
        """The SID of each target."""
        return [row.sid for row in self.rows]

    def metrics(
        self, rankings: Sequence[Sequence[str]], length: int, exclude_seen: ExcludeSeen = False
    ) -> "dict[str, np.ndarray]":
        """The metrics of every row, [rows] each, of rankings that are cut to `length` SIDs. A target that
        `exclude_seen` leaves out is a miss, as in evaluate.py: where the catalogue is hardly larger than a ranking, it
        stands at the end of one."""
        from minionerec.statistics import row_metrics

        pairs = zip(self.rows, rankings, strict=True)
        cut = [[] if row.sid in seen_sids(row, exclude_seen) else ranking[:length] for row, ranking in pairs]
        found = row_metrics([rank_of(*row) for row in zip(self.sids, cut, strict=True)], length)
        if self.items:
            ranks = [self.items.rank_of(*row, length) for row in zip(self.numbers, cut, strict=True)]
            found |= {f"items {name}": values for name, values in row_metrics(ranks, length).items()}
        return found


def table(
    train_file: str = "",
    test_data_path: str = "",
    info_file: str = "",
    runs: str = "",
    intervals: bool = False,
    against: str = "",
    figure: str = "",
) -> None:
    """Prints a table of evaluated runs and the popularity baseline.

    Args:
        train_file: CSV of training interactions, for the popularity baseline.
        test_data_path: CSV of the test interactions that the runs were evaluated on.
        info_file: the catalogue; given, popularity ranks its SIDs only, and where items share SIDs, the metrics of
            items are printed too. Items that share a SID follow each other in a ranking, the most bought in train_file
            first.
        runs: name=folder of every run, separated by commas. The folder contains metrics.json and result.json;
            name=folder/blended.json takes the rankings from another file in it. Folders with the same name are the
            seeds of one run, in the same order for all runs, and their mean is printed.
        intervals: print 95% bootstrap intervals over the test rows, and the standard deviation over seeds (for a ratio,
            that of the ratios seed by seed).
        against: methods to compare with, separated by commas: with full, the HR@10, NDCG@10 and MRR of "lora SFT" are
            also printed as a fraction of those of "full SFT".
        figure: PNG file for NDCG@10 with its intervals against time and memory.
    """
    # Check the files and the names.
    problems = Problems()
    problems.attempt(count_rows, train_file, "train_file", titles=False)
    targets = problems.attempt(read_test_targets, test_data_path, info_file, train_file)
    results = results_of(problems, runs)
    paths = [path for seeds in results.values() for path in seeds]
    costs = {path: problems.attempt(read_costs, os.path.dirname(path)) or {} for path in paths}
    rankings = {path: problems.attempt(read_rankings, path, targets, test_data_path) or [] for path in paths}
    if figure:
        check_new_file(problems, "figure", figure, "the plot")
    references = [word for word in against.split(",") if word]
    for word in references:
        if not any(name.split(" ")[0] == word for name in results):
            problems.add(f"--against {word!r}: no name of a run starts with it; the names are {', '.join(results)}")
    problems.check()
    assert targets  # nothing was wrong

    seen = {path: read_seen(path) for path in paths}
    for note in notes_on_seen(results, seen):
        print(f"table.py: {note}", file=sys.stderr)

    from minionerec.statistics import Bootstrap

    # Compute. MRR grows with the length of a ranking, so all are cut to the shortest.
    length = min(len(ranked[0]) for ranked in rankings.values())
    bought = (row.sid for row in read_interactions(train_file, "train_file", titles=False))
    top = popularity((sid for sid in bought if not targets.catalogue or sid in targets.catalogue), length)
    found = {"popularity": [targets.metrics([top] * len(targets.sids), length)]}
    found |= {
        name: [targets.metrics(rankings[path], length, seen[path]["exclude_seen"]) for path in seeds]
        for name, seeds in results.items()
    }

    # Print.
    bootstrap = Bootstrap(len(targets.sids))
    compared = [(method, metric) for method in references for metric in RELATIVE]
    metrics = [metric for metric in (*RANKING, *OF_ITEMS) if metric in found["popularity"][0]]
    header = [*metrics, *(f"{metric} / {method}" for method, metric in compared), *COSTS.values()]
    print("| | " + " | ".join(header) + " |")
    print("|---" * (1 + len(header)) + "|")
    for name in found:
        cells = [_mean_cell(bootstrap, found[name], metric, intervals) for metric in metrics]
        cells += [_ratio_cell(bootstrap, found, name, method, metric, intervals) for method, metric in compared]
        cells += _cost_cells([costs[path] for path in results.get(name, [])])
        print(f"| {name} | " + " | ".join(cells) + " |")
    if figure:
        _plot(found, bootstrap, {name: [costs[path] for path in seeds] for name, seeds in results.items()}, figure)


def read_test_targets(test_data_path: str, info_file: str, train_file: str) -> Targets:
    """What the rows of the test file ask for, also as items where the catalogue is given and items share SIDs; where
    they cannot be told apart, a line says so, as in evaluate.py."""
    rows = list(read_interactions(test_data_path, "test_data_path", titles=False))
    listed = read_info_items(info_file) if info_file else []
    catalogue = frozenset(item.sid for item in listed)
    if share_sids(listed):
        try:
            return Targets(rows, catalogue, *read_targets(listed, info_file, train_file, test_data_path))
        except InputError as error:
            reason = f"items share SIDs, and metrics are those of SIDs only: {error.problems[0]}"
            print(f"table.py: {reason}", file=sys.stderr)
    return Targets(rows, catalogue, None, [])


def folders_of(problems: Problems, runs: str) -> dict[str, list[str]]:
    """The folders under each name of `--runs`; what is wrong with it goes to `problems`."""
    folders: dict[str, list[str]] = {}
    for run in (run.strip() for run in runs.split(",") if run.strip()):
        name, equals, folder = run.partition("=")
        if "|" in name or name == "popularity":
            problems.add(f"--runs: a run cannot be called {name!r}: | separates columns, popularity has its own row")
        elif equals:
            folders.setdefault(name, []).append(folder)
        else:
            problems.add(f"--runs: {run!r} is not a name=folder pair; paths must not contain a comma")
    if not folders:
        problems.add(f"--runs {runs!r}: give name=folder pairs, separated by commas")
    return folders


def results_of(problems: Problems, runs: str) -> dict[str, list[str]]:
    """The result files under each name of `--runs`; what is wrong with it goes to `problems`."""
    return {
        name: [path if path.endswith(".json") else os.path.join(path, "result.json") for path in paths]
        for name, paths in folders_of(problems, runs).items()
    }


def read_rankings(path: str, targets: Targets | None, test_data_path: str) -> list[list[str]]:
    """The rankings of an evaluated run, SIDs, all of one length. Raises InputError where there are none, and where they
    belong to rows with other targets or to a different catalogue."""
    rows: object = read_json(path) if os.path.isfile(path) else None
    if not isinstance(rows, list) or not rows or not all(map(_is_ranked, rows)):
        raise InputError(f"--runs: {path}: holds no rankings of evaluate.py; evaluate the run first")
    one_text: dict[str, str] = {}  # for all equal SIDs: 50 texts a row would take gigabytes
    rankings = [[one_text.setdefault(sid, sid) for sid in row["predict"]] for row in rows]
    lengths = set(map(len, rankings))
    if len(lengths) > 1:
        raise InputError(f"--runs: {path} ranks {min(lengths)} to {max(lengths)} items a row; evaluate the run again")
    if targets is None:  # which is reported already
        return rankings
    if len(rows) != len(targets.sids):
        raise InputError(f"--runs: {path} ranks {len(rows)} rows, {test_data_path} has {len(targets.sids)}")
    for number, (row, sid) in enumerate(zip(rows, targets.sids, strict=True), 1):
        if row["output"].strip(' \n"') != sid:  # MiniOneRec quotes it
            other = f"{path} has the target {shorten(row['output'])} in row {number}, {test_data_path} has {sid}"
            raise InputError(f"--runs: {other}; evaluate the run on this file")
    lacking = {sid for row in rankings for sid in row}.difference(targets.catalogue)
    if targets.catalogue and lacking:
        raise InputError(f"--runs: {path} ranks {min(lacking)}, which --info_file lacks")
    return rankings


def _is_ranked(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("output"), str):
        return False
    ranking = row.get("predict")
    return isinstance(ranking, list) and bool(ranking) and all(isinstance(sid, str) for sid in ranking)


def read_costs(folder: str) -> dict[str, float]:
    """What a run cost, by the names of COSTS. Raises InputError where that is not known."""
    path = os.path.join(folder, "metrics.json")
    metrics: object = read_json(path) if os.path.isfile(path) else None
    known = metrics if isinstance(metrics, dict) else {}
    costs = {name: known[name] for name in COSTS if is_number(known.get(name))}
    if len(costs) < len(COSTS):
        raise InputError(f"--runs: {path}: does not say what the training cost; train the run first")
    return costs


def read_seen(path: str) -> dict[str, Any]:
    """The flags about what was seen that evaluate.py ranked with; False where it did not, or did not rank."""
    written = metrics_path(path)
    metrics: object = read_json(written) if os.path.isfile(written) else None
    known = metrics if isinstance(metrics, dict) else {}
    return {flag: known.get(flag) or False for flag in ("exclude_seen", "seen_penalty")}


def notes_on_seen(results: dict[str, list[str]], seen: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each of the flags about what was seen that some rows have and others have not, or otherwise: they
    answer different questions. Popularity and train_sasrec.py leave nothing out and lower nothing."""
    names: dict[str, dict[str, list[str]]] = {flag: {"": ["popularity"]} for flag in ("exclude_seen", "seen_penalty")}
    for name, paths in results.items():
        for path in paths:
            for flag, by_value in names.items():
                value = seen[path][flag]
                by_value.setdefault(f"{value:g}" if type(value) is float else str(value or ""), []).append(name)
    notes = []
    for flag, by_value in names.items():
        rows = [
            f"{', '.join(dict.fromkeys(of))} {f'with --{flag} {value}' if value else 'without it'}"
            for value, of in sorted(by_value.items(), key=lambda pair: not pair[0])
        ]
        notes += [f"note: rows that do not compare: {'; '.join(rows)}"] if len(rows) > 1 else []
    return notes


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
    if not any(values.any() for values in theirs):  # no hit to compare with
        return ""
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


def _plot(
    found: "dict[str, Seeds]", bootstrap: "Bootstrap", costs: dict[str, list[dict[str, float]]], figure: str
) -> None:
    """Plots NDCG@10 (MRR, where rankings are too short for it) with its interval against the mean time and the highest
    peak of memory of the seeds."""
    from minionerec.plots import plot_costs

    metric = "NDCG@10" if "NDCG@10" in found["popularity"][0] else "MRR"
    estimates = {name: bootstrap.mean([seed[metric] for seed in seeds]) for name, seeds in found.items()}
    values = {name: (estimate.value, estimate.low, estimate.high) for name, estimate in estimates.items()}
    times = {name: sum(cost["seconds"] for cost in seeds) / len(seeds) for name, seeds in costs.items()}
    peaks = {name: max(cost["peak_memory_gb"] for cost in seeds) for name, seeds in costs.items()}
    panels = {COSTS["seconds"]: times, COSTS["peak_memory_gb"]: peaks}
    os.makedirs(os.path.dirname(figure) or ".", exist_ok=True)
    plot_costs(metric, values, panels, figure)


if __name__ == "__main__":
    cli.run(table)
