"""Computes semantic IDs by balanced residual k-means, and resolves collisions of items that share an ID.

L is the number of levels, K the codes of a level, d the width of an embedding.

Matmuls run on one thread. The threads of OpenBLAS spin while they wait, which on busy cores costs twenty times what a
second thread gains; and on one thread the result does not depend on the number of cores.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from threadpoolctl import threadpool_limits

from minionerec.errors import InputError

SLACK = 1.5  # a code gets at most this many times items / codes
FIT_POINTS = 256  # the most items per code that the codebooks are fitted on
ITERATIONS = 20
CHUNK = 16_384  # rows of a distance matrix


@dataclass(frozen=True)
class Trust:
    """How much the coordinates of points count: the first `start` fully, the others by the `share` of each point,
    [points], from 0 to 1."""

    start: int
    share: np.ndarray

    def of(self, rows: np.ndarray | slice) -> "Trust":
        """That of some of the points."""
        return Trust(self.start, self.share[rows])

    def times(self, points: np.ndarray) -> np.ndarray:
        """Points [points, d], each coordinate times how much it counts."""
        weighted = points.copy()
        weighted[:, self.start :] *= self.share[:, None]
        return weighted

    def means(self, points: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The means of the points from each of `starts` to the next, [starts, d]; 0 where nothing counts."""
        sums = np.add.reduceat(self.times(points), starts)
        sums[:, : self.start] /= np.diff([*starts, len(points)])[:, None]
        sums[:, self.start :] /= np.maximum(np.add.reduceat(self.share, starts), 1e-12)[:, None]
        return sums


def distances(points: np.ndarray, centroids: np.ndarray, trust: Trust | None = None) -> np.ndarray:
    """Squared distances, [points, centroids], in which the squares of coordinates count by `trust`."""
    if trust is None:
        squares = np.einsum("nd,nd->n", points, points)[:, None] + np.einsum("kd,kd->k", centroids, centroids)
        return squares - 2 * points @ centroids.T
    weighted = trust.times(points)
    first, others = (np.square(part).sum(axis=1) for part in np.split(centroids, [trust.start], axis=1))
    squares = np.einsum("nd,nd->n", weighted, points)[:, None] + first + trust.share[:, None] * others
    return squares - 2 * weighted @ centroids.T


def _of(trust: Trust | None, rows: np.ndarray | slice) -> Trust | None:
    return trust.of(rows) if trust else None


def _nearest(points: np.ndarray, centroids: np.ndarray, trust: Trust | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each point, and how much farther the second nearest is; both [points]."""
    nearest: np.ndarray = np.empty(len(points), np.int64)
    regret: np.ndarray = np.full(len(points), np.inf, np.float32)
    for start in range(0, len(points), CHUNK):
        part = slice(start, start + CHUNK)
        distance = distances(points[part], centroids, _of(trust, part))
        nearest[part] = distance.argmin(axis=1)
        if len(centroids) > 1:
            two = np.partition(distance, 1, axis=1)
            regret[part] = two[:, 1] - two[:, 0]
    return nearest, regret


def assign(points: np.ndarray, centroids: np.ndarray, capacity: int, trust: Trust | None = None) -> np.ndarray:
    """The code of each point, [points]; no code is given more than `capacity` times. `trust`: as for `distances`.

    Every point requests its nearest code. A code with too many requests accepts the points whose next code is farthest,
    and is full; the others request again, among the codes that are not full. Raises ValueError if there are more points
    than places.
    """
    if len(points) > capacity * len(centroids):
        raise ValueError(f"{len(points)} points do not fit into {len(centroids)} codes of capacity {capacity}")
    codes: np.ndarray = np.empty(len(points), np.int64)
    room: np.ndarray = np.full(len(centroids), capacity)
    waiting = np.arange(len(points))
    while len(waiting):
        free = np.flatnonzero(room)
        nearest, regret = _nearest(points[waiting], centroids[free], _of(trust, waiting))
        requested = free[nearest]
        order = np.lexsort((-regret, requested))
        queue = requested[order]
        starts = np.searchsorted(queue, queue)  # where the queue of each point starts
        accepted = order[np.arange(len(queue)) - starts < room[queue]]
        codes[waiting[accepted]] = requested[accepted]
        room -= np.bincount(requested[accepted], minlength=len(room))
        waiting = np.delete(waiting, accepted)
    return codes


def _capacity(points: int, codes: int) -> int:
    return math.ceil(SLACK * points / codes)


def _fit_level(points: np.ndarray, codes: int, seed: int, trust: Trust | None) -> np.ndarray:
    """Centroids [codes, d] by Lloyd's iterations with clusters of limited size."""
    from sklearn.cluster import kmeans_plusplus

    starts_at = points if trust is None else Trust(trust.start, np.sqrt(trust.share)).times(points)
    centroids = points[kmeans_plusplus(starts_at, codes, random_state=seed)[1]]
    before = None
    for _ in range(ITERATIONS):
        assigned = assign(points, centroids, _capacity(len(points), codes), trust)
        if before is not None and np.array_equal(assigned, before):
            break
        before = assigned
        order = np.argsort(assigned, kind="stable")
        used, starts, sizes = np.unique(assigned[order], return_index=True, return_counts=True)
        centroids = centroids.copy()  # a code without points keeps its centroid
        if trust is None:
            centroids[used] = np.add.reduceat(points[order], starts) / sizes[:, None]
        else:
            centroids[used] = trust.of(order).means(points[order], starts)
    return centroids.astype(np.float32)


@threadpool_limits.wrap(limits=1)
def fit(
    embeddings: np.ndarray, levels: int, codes: int, seed: int, trust: Trust | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits codebooks, and gives codes to the items.

    Args:
        embeddings: [items, d].
        codes: codes of a level; as many as items, if there are fewer items.
        trust: how much the coordinates of `embeddings` count; None for all alike.

    Returns codebooks [L, K, d], codes [items, L], and the residuals that the last level encodes, [items, d].
    """
    codes = min(codes, len(embeddings))
    residual: np.ndarray = embeddings.astype(np.float32)
    sample = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[: FIT_POINTS * codes])
    codebooks: list[np.ndarray] = []
    assigned: list[np.ndarray] = []
    for level in range(levels):
        if level:
            residual = residual - codebooks[-1][assigned[-1]]
        codebooks.append(_fit_level(residual[sample], codes, seed + level, _of(trust, sample)))
        assigned.append(assign(residual, codebooks[-1], _capacity(len(residual), codes), trust))
    return np.stack(codebooks), np.stack(assigned, axis=1), residual


@threadpool_limits.wrap(limits=1)
def code_with(embeddings: np.ndarray, codebooks: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of new items from stored codebooks: the nearest of those that are `known` [L, K]. Returns codes [items, L],
    and the residuals that the last level encodes, [items, d]."""
    residual: np.ndarray = embeddings.astype(np.float32)
    assigned: list[np.ndarray] = []
    for level, codebook in enumerate(codebooks):
        if level:
            residual = residual - codebooks[level - 1][assigned[-1]]
        choices = np.flatnonzero(known[level])
        assigned.append(choices[_nearest(residual, codebook[choices])[0]])
    return np.stack(assigned, axis=1), residual


@threadpool_limits.wrap(limits=1)
def resolve_collisions(
    codes: np.ndarray,
    residual: np.ndarray,
    codebook: np.ndarray,
    mode: str,
    choices: np.ndarray | None = None,
    taken: Iterable[tuple[int, ...]] = (),
    elsewhere: Callable[[int, set[tuple[int, ...]]], tuple[int, ...] | None] = lambda item, used: None,
    trust: Trust | None = None,
) -> tuple[list[tuple[int, ...]], Counter]:
    """The final codes of each item, and how many items were moved, extended, or share an ID.

    Of the items with the same codes, the one nearest to its last centroid keeps them. The others change by mode: `move`
    gives the nearest last code that is free after their prefix, or one more code if none is free; `extend` gives one
    more code; `keep` changes nothing.

    Args:
        codes: [items, L].
        residual: what the last level encodes, [items, d].
        codebook: of the last level, [K, d].
        choices: last codes to move to; None for all.
        taken: codes of existing items, which do not change; a new item with taken codes always counts as one of the
            others.
        elsewhere: the codes to move an item to where no last code is free, given those that are used; None for one more
            code.
        trust: as for `fit`.
    """
    choices = np.arange(len(codebook)) if choices is None else choices
    choice_vectors = codebook[choices]
    final = [tuple(row) for row in codes.tolist()]
    used, done = set(taken), Counter[str]()
    gap = residual - codebook[codes[:, -1]]
    others = []
    error = np.einsum("nd,nd->n", gap if trust is None else trust.times(gap), gap)
    for item in np.argsort(error, kind="stable").tolist():
        if final[item] in used:
            others.append(item)
        used.add(final[item])
    if mode == "keep":
        return final, Counter(shared=len(others))
    for item in sorted(others, key=lambda item: final[item]):
        prefix = final[item][:-1]
        if mode == "move":
            here = slice(item, item + 1)
            distance = distances(residual[here], choice_vectors, _of(trust, here))[0]
            nearest = choices[np.argsort(distance, kind="stable")]
            free = next((code for code in nearest.tolist() if (*prefix, code) not in used), None)
        other = None
        if mode == "move":
            other = (*prefix, free) if free is not None else elsewhere(item, used)
        if other is not None:
            final[item] = other
            done["moved"] += 1
        else:
            number = 1
            while (*final[item], number) in used:
                number += 1
            final[item] = (*final[item], number)
            done["extended"] += 1
        used.add(final[item])
    return final, done


class FreeIds:
    """Finds IDs of known codes that no item has."""

    def __init__(self, codebooks: np.ndarray, known: np.ndarray):
        """`codebooks` [L, K, d]; `known` [L, K] says which codes may be used."""
        self.codebooks, self.choices = codebooks, [np.flatnonzero(level) for level in known]
        sizes = [len(choices) for choices in self.choices]
        self.below = [math.prod(sizes[level:]) for level in range(len(sizes) + 1)]  # IDs after so many codes
        self.taken: Counter[tuple[int, ...]] | None = None  # prefix -> IDs known to be used; others only cost time

    def nearest(self, embedding: np.ndarray, used: set[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The first codes that are not `used`: the last levels change first, each to the nearest codes. None if all are
        used."""
        levels = len(self.codebooks)
        if self.taken is None:
            self.taken = Counter(codes[:n] for codes in used if len(codes) == levels for n in range(levels))
        found = self._search((), embedding.astype(np.float32), used)
        self.taken.update(found[:n] for n in range(levels) if found)
        return found

    def _search(
        self, prefix: tuple[int, ...], residual: np.ndarray, used: set[tuple[int, ...]]
    ) -> tuple[int, ...] | None:
        level = len(prefix)
        if level == len(self.codebooks):
            return None if prefix in used else prefix
        if self.taken is not None and self.taken[prefix] >= self.below[level]:
            return None
        choices, codebook = self.choices[level], self.codebooks[level]
        order = np.argsort(distances(residual[None], codebook[choices])[0], kind="stable")
        found = (self._search((*prefix, code), residual - codebook[code], used) for code in choices[order].tolist())
        return next((codes for codes in found if codes is not None), None)


@threadpool_limits.wrap(limits=1)
def explained(
    embeddings: np.ndarray,
    codebooks: np.ndarray,
    codes: Sequence[Sequence[int]] | np.ndarray,
    trust: Trust | None = None,
) -> float:
    """The fraction of the variance of `embeddings` [items, d] that is in the sums of their codes' centroids. Codes
    after those of `codebooks` [L, K, d] only tell items apart. `trust` is that of `fit`."""
    left, rows = embeddings.astype(np.float32), np.array([row[: len(codebooks)] for row in codes])
    trust = trust or Trust(left.shape[1], np.ones(len(left), np.float32))
    centred = left - trust.means(left, np.zeros(1, int))
    for level, codebook in enumerate(codebooks):
        left = left - codebook[rows[:, level]]
    lost, variance = (float(np.vdot(trust.times(part), part)) for part in (left, centred))
    return round(1 - lost / variance, 4) if variance else 1.0


def level_report(codes: np.ndarray) -> list[dict[str, float]]:
    """For each level: the number of codes in use, their perplexity (exp of the entropy: that many equally used codes
    have the same entropy), the items of the most used code, and how many items share all codes so far with another."""
    report = []
    for level in range(codes.shape[1]):
        counts = np.unique(codes[:, level], return_counts=True)[1]
        fraction = counts / len(codes)
        sharing = np.unique(codes[:, : level + 1], axis=0, return_counts=True)[1]
        report.append(
            {
                "used": len(counts),
                "perplexity": round(float(np.exp(-(fraction * np.log(fraction)).sum())), 1),
                "largest": int(counts.max()),
                "sharing": int(sharing[sharing > 1].sum()),
            }
        )
    return report


def tokens(codes: Sequence[int]) -> list[str]:
    """The SID tokens of an item's codes: `<a_12>`, `<b_3>`, ..."""
    return [f"<{chr(ord('a') + level)}_{code}>" for level, code in enumerate(codes)]


def codes_of(sid: object) -> tuple[int, ...] | None:
    """The codes of a list of SID tokens, or None if `tokens` would not write it so."""
    if not isinstance(sid, list) or not all(isinstance(token, str) for token in sid):
        return None
    matches = [match for token in sid if (match := re.fullmatch(r"<[a-z]_(\d{1,9})>", token))]
    if not sid or len(matches) < len(sid):
        return None
    codes = tuple(int(match[1]) for match in matches)
    return codes if tokens(codes) == sid else None


def save_codebooks(path: str, codebooks: np.ndarray) -> None:
    """Writes codebooks [L, K, d] to a safetensors file."""
    with open(path, "wb") as file:  # `save_file` would make a file that only its owner can read
        file.write(save({"codebooks": codebooks}))


def load_codebooks(path: str) -> np.ndarray:
    """The codebooks in a file, [L, K, d]. Raises InputError if `save_codebooks` did not write it."""
    try:
        codebooks = load_file(path)["codebooks"]
        if codebooks.ndim != 3 or codebooks.dtype != np.float32:
            raise ValueError(f"expected float32 codebooks [L, K, d], found {codebooks.dtype} {list(codebooks.shape)}")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return codebooks
