"""Co-purchases in semantic IDs: what is counted, how it is embedded, and that cold items stand on their texts."""

import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from minionerec.prepare import co_purchases, semantic_ids
from minionerec.prepare.co_purchases import CoPurchases, joined

ITEMS = 12
item = st.integers(0, ITEMS - 1)
a_row = st.tuples(item, st.lists(item, min_size=1, max_size=4), st.integers(0, 2))  # target, history, split


def batch_of(rows) -> np.ndarray:
    """Rows as `cleaning.in_time_order` gives them."""
    batch = np.zeros(len(rows), [("item", "<i4"), ("split", "u1"), ("history", "<i4", (4,))])
    batch["history"] = -1
    for place, (target, history, split) in enumerate(rows):
        batch["item"][place], batch["split"][place] = target, split
        batch["history"][place, -len(history) :] = history
    return batch


def baskets(users: int, items: int = 300, groups: int = 10) -> np.ndarray:
    """Rows of users who mostly buy items of one group: those with the same remainder."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        bought = rng.integers(0, items // groups, 5) * groups + np.where(rng.random(5) < 0.9, user % groups, 3)
        rows += [(bought[i], bought[max(0, i - 4) : i].tolist(), 0) for i in range(1, 5)]
    return batch_of(rows)


@given(st.lists(a_row, max_size=30), st.integers(1, 4))
def test_pairs_of_training_rows_are_counted_as_by_hand(rows, parts):
    together, bought = Counter(), Counter()
    for target, history, split in rows:
        if split == 0:  # training
            bought[target] += 1
            for other in history:
                if other != target:
                    together[target, other] += 1
                    together[other, target] += 1
    batches = [batch_of(rows[part::parts]) for part in range(parts)]
    training = sum(split == 0 for *_, split in rows)
    counted = CoPurchases.count(batches, ITEMS, training, seed=0)
    matrix = counted.together.toarray()
    assert {(i, j): matrix[i, j] for i, j in np.argwhere(matrix).tolist()} == together
    assert Counter({i: int(n) for i, n in enumerate(counted.bought) if n}) == bought

    # Its PPMI, pair by pair.
    sums = [sum(count for (i, _), count in together.items() if i == one) for one in range(ITEMS)]
    expected = np.zeros((ITEMS, ITEMS))
    for (i, j), count in together.items():
        expected[i, j] = max(0.0, math.log(count * sum(sums) / (sums[i] * sums[j])))
    np.testing.assert_allclose(counted.ppmi().toarray(), expected, atol=1e-5)
    # Only an item with co-purchases has an embedding; the more it was bought, the more that counts.
    lengths, trust = np.linalg.norm(counted.embed(seed=0), axis=1), counted.trust()
    assert all(length in (pytest.approx(0), pytest.approx(1, abs=1e-5)) for length in lengths)
    assert not (lengths > 0.5)[[not total for total in sums]].any() and trust.max(initial=0) < 1
    assert all((trust[i] > 0) == bool(sums[i] and bought[i]) for i in range(ITEMS))


def test_validation_and_test_rows_change_nothing():
    training = baskets(100)
    later = baskets(40)
    later["split"] = 1 + np.arange(len(later)) % 2
    later["history"][:, -1] = 7
    alone, among = (CoPurchases.count([part], 300, 400, seed=0) for part in (training, np.r_[training, later]))
    assert (alone.together != among.together).nnz == 0 and (alone.bought == among.bought).all()


def test_items_for_the_same_customers_are_near_each_other():
    embeddings = CoPurchases.count([baskets(2000)], 300, 8000, seed=0).embed(seed=0)
    assert embeddings.dtype == np.float32 and embeddings.shape == (300, co_purchases.DIMENSIONS)
    likeness = embeddings @ embeddings.T
    same = np.arange(300)[:, None] % 10 == np.arange(300) % 10
    assert likeness[same].mean() > 0.3 > 0.1 > likeness[~same].mean()


def test_a_sample_of_many_rows_is_counted(monkeypatch):
    rows = baskets(500)
    monkeypatch.setattr(co_purchases, "MOST_ROWS", 500)
    sample, again, other = (CoPurchases.count([rows], 300, len(rows), seed) for seed in (0, 0, 1))
    assert 0.15 < sample.together.sum() / CoPurchases.count([rows], 300, 1, 0).together.sum() < 0.35
    assert (sample.together != again.together).nnz == 0 < (sample.together != other.together).nnz
    assert sample.bought.sum() == len(rows)


def test_larger_matrices_are_approximated_well():
    counted = CoPurchases.count([baskets(400)], 300, 1600, seed=0)
    embeddings = counted.embed(seed=0)
    left, values, _ = np.linalg.svd(counted.ppmi().toarray())
    exact = (left * np.sqrt(values))[:, : co_purchases.DIMENSIONS]
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert np.abs(embeddings @ embeddings.T - exact @ exact.T).mean() < 0.03


@pytest.mark.slow
def test_a_new_process_with_any_number_of_threads_gives_the_same(tmp_path):
    """scipy's library for matrices is loaded late, and what limits its threads must know it."""
    np.save(tmp_path / "rows.npy", baskets(400))
    program = (
        "import sys; import numpy as np; from minionerec.prepare.co_purchases import CoPurchases\n"
        "counted = CoPurchases.count([np.load(sys.argv[1])], 300, 1600, seed=0)\n"
        "print(counted.embed(seed=0).tobytes().hex())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "rows.npy")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(printed) == 1


@pytest.fixture(scope="module")
def points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts [400, 6], co-purchases [400, 5] and trust in them: none in the last 40 items. Those of the ten before say
    nothing."""
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(20, 6))[rng.integers(0, 20, 400)] + 0.2 * rng.normal(size=(400, 6))
    purchases = rng.normal(size=(8, 5))[rng.integers(0, 8, 400)]
    purchases[350:] = 0
    trust = np.r_[rng.uniform(0.1, 0.9, 360), np.zeros(40)]
    return texts.astype(np.float32), purchases.astype(np.float32), trust.astype(np.float32)


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_variance_is_shared(points, share):
    texts, purchases, trust = points
    vectors, counting = joined(texts, purchases, trust, share)
    np.testing.assert_array_equal(vectors[:, :6], texts)
    variances = vectors[:350].var(axis=0)
    assert variances[6:].sum() / (texts.var(axis=0).sum() + variances[6:].sum()) == pytest.approx(share, abs=1e-5)
    assert counting.start == 6 and (counting.share[:350] == trust[:350]).all() and not counting.share[350:].any()


def test_texts_or_purchases_that_are_all_alike_leave_the_others(points):
    texts, purchases, trust = points
    for one, other in ((np.ones_like(texts), purchases), (texts, np.ones_like(purchases))):
        vectors, _ = joined(one, other, trust, 0.5)
        np.testing.assert_array_equal(vectors, np.concatenate([one, other], axis=1))


def weights_of(vectors: np.ndarray, trust: semantic_ids.Trust) -> np.ndarray:
    """How much each coordinate counts, [points, d]."""
    return np.where(np.arange(vectors.shape[1]) < trust.start, 1, trust.share[:, None])


def test_items_that_nobody_bought_get_the_codes_of_their_texts(points, monkeypatch):
    monkeypatch.setattr(semantic_ids, "SLACK", 20)  # so that every code has room
    vectors, trust = joined(*points, share=0.5)
    codebooks, codes, _ = semantic_ids.fit(vectors, 2, 16, seed=0, trust=trust)
    by_text, _ = semantic_ids.code_with(points[0][350:], codebooks[:, :, :6], np.ones((2, 16), bool))
    np.testing.assert_array_equal(codes[350:], by_text)
    # The others are not coded by their texts alone.
    by_text, _ = semantic_ids.code_with(points[0][:350], codebooks[:, :, :6], np.ones((2, 16), bool))
    assert (codes[:350] == by_text).all(axis=1).mean() < 0.9


def test_weighted_distances_are_those_by_hand(points):
    vectors, trust = joined(*points, share=0.5)
    centroids = vectors[:7]
    expected = (weights_of(vectors, trust)[:, None] * (vectors[:, None] - centroids) ** 2).sum(axis=2)
    np.testing.assert_allclose(semantic_ids.distances(vectors, centroids, trust), expected, atol=1e-3)
    equal = semantic_ids.Trust(6, np.ones(400, np.float32))
    np.testing.assert_allclose(
        semantic_ids.distances(vectors, centroids, equal), semantic_ids.distances(vectors, centroids), atol=1e-3
    )


def test_moving_items_costs_what_is_printed(points):
    vectors, trust = joined(*points, share=0.5)
    codebooks, codes, residual = semantic_ids.fit(vectors, 2, 16, seed=0, trust=trust)
    final, done = semantic_ids.resolve_collisions(codes, residual, codebooks[-1], "move", trust=trust)
    assert done["moved"] > 50

    weights = weights_of(vectors, trust)

    def explained(rows) -> float:
        left = sum((codebooks[level][[row[level] for row in rows]] for level in range(2)), np.zeros_like(vectors))
        mean = (weights * vectors).sum(axis=0) / weights.sum(axis=0)
        return 1 - (weights * (vectors - left) ** 2).sum() / (weights * (vectors - mean) ** 2).sum()

    before, after = (semantic_ids.explained(vectors, codebooks, rows, trust) for rows in (codes.tolist(), final))
    assert before == pytest.approx(explained(codes.tolist()), abs=1e-4) and before > after
    assert after == pytest.approx(explained(final), abs=1e-4)
    assert semantic_ids.explained(np.ones((3, 2)), np.ones((1, 2, 2)), [(0,), (1,), (0, 1)]) == 1
