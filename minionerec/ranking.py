"""A trained checkpoint and the catalogue that it ranks: what evaluation, recommendations and merging share.

    from minionerec import Ranker

    ranker = Ranker.load("out/lora/final_checkpoint", info_file="info.txt")
    ranker.recommend(["12", "40", "7"], k=5)

Dimensions: `N` items of the catalogue, `S` distinct SIDs, the rows of the trie.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from minionerec.checkpoint import NAME_BASE, Checkpoint
from minionerec.data.encoding import Encoder
from minionerec.data.files import Catalogue, Interaction, read_info_items
from minionerec.data.items import Items
from minionerec.data.prompts import RECOMMENDATION, Prompts
from minionerec.data.sid_tokens import PAD, sid_responses
from minionerec.decoding.ranking import rank_prompts, score_prompts
from minionerec.decoding.trie import Trie
from minionerec.model import device, graphs, loading
from minionerec.model.adapted import load_checkpoint
from minionerec.serving.requests import Request, RequestReader

MOST_CACHED = 64  # masks of sets that may come again: those of flags and columns


class Ranker:
    """A checkpoint, its tokenizer and wording, and the trie of the SIDs that it ranks.

    Attributes:
        tokenizer, encoder, task: how rows become prompts.
        sids: the SIDs that are ranked.
        trie: of `sids`, in their order.
        items: the items of the catalogue; None where only SIDs are ranked.
        model: in evaluation mode; given to, or loaded by `load_model`.
        num_beams: SIDs that are ranked for a row.
        batch_size: rows of a forward pass.
    """

    model: Any

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: Prompts,
        sids: Sequence[str],
        where: str,
        remedy: str,
        *,
        items: Items | None = None,
        catalogue: Catalogue | None = None,
        also: Sequence[str] = (),
        num_beams: int = 50,
        batch_size: int = 8,
        compile: bool = True,
    ):
        """Checks that every SID becomes its own tokens, before a weight is loaded.

        Args:
            prompts: the wording; its task RECOMMENDATION is asked.
            where, remedy: for messages, the flag that named the tokenizer, and what to do.
            catalogue: the tokens of the SIDs, where the index is at hand.
            also: SIDs that occur in histories and are not ranked.
            compile: whether a GPU may record searches as CUDA graphs.

        Raises InputError for a SID that becomes other tokens.
        """
        self.checkpoint, self.task, self.sids, self.items = checkpoint, prompts.tasks[RECOMMENDATION], sids, items
        self.num_beams, self.batch_size, self._compile = num_beams, batch_size, compile
        self.tokenizer = loading.load_tokenizer(checkpoint.path)
        self.encoder = Encoder(self.tokenizer, prompts, checkpoint.cutoff_len)
        responses = sid_responses(self.encoder, [*sids, *also], self.task.ending, catalogue, where, remedy)[: len(sids)]
        self.trie = Trie(responses[:, : (responses != PAD).sum(axis=1).max()], self.tokenizer.eos_token_id)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        info_file: str | os.PathLike[str],
        *,
        base_model: str = "",
        category: str = "",
        num_beams: int = 50,
        batch_size: int = 8,
    ) -> "Ranker":
        """A checkpoint with its weights, ready to recommend.

        Args:
            checkpoint: the folder of a whole model or of an adapter.
            info_file: the catalogue, one SID, title and item id a line, separated by tabs.
            base_model: where the base of an adapter is, if not where the adapter says.
            category: what the items are, for a checkpoint that does not record its prompts.

        Raises InputError for files that cannot be used or do not belong together.
        """
        read = Checkpoint.read(os.fspath(checkpoint))
        base = base_model or read.base(NAME_BASE)
        prompts = read.prompts(category, None, RECOMMENDATION)
        items = Items(read_info_items(os.fspath(info_file)), os.fspath(info_file))
        remedy = f"{os.fspath(info_file)} belongs to a different catalogue"
        device.process_state()
        ranker = cls(
            *(read, prompts, items.sids, read.path, remedy), items=items, num_beams=num_beams, batch_size=batch_size
        )
        return ranker.load_model(base, fast=True)

    def load_model(self, base: str, fast: bool = False) -> "Ranker":
        """Loads the weights, their base stored as in training. `fast` and errors as in `load_checkpoint`."""
        return self.use(load_checkpoint(self.checkpoint, self.tokenizer, base, fast))

    def use(self, model: Any) -> "Ranker":
        """Ranks with a model that is loaded already."""
        self.model = model.eval()
        graphs.record(self.model, self._compile)
        self.trie.to(model.device)
        return self

    # --- SIDs ---------------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Interaction]) -> list[list[int]]:
        """The prompts of rows, token ids, with room for the longest SID."""
        return self.encoder.encode_prompts(self.task, rows, [self.encoder.cutoff_len - self.trie.depth] * len(rows))

    def rank(self, prompts: Sequence[list[int]], length_penalty: float = 0.0) -> list[list[str]]:
        """The `num_beams` best SIDs of every prompt of `encode`, best first. Raises RunError if a score is NaN."""
        sizes = self.num_beams, self.batch_size, length_penalty
        ranked = rank_prompts(self.model, self.trie, prompts, self.tokenizer.pad_token_id, *sizes)
        return [[self.sids[index] for index in ranking] for ranking in ranked]

    # --- Items --------------------------------------------------------------------------------------------------------

    def recommend(self, history: Sequence[str], k: int = 10, exclude_seen: bool = False) -> list[dict[str, object]]:
        """The k best items for a history, best first, each with id, title, SID and score (nats).

        Args:
            history: item ids, SIDs or titles, oldest first.
            exclude_seen: leave out the items of the history.

        Raises InputError for an item that the catalogue does not have, and for a k above `num_beams`.
        """
        reader = RequestReader(self._items, None, k, self.num_beams)
        return self.answer([reader.read({"history": list(history), "K": k, "exclude_seen": exclude_seen})])[0]

    def answer(
        self, requests: Sequence[Request], bar: tqdm | None = None, chunk: int | None = None
    ) -> list[list[dict[str, object]]]:
        """For every request its K items, best first, each with id, title, SID and score (the log-probability of its
        SID, in nats); fewer where fewer are allowed. `bar` and `chunk` are those of `score_prompts`. Raises RunError if
        a score is NaN."""
        ranked = score_prompts(
            self.model,
            self.trie,
            self.encode([self._row_of(request) for request in requests]),
            self.tokenizer.pad_token_id,
            self.num_beams,
            self.batch_size,
            allowed=lambda i: self._allowed_rows(requests[i]),
            bar=bar if bar is not None else tqdm(disable=True),
            chunk=chunk,
        )
        return [self._expand(*one) for one in zip(requests, ranked, strict=True)]

    @property
    def _items(self) -> Items:
        assert self.items is not None  # else only SIDs are ranked
        return self.items

    def _row_of(self, request: Request) -> Interaction:
        """The request as a row of an interactions file without a target. A model cannot read more items than tokens."""
        items = [self._items.all[numbers[0]] for numbers in request.history[-self.encoder.cutoff_len :]]
        return Interaction([item.sid for item in items], [item.title for item in items], "", "")

    @cached_property
    def _trie_row(self) -> np.ndarray:
        """[N], the row of the trie that stands for each item."""
        row_of = {self._items.sids[index]: row for row, index in enumerate(self.trie.source.tolist())}
        return np.fromiter((row_of[item.sid] for item in self._items.all), np.int64, len(self._items))

    def _allowed_rows(self, request: Request) -> np.ndarray | None:
        """[S], the rows of the trie of which at least one item may be recommended; None for all."""
        if not request.only and not request.without:
            return None
        rows = self._rows_of(request.only).copy()
        for number in request.without:
            shared = self._items.of_sid[self._items.all[number].sid]
            rows[self._trie_row[number]] = any(_is_allowed(request, other) for other in shared)
        return rows

    @cached_property
    def _only(self) -> dict[tuple[frozenset[int], ...], np.ndarray]:
        return {}

    def _rows_of(self, only: tuple[frozenset[int], ...]) -> np.ndarray:
        """[S], the rows of the trie of which at least one item is in each of these sets."""
        if only not in self._only:
            if len(self._only) >= MOST_CACHED:
                self._only.clear()
            rows: np.ndarray = np.full(len(self.trie), not only)
            if only:
                rows[self._trie_row[list(frozenset.intersection(*only))]] = True
            self._only[only] = rows
        return self._only[only]

    def _expand(self, request: Request, ranking: list[tuple[int, float]]) -> list[dict[str, object]]:
        """The items of ranked SIDs; those that share one come in the order of `Items.of_sid`."""
        found: list[dict[str, object]] = []
        for index, score in ranking:
            for number in self._items.of_sid[self._items.sids[index]]:
                if _is_allowed(request, number):
                    item = self._items.all[number]
                    found.append({"id": item.id, "title": item.title, "sid": item.sid, "score": round(score, 6)})
            if len(found) >= request.K:
                break
        return found[: request.K]


def _is_allowed(request: Request, number: int) -> bool:
    return number not in request.without and all(number in numbers for numbers in request.only)
