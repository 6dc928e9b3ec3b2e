"""Ranking metrics over semantic IDs. Pure functions; every metric is a mean over rows, between 0 and 1."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

CUTOFFS = (1, 3, 5, 10, 20, 50)


def watched_cutoff(length: int) -> int:
    """The K that trainings choose their best checkpoint by, for rankings of this length: 10, or the largest below."""
    return max(k for k in CUTOFFS if k <= min(length, 10))


def rank_of(target: str, ranking: Sequence[str]) -> int | None:
    """The position of `target` in `ranking`, counted from 0, or None where it is absent."""
    try:
        return ranking.index(target)
    except ValueError:
        return None


def ranking_metrics(ranks: Sequence[int | None], length: int, extra_cutoff: int = 0) -> dict[str, float]:
    """HR@K, NDCG@K and MRR of rows with one relevant item each.

    Args:
        ranks: per row, the position of the target counted from 0, or None where the ranking lacks it.
        length: how long the rankings are; larger cut-offs are left out.
        extra_cutoff: one more K beside CUTOFFS; 0 for none.

    HR@K is the share of rows whose target stands in the first K; NDCG@K the mean of 1/log2(rank + 2) over them (the
    ideal gain of a single relevant item is 1); MRR the mean of 1/(rank + 1) over the whole ranking. Rows without the
    target count 0. Raises ValueError for no rows.
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


def popularity(targets: Iterable[str], length: int) -> list[str]:
    """The `length` most frequent targets, most frequent first, ties in order of first appearance."""
    return [sid for sid, _ in Counter(targets).most_common(length)]


def format_metrics(metrics: dict[str, float]) -> str:
    """A small table: one line a cut-off, then MRR."""
    lines = [f"{'K':>4}  {'HR@K':>8}  {'NDCG@K':>8}"]
    for name, value in metrics.items():
        if name.startswith("HR@"):
            k = name.removeprefix("HR@")
            lines.append(f"{k:>4}  {value:8.4f}  {metrics[f'NDCG@{k}']:8.4f}")
    lines.append(f" MRR  {metrics['MRR']:8.4f}")
    return "\n".join(lines)
