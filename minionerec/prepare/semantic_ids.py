"""Semantic IDs: balanced residual k-means, and what becomes of items that share an ID.

L is the number of levels, K the codes of a level, d the width of an embedding.

Matrices are multiplied by one thread: the threads of OpenBLAS spin while they wait, which on busy cores costs twenty
times what a second one gains, and with one the result does not depend on how many cores there are.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from threadpoolctl import threadpool_limits

from minionerec.errors import InputError

SLACK = 1.5  # a code takes at most this many times its even share of the items
FIT_POINTS = 256  # items a code that the codebooks are learned from, at most
ITERATIONS = 20
CHUNK = 16_384  # rows of a distance matrix
COLLISIONS = ("move", "extend", "keep")


def distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances, [points, centroids]."""
    squares = np.einsum("nd,nd->n", points, points)[:, None] + np.einsum("kd,kd->k", centroids, centroids)
    return squares - 2 * points @ centroids.T


def _nearest(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each point, and how much farther the next one is; both [points]."""
    nearest, regret = np.empty(len(points), np.int64), np.full(len(points), np.inf, np.float32)
    for start in range(0, len(points), CHUNK):
        part = slice(start, start + CHUNK)
        distance = distances(points[part], centroids)
        nearest[part] = distance.argmin(axis=1)
        if len(centroids) > 1:
            two = np.partition(distance, 1, axis=1)
            regret[part] = two[:, 1] - two[:, 0]
    return nearest, regret


def assign(points: np.ndarray, centroids: np.ndarray, capacity: int) -> np.ndarray:
    """The code of each point, none given more than `capacity` times; [points].

    Points ask for their nearest code. One that is asked by too many keeps those that would lose most elsewhere and is
    full; the others ask again among the codes that are not. Raises ValueError for more points than there is room.
    """
    if len(points) > capacity * len(centroids):
        raise ValueError(f"{len(points)} points on {len(centroids)} codes of {capacity}")
    codes = np.empty(len(points), np.int64)
    room = np.full(len(centroids), capacity)
    waiting = np.arange(len(points))
    while len(waiting):
        free = np.flatnonzero(room)
        nearest, regret = _nearest(points[waiting], centroids[free])
        wanted = free[nearest]
        order = np.lexsort((-regret, wanted))
        queue = wanted[order]
        starts = np.searchsorted(queue, queue)  # of the queue that each point stands in
        served = order[np.arange(len(queue)) - starts < room[queue]]
        codes[waiting[served]] = wanted[served]
        room -= np.bincount(wanted[served], minlength=len(room))
        waiting = np.delete(waiting, served)
    return codes


def _capacity(points: int, codes: int) -> int:
    return math.ceil(SLACK * points / codes)


def _fit_level(points: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """Centroids [codes, d] by Lloyd's iterations in which no cluster outgrows its share."""
    from sklearn.cluster import kmeans_plusplus

    centroids = kmeans_plusplus(points, codes, random_state=seed)[0]
    before = None
    for _ in range(ITERATIONS):
        assigned = assign(points, centroids, _capacity(len(points), codes))
        if before is not None and np.array_equal(assigned, before):
            break
        before = assigned
        order = np.argsort(assigned, kind="stable")
        used, starts, sizes = np.unique(assigned[order], return_index=True, return_counts=True)
        centroids = centroids.copy()  # a code without points stays where it is
        centroids[used] = np.add.reduceat(points[order], starts) / sizes[:, None]
    return centroids.astype(np.float32)


@threadpool_limits.wrap(limits=1)
def fit(embeddings: np.ndarray, levels: int, codes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Learns codebooks and codes the items with them.

    Args:
        embeddings: [items, d].
        codes: of a level; where there are fewer items, as many as items.

    Returns codebooks [L, K, d], codes [items, L], and [items, d] what each level but the last leaves of an embedding.
    """
    codes = min(codes, len(embeddings))
    residual = embeddings.astype(np.float32)
    sample = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[: FIT_POINTS * codes])
    codebooks: list[np.ndarray] = []
    assigned: list[np.ndarray] = []
    for level in range(levels):
        if level:
            residual = residual - codebooks[-1][assigned[-1]]
        codebooks.append(_fit_level(residual[sample], codes, seed + level))
        assigned.append(assign(residual, codebooks[-1], _capacity(len(residual), codes)))
    return np.stack(codebooks), np.stack(assigned, axis=1), residual


@threadpool_limits.wrap(limits=1)
def code_with(embeddings: np.ndarray, codebooks: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of new items from stored codebooks, the nearest of those that are `known` [L, K]; as `fit`, codes [items,
    L] and what the last level codes, [items, d]."""
    residual = embeddings.astype(np.float32)
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
) -> tuple[list[tuple[int, ...]], Counter[str]]:
    """The final codes of each item, and how many items were moved, extended, or share an ID.

    Of the items with the same codes, the one nearest to them keeps them. The others get, by mode: `move` the nearest
    last code that is free after their prefix, and where none is, one more code; `extend` one more code; `keep` nothing.

    Args:
        codes: [items, L].
        residual: what the last level codes, [items, d].
        codebook: of the last level, [K, d].
        choices: last codes to move to; None for all.
        taken: the codes of items that are there already and stay; with them all new ones count as others.
    """
    choices = np.arange(len(codebook)) if choices is None else choices
    choice_vectors = codebook[choices]
    final = [tuple(row) for row in codes.tolist()]
    held = set(taken)
    done: Counter[str] = Counter()
    gap = residual - codebook[codes[:, -1]]
    others = []
    for item in np.argsort(np.einsum("nd,nd->n", gap, gap), kind="stable").tolist():
        if final[item] in held:
            others.append(item)
        held.add(final[item])
    if mode == "keep":
        return final, Counter(shared=len(others))
    for item in sorted(others, key=lambda item: final[item]):
        prefix = final[item][:-1]
        if mode == "move":
            nearest = choices[np.argsort(distances(residual[item][None], choice_vectors)[0], kind="stable")]
            free = next((code for code in nearest.tolist() if (*prefix, code) not in held), None)
        if mode == "move" and free is not None:
            final[item] = (*prefix, free)
            done["moved"] += 1
        else:
            number = 1
            while (*final[item], number) in held:
                number += 1
            final[item] = (*final[item], number)
            done["extended"] += 1
        held.add(final[item])
    return final, done


def level_report(codes: np.ndarray) -> list[dict[str, float]]:
    """For each level the codes in use, their perplexity (exp of the entropy, as many equally used codes), the items of
    the largest, and how many items share all their codes so far with another."""
    report = []
    for level in range(codes.shape[1]):
        counts = np.unique(codes[:, level], return_counts=True)[1]
        share = counts / len(codes)
        sharing = np.unique(codes[:, : level + 1], axis=0, return_counts=True)[1]
        report.append(
            {
                "used": len(counts),
                "perplexity": round(float(np.exp(-(share * np.log(share)).sum())), 1),
                "largest": int(counts.max()),
                "sharing": int(sharing[sharing > 1].sum()),
            }
        )
    return report


def tokens(codes: Sequence[int]) -> list[str]:
    """The SID tokens of an item's codes: `<a_12>`, `<b_3>`, ..."""
    return [f"<{chr(ord('a') + level)}_{code}>" for level, code in enumerate(codes)]


def codes_of(sid: object) -> tuple[int, ...] | None:
    """The codes of a list of SID tokens; None where `tokens` does not write it."""
    if not isinstance(sid, list) or not all(isinstance(token, str) for token in sid):
        return None
    matches = [match for token in sid if (match := re.fullmatch(r"<[a-z]_(\d{1,9})>", token))]
    if not sid or len(matches) < len(sid):
        return None
    codes = tuple(int(match[1]) for match in matches)
    return codes if tokens(codes) == sid else None


def save_codebooks(path: str, codebooks: np.ndarray) -> None:
    with open(path, "wb") as file:  # save_file makes a file that only its owner can read
        file.write(save({"codebooks": codebooks}))


def load_codebooks(path: str) -> np.ndarray:
    """[L, K, d]. Raises InputError where the file is not one that `save_codebooks` wrote."""
    try:
        codebooks = load_file(path)["codebooks"]
        if codebooks.ndim != 3 or codebooks.dtype != np.float32:
            raise ValueError(f"expected float32 codebooks [L, K, d], found {codebooks.dtype} {list(codebooks.shape)}")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return codebooks
