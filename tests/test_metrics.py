import math
import random

import pytest

from minionerec.metrics import format_metrics, popularity, rank_of, rank_without, ranking_metrics


def test_metrics_by_hand():
    # Targets at places 1, 3 and nowhere in rankings of 5.
    metrics = ranking_metrics([0, 2, None], 5, extra_cutoff=2)
    assert list(metrics) == ["HR@1", "NDCG@1", "HR@2", "NDCG@2", "HR@3", "NDCG@3", "HR@5", "NDCG@5", "MRR"]
    assert metrics["HR@1"] == metrics["HR@2"] == pytest.approx(1 / 3)
    assert metrics["HR@3"] == metrics["HR@5"] == pytest.approx(2 / 3)
    assert metrics["NDCG@3"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 3) / 3)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError):
        ranking_metrics([], 5)


def test_rank_and_popularity():
    assert rank_of("b", ["a", "b"]) == 1
    assert rank_of("c", ["a", "b"]) is None
    assert popularity("abcbcc", 2) == ["c", "b"]


def test_a_rank_without_some_is_that_of_the_ranking_that_is_left():
    chance = random.Random(0)
    for _ in range(300):
        ranking = chance.sample("abcdefgh", chance.randint(1, 8))
        others = set(chance.choices("abcdefghxy", k=chance.randint(0, 5)))
        length, target = chance.randint(1, 8), chance.choice("abcdefghx")
        left = [one for one in ranking if one not in others][:length]
        places = {one: place for place, one in enumerate(ranking)}
        assert rank_without(target, places, others, length) == rank_of(target, left)


def test_the_table_shows_every_metric():
    lines = format_metrics(ranking_metrics([0, None], 3)).splitlines()
    assert [line.split() for line in lines] == [
        ["K", "HR@K", "NDCG@K"], ["1", "0.5000", "0.5000"], ["3", "0.5000", "0.5000"], ["MRR", "0.5000"]
    ]  # fmt: skip
