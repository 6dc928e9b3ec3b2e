"""Ranks the items that requests allow.

Dimensions: `N` items of the catalogue, `S` distinct SIDs.
"""

from collections.abc import Sequence
from itertools import compress
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

MOST_CACHED = 256  # masks of a combination of `Request.only` and `without` that may come again


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
        row_of = {sid: row for row, sid in enumerate(items.sids)}
        self.sid_row = np.fromiter((row_of[item.sid] for item in items.all), np.int64, len(items))  # [N]
        self._only: dict[tuple[frozenset[int], ...], np.ndarray] = {}

    def recommend(self, requests: Sequence[Request], bar: tqdm | None = None) -> list[list[dict[str, object]]]:
        """For every request its K items, best first, each with id, title, SID and score (the log-probability of its
        SID, in nats); fewer where fewer are allowed. `bar` shows the progress. Raises RunError if a score is NaN."""
        prompts = self.encoder.encode_prompts(
            self.task,
            [self._row(request) for request in requests],
            [self.encoder.cutoff_len - self.trie.depth] * len(requests),
        )
        allowed = [self._allowed_items(request) for request in requests]
        ranked = score_prompts(
            self.model,
            self.trie,
            prompts,
            self.pad_token_id,
            self.num_beams,
            self.batch_size,
            allowed=[None if items is None else self._sids_of(items) for items in allowed],
            bar=bar,
        )
        return [self._expand(*one) for one in zip(requests, ranked, allowed, strict=True)]

    def _row(self, request: Request) -> Interaction:
        """The request as a row of an interactions file without a target. A model cannot read more items than tokens."""
        items = [self.items.all[numbers[0]] for numbers in request.history[-self.encoder.cutoff_len :]]
        return Interaction([item.sid for item in items], [item.title for item in items], "", "")

    def _allowed_items(self, request: Request) -> np.ndarray | None:
        """[N], the items that may be recommended; None for all."""
        if not request.only and not request.without:
            return None
        mask = self._all_of(request.only).copy()
        mask[list(request.without)] = False
        return mask

    def _all_of(self, only: tuple[frozenset[int], ...]) -> np.ndarray:
        """[N], the items that are in each of these sets."""
        if only not in self._only:
            if len(self._only) >= MOST_CACHED:
                self._only.clear()
            mask: np.ndarray = np.ones(len(self.items), dtype=bool)
            for numbers in only:
                inside = np.zeros_like(mask)
                inside[list(numbers)] = True
                mask &= inside
            self._only[only] = mask
        return self._only[only]

    def _sids_of(self, items: np.ndarray) -> np.ndarray:
        """[S], the SIDs of which at least one item [N] is allowed."""
        sids: np.ndarray = np.zeros(len(self.items.sids), dtype=bool)
        sids[self.sid_row[items]] = True
        return sids

    def _expand(
        self, request: Request, ranking: list[tuple[int, float]], allowed: np.ndarray | None
    ) -> list[dict[str, object]]:
        """The items of ranked SIDs; those that share one come in the order of `Items.of_sid`."""
        found: list[dict[str, object]] = []
        for row, score in ranking:
            numbers = self.items.of_sid[self.items.sids[row]]
            for number in numbers if allowed is None else compress(numbers, allowed[numbers]):
                item = self.items.all[number]
                found.append({"id": item.id, "title": item.title, "sid": item.sid, "score": round(score, 6)})
            if len(found) >= request.K:
                break
        return found[: request.K]
