"""Ranking metrics over semantic IDs; every metric is a mean over rows, between 0 and 1."""

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

CUTOFFS = (1, 3, 5, 10, 20, 50)
TARGETS = ("never", "1 to 5 times", "more often")  # bought in the training file
HISTORIES = ("1 item", "2 or 3 items", "4 or more items")
OF_ITEMS = "items "  # starts the names of metrics of items, where several share a SID


def metrics_path(result: str) -> str:
    """The file for the metrics of a file of rankings. Next to a numbered one, MiniOneRec's evaluate.sh takes every
    other file named *.json for one more part of the rankings."""
    path, _ = os.path.splitext(result)
    return f"{path}.metrics" if os.path.basename(path).isdigit() else f"{path}.metrics.json"


def watched_cutoff(length: int) -> int:
    """The K whose metric selects the best checkpoint, for rankings of this length: 10, or the largest below it."""
    return max(k for k in CUTOFFS if k <= min(length, 10))


def rank_of(target: str, ranking: Sequence[str]) -> int | None:
    """The position of `target` in `ranking`, counted from 0, or None if it is not there."""
    try:
        return ranking.index(target)
    except ValueError:
        return None


def ranking_metrics(ranks: Sequence[int | None], length: int, extra_cutoff: int = 0) -> dict[str, float]:
    """HR@K, NDCG@K and MRR of rows with one relevant item each.

    Args:
        ranks: for each row, the position of the target counted from 0, or None if it is not in the ranking.
        length: of the rankings; larger cutoffs are left out.
        extra_cutoff: one more K next to CUTOFFS; 0 for none.

    HR@K is the fraction of rows whose target is among the first K; NDCG@K the mean over rows of 1/log2(rank + 2) (the
    ideal gain of a single relevant item is 1); MRR the mean over rows of 1/(rank + 1), over the whole ranking. A row
    whose target is not among them counts 0. Raises ValueError for no rows.
    """
    if not ranks:
        raise ValueError("no rows to score")
    metrics = {}
    cutoffs = sorted({*CUTOFFS, extra_cutoff} - {0})
    for k in (k for k in cutoffs if k <= length):
        hits = [rank for rank in ranks if rank is not None and rank < k]
        metrics[f"HR@{k}"] = len(hits) / len(ranks)
        metrics[f"NDCG@{k}"] = math.fsum(1 / math.log2(rank + 2) for rank in hits) / len(ranks)
    metrics["MRR"] = math.fsum(1 / (rank + 1) for rank in ranks if rank is not None) / len(ranks)
    return metrics


def bought_group(count: int) -> str:
    """The one of TARGETS for a target that was bought so often."""
    return TARGETS[0 if not count else 1 if count <= 5 else 2]


def history_group(length: int) -> str:
    """The one of HISTORIES for a history of so many items."""
    return HISTORIES[0 if length <= 1 else 1 if length <= 3 else 2]


def metrics_of_groups(
    groups: Sequence[str], order: Sequence[str], ranks: Sequence[int | None], length: int, prefix: str = ""
) -> dict[str, dict[str, float]]:
    """The number of rows in each group that has any, and their HR and NDCG at the watched cutoff.

    Args:
        groups: the group of every row.
        order: of the groups in the result.
        ranks, length: as in `ranking_metrics`.
        prefix: of the names in the result.
    """
    k, found = watched_cutoff(length), dict[str, dict[str, float]]()
    for group in (group for group in order if group in groups):
        of_group = [rank for rank, name in zip(ranks, groups, strict=True) if name == group]
        metrics = ranking_metrics(of_group, k)
        found[group] = {f"{prefix}rows": len(of_group)}
        found[group] |= {f"{prefix}{name}": metrics[name] for name in (f"HR@{k}", f"NDCG@{k}")}
    return found


def format_groups(title: str, groups: dict[str, dict[str, float]]) -> str:
    """A small table: one line per group, metrics of items last. What a group lacks is blank."""
    found = dict.fromkeys(name for values in groups.values() for name in values)
    names = sorted(found, key=lambda name: name.startswith(OF_ITEMS))
    lines = [f"{title:<22}" + "".join(f"  {name:>13}" for name in names)]
    for group, values in groups.items():
        cells = (_cell(values[name]) if name in values else "" for name in names)
        lines.append((f"  {group:<20}" + "".join(f"  {cell:>13}" for cell in cells)).rstrip())
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{value}" if isinstance(value, int) else f"{value:.4f}"


def popularity(targets: Iterable[str], length: int) -> list[str]:
    """The `length` most frequent targets, most frequent first, ties in order of first appearance."""
    return [sid for sid, _ in Counter(targets).most_common(length)]


def rank_without(target: str, places: Mapping[str, int], left_out: Collection[str], length: int) -> int | None:
    """The position of `target`, from 0, among the first `length` of a ranking that some are taken out of; None if it is
    not there. `places` are those in the whole ranking."""
    if target in left_out or target not in places:
        return None
    rank = places[target] - sum(places.get(other, len(places)) < places[target] for other in left_out)
    return rank if rank < length else None


def format_metrics(metrics: dict[str, float]) -> str:
    """A small table: one line per cutoff, then MRR."""
    lines = [f"{'K':>4}  {'HR@K':>8}  {'NDCG@K':>8}"]
    for name, value in metrics.items():
        if name.startswith("HR@"):
            k = name.removeprefix("HR@")
            lines.append(f"{k:>4}  {value:8.4f}  {metrics[f'NDCG@{k}']:8.4f}")
    lines.append(f" MRR  {metrics['MRR']:8.4f}")
    return "\n".join(lines)
