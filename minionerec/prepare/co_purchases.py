"""Embeds items by what was bought with them: a truncated SVD of the PPMI matrix of their co-purchases.

Two items are a co-purchase where one is the target of a training row and the other is in its history. PPMI, positive
pointwise mutual information, is log(how often they are together / how often they would be by chance), or 0 where that
is negative. A text says what an item is; co-purchases say whom it is for.

d is the width of the embeddings of texts, p that of co-purchases.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from minionerec.prepare.semantic_ids import Trust

if TYPE_CHECKING:
    from scipy.sparse import csr_array

DIMENSIONS = 128
SVD_ITERATIONS = 5
MOST_ROWS = 2_000_000  # training rows that are counted; a random sample of more
HALF_TRUSTED = 3  # an item that was bought so often counts half by its co-purchases


@dataclass(frozen=True)
class CoPurchases:
    """What the training rows say about items.

    Attributes:
        together: how often two items are a co-purchase, [items, items], symmetric, 0 for an item and itself.
        bought: how often an item is a target, [items].
    """

    together: "csr_array"
    bought: np.ndarray

    @classmethod
    def count(cls, batches: Iterable[np.ndarray], num_items: int, num_rows: int, seed: int) -> "CoPurchases":
        """Counts in the training rows among `batches` of `cleaning.in_time_order`; `num_rows` says how many they
        are."""
        from scipy.sparse import csr_array

        rng = np.random.default_rng(seed)
        pairs = csr_array((num_items, num_items), dtype=np.float32)
        bought: np.ndarray = np.zeros(num_items, np.int64)
        for batch in batches:
            rows = batch[batch["split"] == 0]
            bought += np.bincount(rows["item"], minlength=num_items)
            if num_rows > MOST_ROWS:
                rows = rows[rng.random(len(rows)) < MOST_ROWS / num_rows]
            target: np.ndarray = np.broadcast_to(rows["item"][:, None], rows["history"].shape)
            counts = (rows["history"] >= 0) & (rows["history"] != target)
            one = np.ones(int(counts.sum()), np.float32)
            pairs = pairs + csr_array((one, (target[counts], rows["history"][counts])), pairs.shape)
        return cls(csr_array(pairs + pairs.T), bought)

    @property
    def known(self) -> np.ndarray:
        """Whether an item has a co-purchase, [items]."""
        return np.diff(self.together.indptr) > 0

    def trust(self) -> np.ndarray:
        """How much the co-purchases of an item count, from 0 for none to nearly 1, [items]."""
        return np.where(self.known, self.bought / (self.bought + HALF_TRUSTED), 0).astype(np.float32)

    def ppmi(self) -> "csr_array":
        """Positive pointwise mutual information, [items, items]."""
        from scipy.sparse import coo_array, csr_array

        pairs = self.together.tocoo()
        row, column = pairs.coords
        sums = self.together.sum(axis=1, dtype=np.float64)
        information = np.log(pairs.data * sums.sum() / (sums[row] * sums[column]))
        positive = information > 0
        values = information[positive].astype(np.float32)
        return csr_array(coo_array((values, (row[positive], column[positive])), pairs.shape))

    def embed(self, seed: int) -> np.ndarray:
        """[items, p], float32, of norm 1, or 0 for an item without co-purchases: the left singular vectors of the PPMI
        matrix, times the square roots of the singular values (Levy, Goldberg and Dagan, 2015)."""
        from sklearn.utils.extmath import randomized_svd

        matrix = self.ppmi()
        with threadpool_limits(1):  # for the reasons in semantic_ids.py; it works only on libraries already loaded
            if matrix.shape[0] > DIMENSIONS:
                left, values, _ = randomized_svd(matrix, DIMENSIONS, n_iter=SVD_ITERATIONS, random_state=seed)
            else:
                left, values, _ = np.linalg.svd(matrix.toarray())
        embeddings = (left * np.sqrt(values)).astype(np.float32)
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        return np.divide(embeddings, lengths, out=np.zeros_like(embeddings), where=lengths > 1e-6)


def joined(texts: np.ndarray, purchases: np.ndarray, trust: np.ndarray, share: float) -> tuple[np.ndarray, Trust]:
    """Texts [items, d] and co-purchases [items, p] side by side, [items, d + p], and how much they count: texts fully,
    co-purchases by the `trust` [items] in them, or not at all if they say nothing.

    Co-purchases are scaled, so that of the variance `share` (below 1) is theirs. Texts stay as they are: an item that
    nobody bought has the distances of its text.
    """
    trust = trust * purchases.any(axis=1)
    of_texts, of_purchases = (float(part.var(axis=0).sum()) for part in (texts, purchases[trust > 0]))
    scale = 1.0  # where all texts or all co-purchases are alike
    if min(of_texts, of_purchases) > 1e-6:
        scale = math.sqrt(of_texts / of_purchases * share / (1 - share))
    joint = np.concatenate([texts, purchases * scale], axis=1).astype(np.float32)
    return joint, Trust(texts.shape[1], trust.astype(np.float32))
