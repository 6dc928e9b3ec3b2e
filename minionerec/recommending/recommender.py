"""Ranks the items that requests allow.

Dimensions: `N` items of the catalogue, `S` distinct SIDs, the rows of the trie.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from tqdm import tqdm

from minionerec.data.encoding import Encoder
from minionerec.data.files import Interaction
from minionerec.data.items import Items
from minionerec.data.prompts import Task
from minionerec.decoding.ranking import score_prompts
from minionerec.decoding.trie import Trie
from minionerec.recommending.requests import Request

if TYPE_CHECKING:  # slow to import, and needed for annotations only
    from transformers import PreTrainedTokenizerFast

MOST_CACHED = 64  # masks of sets that may come again: those of flags and columns


class Recommender:
    """A model with the catalogue that it recommends from."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerFast",
        encoder: Encoder,
        task: Task,
        trie: Trie,
        items: Items,
        num_beams: int,
        batch_size: int,
    ):
        """
        Args:
            model: in evaluation mode.
            trie: of `items.sids`, in their order, on the model's device.
            num_beams: SIDs that are ranked for a request.
            batch_size: requests of a forward pass.
        """
        self.model, self.encoder, self.task, self.trie, self.items = model, encoder, task, trie, items
        self.pad_token_id, self.num_beams, self.batch_size = tokenizer.pad_token_id, num_beams, batch_size
        row_of = {items.sids[index]: row for row, index in enumerate(trie.source.tolist())}
        self.row = np.fromiter((row_of[item.sid] for item in items.all), np.int64, len(items))  # [N], of the trie
        self._only: dict[tuple[frozenset[int], ...], np.ndarray] = {}

    def recommend(
        self, requests: Sequence[Request], bar: tqdm | None = None, chunk: int | None = None
    ) -> list[list[dict[str, object]]]:
        """For every request its K items, best first, each with id, title, SID and score (the log-probability of its
        SID, in nats); fewer where fewer are allowed. `bar` and `chunk` are those of
        `score_prompts`. Raises RunError if a score is NaN."""
        prompts = self.encoder.encode_prompts(
            self.task,
            [self._row(request) for request in requests],
            [self.encoder.cutoff_len - self.trie.depth] * len(requests),
        )
        ranked = score_prompts(
            self.model,
            self.trie,
            prompts,
            self.pad_token_id,
            self.num_beams,
            self.batch_size,
            allowed=lambda i: self._allowed_rows(requests[i]),
            bar=bar,
            chunk=chunk,
        )
        return [self._expand(*one) for one in zip(requests, ranked, strict=True)]

    def _row(self, request: Request) -> Interaction:
        """The request as a row of an interactions file without a target. A model cannot read more items than tokens."""
        items = [self.items.all[numbers[0]] for numbers in request.history[-self.encoder.cutoff_len :]]
        return Interaction([item.sid for item in items], [item.title for item in items], "", "")

    def _allowed_rows(self, request: Request) -> np.ndarray | None:
        """[S], the rows of the trie of which at least one item may be recommended; None for all."""
        if not request.only and not request.without:
            return None
        rows = self._rows_of(request.only).copy()
        for number in request.without:
            shared = self.items.of_sid[self.items.all[number].sid]
            rows[self.row[number]] = any(_is_allowed(request, other) for other in shared)
        return rows

    def _rows_of(self, only: tuple[frozenset[int], ...]) -> np.ndarray:
        """[S], the rows of the trie of which at least one item is in each of these sets."""
        if only not in self._only:
            if len(self._only) >= MOST_CACHED:
                self._only.clear()
            rows: np.ndarray = np.full(len(self.trie), not only)
            if only:
                rows[self.row[list(frozenset.intersection(*only))]] = True
            self._only[only] = rows
        return self._only[only]

    def _expand(self, request: Request, ranking: list[tuple[int, float]]) -> list[dict[str, object]]:
        """The items of ranked SIDs; those that share one come in the order of `Items.of_sid`."""
        found: list[dict[str, object]] = []
        for index, score in ranking:
            for number in self.items.of_sid[self.items.sids[index]]:
                if _is_allowed(request, number):
                    item = self.items.all[number]
                    found.append({"id": item.id, "title": item.title, "sid": item.sid, "score": round(score, 6)})
            if len(found) >= request.K:
                break
        return found[: request.K]


def _is_allowed(request: Request, number: int) -> bool:
    return number not in request.without and all(number in numbers for numbers in request.only)
