"""Embeddings and semantic IDs: balance, collisions, codes for new items, and that all of it repeats."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minionerec.prepare import semantic_ids
from minionerec.prepare.item_embeddings import TextModel
from minionerec.prepare.settings import COLLISIONS


@pytest.fixture(scope="module")
def clusters() -> np.ndarray:
    """600 points around 20 places; half of them around the first, 40 of those equal."""
    rng = np.random.default_rng(0)
    place = np.where(np.arange(600) < 300, 0, rng.integers(0, 20, 600))
    points = rng.normal(size=(20, 8))[place] + 0.1 * rng.normal(size=(600, 8))
    points[:40] = points[0]
    return points.astype(np.float32)


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 12), st.integers(0, 10), st.booleans())
def test_no_code_takes_more_than_its_capacity(seed, points, codes, spare, alike):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(1, 3)).repeat(points, 0) if alike else rng.normal(size=(points, 3))
    centroids = rng.normal(size=(codes, 3))
    capacity = -(-points // codes) + spare
    assigned = semantic_ids.assign(vectors, centroids, capacity)
    assert np.bincount(assigned, minlength=codes).max() <= capacity
    assert (assigned == semantic_ids.assign(vectors, centroids, capacity)).all()
    if capacity >= points:  # then nothing keeps a point from the nearest
        distance = ((vectors[:, None] - centroids) ** 2).sum(2)
        assert np.allclose(distance[np.arange(points), assigned], distance.min(1))


def test_those_that_lose_most_elsewhere_stay():
    points = np.array([[0.0], [0.1], [0.4]])
    assert semantic_ids.assign(points, np.array([[0.0], [1.0]]), 2).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="3 points do not fit into 1 codes of capacity 2"):
        semantic_ids.assign(points, np.array([[0.0]]), 2)


def test_codes_are_balanced_and_near(clusters):
    codebooks, codes, residual = semantic_ids.fit(clusters, levels=3, codes=16, seed=1)
    assert codebooks.shape == (3, 16, 8) and codes.shape == (600, 3) and codebooks.dtype == np.float32
    for level in range(3):
        assert np.bincount(codes[:, level], minlength=16).max() <= math.ceil(semantic_ids.SLACK * 600 / 16)
    # The codes of an item add up to its embedding, nearer with every level.
    left, errors = clusters, [((clusters - clusters.mean(0)) ** 2).sum()]
    for level in range(3):
        if level == 2:
            np.testing.assert_allclose(left, residual, atol=1e-5)
        left = left - codebooks[level][codes[:, level]]
        errors.append((left**2).sum())
    assert errors[1] < 0.5 * errors[0] and errors[3] < errors[2] < errors[1]
    for row, level in zip(semantic_ids.level_report(codes), range(3), strict=True):
        counts = np.bincount(codes[:, level])
        shares = counts[counts > 0] / 600
        assert row["used"] == (counts > 0).sum() and row["largest"] == counts.max()
        assert row["perplexity"] == pytest.approx(2 ** -(shares * np.log2(shares)).sum(), abs=0.06)
        prefixes = Counter(map(tuple, codes[:, : level + 1].tolist()))
        assert row["sharing"] == sum(count for count in prefixes.values() if count > 1)


def test_one_seed_gives_one_result(clusters):
    first, again = (semantic_ids.fit(clusters, 2, 16, seed=3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], semantic_ids.fit(clusters, 2, 16, seed=4)[1])


def test_codebooks_are_learned_from_a_sample(clusters, monkeypatch):
    monkeypatch.setattr(semantic_ids, "FIT_POINTS", 4)
    _, codes, _ = semantic_ids.fit(clusters, 2, 16, seed=1)
    assert len(codes) == 600 and np.bincount(codes[:, 0]).max() <= math.ceil(semantic_ids.SLACK * 600 / 16)


def test_fewer_items_than_codes():
    codebooks, codes, _ = semantic_ids.fit(np.eye(3, dtype=np.float32), 2, 256, seed=0)
    assert codebooks.shape == (2, 3, 3) and len(set(codes[:, 0].tolist())) == 3


@pytest.mark.parametrize("mode", COLLISIONS)
def test_collisions(clusters, mode):
    codebooks, codes, residual = semantic_ids.fit(clusters, 2, 16, seed=1)
    natural = [tuple(row) for row in codes.tolist()]
    final, done = semantic_ids.resolve_collisions(codes, residual, codebooks[-1], mode)
    changed = [i for i in range(600) if final[i] != natural[i]]
    others = 600 - len(set(natural))
    assert others > 50
    if mode == "keep":
        assert final == natural and done == {"shared": others}
        return
    assert len(set(final)) == 600 and len(changed) == others == done.total()
    assert {natural[i] for i in range(600) if i not in changed} == set(natural)  # one of each keeps it
    assert done["extended"] == sum(len(sid) == 3 for sid in final)
    for item in changed:
        assert final[item][:1] == natural[item][:1]
        if mode == "extend":
            assert final[item][:2] == natural[item] and final[item][2] >= 1
        elif len(final[item]) == 3:  # moved only where there was room
            assert {sid[:2] for sid in final} >= {(*natural[item][:1], code) for code in range(16)}


def test_a_moved_item_gets_the_nearest_free_code():
    codebook = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
    residual = np.array([[0.9], [1.0], [1.1]], np.float32)
    codes = np.array([[5, 1], [5, 1], [5, 1]])
    final, done = semantic_ids.resolve_collisions(codes, residual, codebook, "move")
    assert final[1] == (5, 1) and done == {"moved": 2}
    assert {final[0], final[2]} == {(5, 0), (5, 2)} and final[0] == (5, 0)
    final, done = semantic_ids.resolve_collisions(
        codes, residual, codebook, "move", choices=np.array([1, 3]), taken=[(5, 1), (6, 3)]
    )
    assert Counter(map(len, final)) == {2: 1, 3: 2} and (5, 3) in final and done == {"moved": 1, "extended": 2}


def test_new_items_take_known_codes(clusters):
    codebooks, codes, _ = semantic_ids.fit(clusters, 2, 16, seed=1)
    known = np.ones((2, 16), bool)
    known[0, codes[7, 0]] = False
    again, left = semantic_ids.code_with(clusters, codebooks, known)
    assert codes[7, 0] not in again[:, 0]
    np.testing.assert_allclose(left, clusters - codebooks[0][again[:, 0]], atol=1e-6)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_tokens_are_read_back(codes):
    tokens = semantic_ids.tokens(codes)
    assert tokens[0] == f"<a_{codes[0]}>" and semantic_ids.codes_of(tokens) == tuple(codes)


@pytest.mark.parametrize(
    "sid", [[], ["<b_1>"], ["<a_01>"], ["<a_1>", "<a_2>"], ["a_1"], [1], "<a_1>", None, ["<a_-1>"]]
)
def test_other_tokens_are_not(sid):
    assert semantic_ids.codes_of(sid) is None


def test_the_number_of_threads_changes_nothing():
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(600)]
    texts = [" ".join(rng.choice(words, 8)) for _ in range(2000)]
    results = []
    for threads in (1, 2):
        TextModel.fit(texts[:50], seed=0)  # the libraries are loaded, or the limit would not reach them
        with threadpool_limits(threads):
            model = TextModel.fit(texts, seed=0)
            embeddings = model.embed(texts)
            results.append((model.components, embeddings, *semantic_ids.fit(embeddings, 2, 16, seed=0)))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_nearest_free_id_is_found_where_one_is_left():
    books = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    known = np.ones((3, 4), bool)
    known[1, 3] = False
    used: set[tuple[int, ...]] = set()
    free = semantic_ids.FreeIds(books, known)
    while (codes := free.nearest(books[0, 0], used)) is not None:
        assert codes not in used and codes[1] != 3
        used.add(codes)
    assert len(used) == 4 * 3 * 4
