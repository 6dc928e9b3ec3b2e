"""How sure a metric of a test file is: bootstrap intervals over its rows, and the deviation over seeds.

Dimensions: `N` rows of the test file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minionerec.metrics import ranking_metrics

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over rows and seeds, or the ratio of two.

    Attributes:
        value: the mean or ratio.
        low, high: its 95% interval over the rows (percentile bootstrap; Efron, 1979).
        deviation: the standard deviation over seeds; None where that is unknown, as for a single one.
    """

    value: float
    low: float
    high: float
    deviation: float | None


def row_metrics(ranks: Sequence[int | None], length: int) -> dict[str, np.ndarray]:
    """The metrics of every row, [N] each; their means are those of the run. Arguments as in `ranking_metrics`."""
    of_rank = {rank: ranking_metrics([rank], length) for rank in {None, *ranks}}
    return {name: np.array([of_rank[rank][name] for rank in ranks]) for name in of_rank[None]}


class Bootstrap:
    """Estimates over the rows of a test file. Every run gets the same resampled rows, so that a ratio compares equal
    rows. A metric is given as its values of every row, [N] for each seed."""

    def __init__(self, num_rows: int):
        self._num_rows = num_rows

    def mean(self, seeds: Sequence[np.ndarray]) -> Estimate:
        """The mean of a metric."""
        values = np.mean(seeds, axis=0)
        return _estimate(values.mean(), self._means(values), _seed_means(seeds))

    def ratio(self, seeds: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Estimate:
        """The mean of a metric as a fraction of that of another run, which is not 0. Its deviation is that of the
        ratios seed by seed, where both runs have as many."""
        values, theirs = np.mean(seeds, axis=0), np.mean(others, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            by_seed = _seed_means(seeds) / _seed_means(others) if len(seeds) == len(others) else np.array([])
            ratios = self._means(values) / self._means(theirs)
        by_seed = by_seed if np.isfinite(by_seed).all() else np.array([])  # a seed without hits has no ratio
        return _estimate(values.mean() / theirs.mean(), ratios, by_seed)

    def _resampled(self) -> Iterator[np.ndarray]:
        """The rows of each resample, [N]: drawn anew each time, because all of them would fill gigabytes."""
        random = np.random.default_rng(0)
        return (random.integers(0, self._num_rows, self._num_rows) for _ in range(RESAMPLES))

    def _means(self, values: np.ndarray) -> np.ndarray:
        """The mean of each resample, [RESAMPLES]."""
        return np.array([values[rows].mean() for rows in self._resampled()])


def _seed_means(seeds: Sequence[np.ndarray]) -> np.ndarray:
    """[seeds], the means over rows."""
    return np.array([values.mean() for values in seeds])


def _estimate(value: float, samples: np.ndarray, by_seed: np.ndarray) -> Estimate:
    low, high = np.percentile(samples[np.isfinite(samples)], (2.5, 97.5))  # a resample without hits has no ratio
    return Estimate(float(value), float(low), float(high), float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None)
