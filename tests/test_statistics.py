"""Estimates of a metric over the rows of a test file."""

import tracemalloc

import numpy as np
import pytest

from minionerec import statistics
from minionerec.metrics import ranking_metrics
from minionerec.statistics import Bootstrap, row_metrics


def test_the_metrics_of_a_run_are_the_means_of_its_rows():
    ranks = [0, None, 3, 12]
    rows, whole = row_metrics(ranks, 20), ranking_metrics(ranks, 20)
    assert rows.keys() == whole.keys() and all(values.shape == (4,) for values in rows.values())
    assert {name: values.mean() for name, values in rows.items()} == pytest.approx(whole)


def test_an_interval_of_the_bootstrap_is_that_of_theory():
    """Of a mean of 1,000 rows: 1.96 standard errors on both sides; equal rows have none."""
    values = np.random.default_rng(1).random(1000)
    bootstrap = Bootstrap(1000)
    found, error = bootstrap.mean([values]), values.std() / 1000**0.5
    assert found.value == values.mean() and found.deviation is None
    assert ((found.high - found.value) / error, (found.value - found.low) / error) == pytest.approx(
        (1.96, 1.96), rel=0.1
    )
    same = bootstrap.mean([np.full(1000, 0.25)])
    assert (same.low, same.value, same.high) == (0.25, 0.25, 0.25)


def test_a_ratio_compares_equal_rows_and_seeds():
    """Rows that vary alike leave the ratio certain, however much they vary."""
    values = np.random.default_rng(1).random(50)
    ratio = Bootstrap(50).ratio([values * 2, values * 4], [values, values])
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((3, 3, 3))
    assert ratio.deviation == pytest.approx(2**0.5)
    assert Bootstrap(50).ratio([values * 2], [values, values]).deviation is None


def test_resamples_without_a_hit_have_no_ratio():
    few, more = np.zeros(100), np.zeros(100)
    few[:2], more[:3] = 1, 1
    bootstrap = Bootstrap(100)
    assert (few[np.stack(list(bootstrap._resampled()))].mean(axis=1) == 0).any()
    ratio = bootstrap.ratio([more], [few])
    assert ratio.value == 1.5 and 1 <= ratio.low <= 1.5 <= ratio.high < 10
    seeds = bootstrap.ratio([more, more], [few, np.zeros(100)])
    assert seeds.value == 3 and seeds.deviation is None


def test_resamples_are_not_kept(monkeypatch):
    """1,000 of them, of a test file with a million rows, would take 4 GB and more."""
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    tracemalloc.start()
    try:
        of_rows = row_metrics([0, 4, None, 60] * 10_000, 50)
        estimate = Bootstrap(40_000).ratio([of_rows["HR@50"]], [of_rows["HR@1"]])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert estimate.value == 2 and peak < 8e6  # 13 metrics of 40,000 rows are 4 MB
