"""A trained checkpoint and the catalogue that it ranks: what evaluation, recommendations and merging share.

    from minionerec import Ranker

    ranker = Ranker.load("out/lora/final_checkpoint", info_file="info.txt")
    ranker.recommend(["12", "40", "7"], k=5)

Dimensions: `N` items of the catalogue, `S` distinct SIDs, the rows of the trie.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from minionerec import sasrec
from minionerec.blending import BEST, Blend, Pair, Scoring, is_penalty, is_weight, metrics_of_pairs
from minionerec.checkpoint import NAME_BASE, Checkpoint
from minionerec.data.encoding import Encoder
from minionerec.data.files import (
    Catalogue,
    Interaction,
    notes_on_titles,
    read_info_items,
    read_json_object,
    with_original_ids,
)
from minionerec.data.items import ExcludeSeen, Items, seen_sids
from minionerec.data.prompts import RECOMMENDATION, Prompts
from minionerec.data.sid_tokens import PAD, sid_responses
from minionerec.decoding.ranking import Second, Seen, score_prompts
from minionerec.decoding.search_memory import ON_A_CPU, largest_batch
from minionerec.decoding.trie import Trie
from minionerec.errors import Problems
from minionerec.flags import HEAVIEST, ScoreFlags
from minionerec.model import device, graphs, loading
from minionerec.model.adapted import load_checkpoint
from minionerec.model.halving import Halving
from minionerec.serving.requests import Request, RequestReader

MOST_CACHED = 64  # masks of sets that may come again: those of flags and columns
MOST_NUMBERS = 5_000_000  # items of all these sets together, some 300 MB


class Ranker:
    """A checkpoint, its tokenizer and wording, and the trie of the SIDs that it ranks.

    Attributes:
        tokenizer, encoder, task: how rows become prompts.
        sids: the SIDs that are ranked.
        trie: of `sids`, in their order.
        items: the items of the catalogue; None where only SIDs are ranked.
        model: in evaluation mode; given to `use`, or loaded by `load_model`.
        num_beams: SIDs that are ranked for a row.
        batch_size: rows per forward pass. For auto it is set when there is a model: as many as the memory of the GPU is
            predicted to hold, or 8 on a CPU.
        blend: a SASRec model that ranks with the model; None for none.
        seen_penalty: subtracted from the scores of SIDs in the history (nats).
    """

    model: PreTrainedModel | PeftModel
    _sasrec: sasrec.Recommender

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
        batch_size: int | Literal["auto"] = 8,
        blend: Blend | None = None,
        seen_penalty: float = 0.0,
        compile: bool = True,
    ):
        """Checks that every SID becomes its own tokens, before a weight is loaded.

        Args:
            prompts: the wording; its task RECOMMENDATION is asked.
            where, remedy: for messages: the flag that named the tokenizer, and what to do.
            catalogue: the tokens of the SIDs, if the index is known.
            also: SIDs that occur in histories and are not ranked.
            compile: whether a GPU may record searches as CUDA graphs.

        Raises InputError for a SID that becomes other tokens, and for a SASRec model that cannot be loaded.
        """
        self.checkpoint, self.task, self.sids, self.items = checkpoint, prompts.tasks[RECOMMENDATION], sids, items
        self.num_beams, self.halving = num_beams, Halving("batches of prompts")
        self._sizes_batches = batch_size == "auto"
        self.batch_size = ON_A_CPU if batch_size == "auto" else batch_size
        self.blend, self.seen_penalty = blend, seen_penalty
        if blend:
            self._sasrec = sasrec.load(blend.folder, "blend")
        self._compile = compile
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
        item_meta_path: str | os.PathLike[str] = "",
        original_ids: bool = False,
        base_model: str = "",
        category: str = "",
        prompt_file: str | os.PathLike[str] = "",
        num_beams: int = 50,
        batch_size: int | Literal["auto"] = 8,
        blend: str | os.PathLike[str] = "",
        blend_weight: float | Literal["auto"] = "auto",
        seen_penalty: float | Literal["auto"] = 0.0,
    ) -> "Ranker":
        """A checkpoint with its weights, ready to recommend.

        Args:
            checkpoint: the folder of a whole model or of an adapter.
            info_file: the catalogue: a line per item with SID, title and item id, separated by tabs.
            item_meta_path: the item file that prepare_data.py wrote, with the original ids of the items.
            original_ids: histories use original ids only. Otherwise they may use both kinds, unless an original id is
                also the id of another item.
            base_model: where the base of an adapter is, if it is not where the adapter says.
            category: what the items are, for a checkpoint that does not record its prompts.
            prompt_file: JSON with the wording that such a checkpoint was trained with. Without it the built-in wording
                is used, with a warning.
            num_beams: SIDs that are ranked for a history, the largest k.
            batch_size: histories per forward pass; auto for as many as the memory of the GPU is predicted to hold.
            blend: the folder of a SASRec model that ranks with the checkpoint.
            blend_weight: what its log-probabilities are multiplied by; auto for the weight that evaluate.py chose and
                recorded.
            seen_penalty: subtracted from the scores of items in the history (nats); auto for the penalty that
                evaluate.py chose and recorded, for the checkpoint with `blend` or alone.

        Raises InputError for values of another type or range, and for files that cannot be used or do not belong
        together.
        """
        problems = Problems()
        if not _is_count(num_beams):
            problems.add(f"num_beams {num_beams!r}: must be a whole number above 0")
        if batch_size != "auto" and not _is_count(batch_size):
            problems.add(f"batch_size {batch_size!r}: must be auto or a whole number above 0")
        if blend_weight != "auto" and not is_weight(blend_weight):
            problems.add(f"blend_weight {blend_weight!r}: must be auto or a number from 0 to {HEAVIEST}")
        if seen_penalty != "auto" and not is_penalty(seen_penalty):
            problems.add(f"seen_penalty {seen_penalty!r}: must be auto or a number from 0")
        problems.check()
        read = Checkpoint.read(os.fspath(checkpoint))
        base = base_model or read.base(NAME_BASE)
        prompts = read.prompts(category, os.fspath(prompt_file), RECOMMENDATION)
        listed, meta = read_info_items(os.fspath(info_file)), os.fspath(item_meta_path)
        notes = read.notes_on_catalogue(((item.id, item.sid) for item in listed), os.fspath(info_file))
        metadata = read_json_object(meta, "item_meta_path") if meta else {}
        notes += notes_on_titles(listed, metadata, meta)
        notes += read.notes_on_wording(prompts, category, os.fspath(prompt_file))
        flags = ScoreFlags(blend=os.fspath(blend), blend_weight=blend_weight, seen_penalty=seen_penalty)
        scoring = Scoring.read(flags, read, listed, os.fspath(info_file)).ready()
        for note in notes + scoring.notes(num_beams):
            warnings.warn(note.removeprefix("warning: "), stacklevel=2)
        listed = with_original_ids(listed, metadata)
        items = Items(listed, os.fspath(info_file), only_original_ids=original_ids)
        remedy = f"{os.fspath(info_file)} belongs to a different catalogue"
        device.process_state()
        ranker = cls(
            *(read, prompts, items.sids, read.path, remedy),
            items=items,
            num_beams=num_beams,
            batch_size=batch_size,
            blend=scoring.blend,
            seen_penalty=scoring.seen_penalty or 0.0,
        )
        return ranker.load_model(base, fast=True)

    def load_model(self, base: str, fast: bool = False) -> "Ranker":
        """Loads the weights, with the base stored as in training. `fast` and errors as in `load_checkpoint`."""
        return self.use(load_checkpoint(self.checkpoint, self.tokenizer, base, fast))

    def use(self, model: PreTrainedModel | PeftModel) -> "Ranker":
        """Ranks with a model that is loaded already."""
        self.model = model.eval()
        graphs.record(self.model, self._compile)
        self.trie.to(model.device)
        if self._sizes_batches and model.device.type == "cuda":
            search = self.encoder.cutoff_len, min(self.num_beams, len(self.trie)), self.trie.depth
            rows = largest_batch(model.config, *search, device.free_memory_gb())
            self.batch_size = min(gather_object([rows]))  # all processes form the same batches
        if self.blend:
            self._sasrec.to(model.device)
        return self

    @property
    def length(self) -> int:
        """How many SIDs a ranking has."""
        return min(self.num_beams, len(self.trie))

    # --- SIDs ---------------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Interaction]) -> list[list[int]]:
        """The prompts of rows, token ids, with room for the longest SID."""
        return self.encoder.encode_prompts(self.task, rows, [self.encoder.cutoff_len - self.trie.depth] * len(rows))

    def rank(
        self,
        prompts: Sequence[list[int]],
        length_penalty: float = 0.0,
        rows: Sequence[Interaction] = (),
        exclude_seen: ExcludeSeen = False,
    ) -> list[list[str]]:
        """The `num_beams` best SIDs of every prompt of `encode`, best first. What `exclude_seen` leaves out of the
        history comes last, where the catalogue has too few others. `blend`, `seen_penalty` and `exclude_seen` need the
        `rows` that the prompts were made from. Raises RunError if a score is NaN."""
        allowed = self._unseen(rows, exclude_seen) if exclude_seen else None
        more = {"second": self._blended(rows), "seen": self._seen(rows)}
        ranked = self._score(prompts, length_penalty=length_penalty, allowed=allowed, **more)
        rankings = [[self.sids[index] for index, _ in ranking[: self.num_beams]] for ranking in ranked]
        for ranking, row in zip(rankings, rows, strict=True) if exclude_seen else ():
            others = (sid for sid in dict.fromkeys(row.sid_history) if sid in self._number and sid not in ranking)
            ranking += [*others][: self.length - len(ranking)]
        return rankings

    def weigh(
        self,
        rows: Sequence[Interaction],
        pairs: Sequence[Pair],
        length_penalty: float = 0.0,
        exclude_seen: ExcludeSeen = False,
    ) -> dict[Pair, float]:
        """For each pair of a weight of SASRec (0 without `blend`) and a penalty on what was seen, the NDCG of
        validation rows at the watched cutoff. Rows are ranked once: the SIDs that compete are the same with any pair.
        Raises RunError if a score is NaN."""
        alone = self._second(rows, weight=0.0) if self.blend else None
        allowed = self._unseen(rows, exclude_seen) if exclude_seen else None
        found = self._score(self.encode(rows), length_penalty=length_penalty, allowed=allowed, second=alone)
        others = [[0.0] * len(ranked) for ranked in found]
        if alone:
            for start in range(0, len(rows), self.batch_size):
                part = range(start, min(start + self.batch_size, len(rows)))
                table = alone.logps(part).cpu()
                for i in part:
                    others[i] = table[i - start, self._row_of_sid[[n for n, _ in found[i]]]].tolist()
        seen = [{self._number[sid] for sid in row.sid_history if sid in self._number} for row in rows]
        targets = [self._number.get(row.sid) for row in rows]
        return metrics_of_pairs(found, others, seen, targets, self.length, pairs)

    @property
    def _score(self) -> partial[list[list[tuple[int, float]]]]:
        """`score_prompts` by this model, of prompts and what else they come with."""
        return partial(
            score_prompts,
            self.model,
            self.trie,
            pad_token_id=self.tokenizer.pad_token_id,
            num_beams=self.num_beams,
            batch_size=self.batch_size,
            halving=self.halving,
        )

    def _blended(self, rows: Sequence[Interaction]) -> Second | None:
        """SASRec with the weight that it has; None where the model ranks alone."""
        return self._second(rows, self.blend.weight or 0.0) if self.blend else None

    def _seen(self, rows: Sequence[Interaction]) -> Seen | None:
        """The SIDs in the histories of rows by their numbers; None where they cost nothing."""
        return self._penalized(lambda number: seen_sids(rows[number], True))

    def _penalized(self, sids: Callable[[int], Iterable[str]]) -> Seen | None:
        """The `sids` that a user had, called with the number of a prompt; None where they cost nothing."""
        return Seen(lambda number: self._rows_of_sids(sids(number)), self.seen_penalty) if self.seen_penalty else None

    def _unseen(self, rows: Sequence[Interaction], exclude_seen: ExcludeSeen) -> Callable[[int], np.ndarray]:
        """For the number of a row the mask [S] of the trie that leaves SIDs of its history out."""

        def mask(number: int) -> np.ndarray:
            allowed: np.ndarray = np.ones(len(self.trie), dtype=bool)
            allowed[self._rows_of_sids(seen_sids(rows[number], exclude_seen))] = False
            return allowed

        return mask

    def _rows_of_sids(self, sids: Iterable[str]) -> np.ndarray:
        """The rows of the trie of those SIDs that are ranked."""
        return self._row_of_sid[[self._number[sid] for sid in sids if sid in self._number]]

    def _second(self, rows: Sequence[Interaction], weight: float) -> Second:
        """SASRec, asked for the histories of rows by their numbers."""
        return Second(
            lambda numbers: self._sasrec.logps([rows[i].sid_history for i in numbers])[:, self._column], weight, BEST
        )

    @cached_property
    def _column(self) -> torch.Tensor:
        """[S], for each row of the trie the number of its SID in SASRec."""
        numbers = [self._sasrec.number[self.sids[index]] - 1 for index in self.trie.source.tolist()]
        return torch.tensor(numbers, device=self.model.device)

    @cached_property
    def _number(self) -> dict[str, int]:
        """The number of each of `sids`."""
        return {sid: number for number, sid in enumerate(self.sids)}

    @cached_property
    def _row_of_sid(self) -> np.ndarray:
        """[S], the row of the trie of each of `sids`."""
        rows: np.ndarray = np.zeros(len(self.sids), np.int64)
        rows[self.trie.source] = np.arange(len(self.trie))
        return rows

    # --- Items --------------------------------------------------------------------------------------------------------

    def recommend(
        self, history: Sequence[str], k: int = 10, exclude_seen: ExcludeSeen = False
    ) -> list[dict[str, object]]:
        """The k best items for a history, best first, each with id, title, SID and score (nats), and its original id if
        that is known.

        Args:
            history: item ids, SIDs or titles, oldest first.
            exclude_seen: leave out the items of the history; "earlier": all but the last.

        Raises InputError for an item that the catalogue does not have, and for a k above `num_beams`.
        """
        reader = RequestReader(self._items, None, k, self.num_beams)
        items = history if isinstance(history, str) else list(history)  # a text is refused, not taken for its letters
        return self.answer([reader.read({"history": items, "K": k, "exclude_seen": exclude_seen})])[0]

    def answer(
        self, requests: Sequence[Request], bar: tqdm | None = None, chunk: int | None = None
    ) -> list[list[dict[str, object]]]:
        """For every request its K items, best first, each with id, original id if that is known, title, SID and score
        (the log-probability of its SID, in nats, with `blend` its weight times that under SASRec, less `seen_penalty`
        where the SID is in the history); fewer where fewer are allowed. `bar` and `chunk` are those of `score_prompts`.
        Raises RunError if a score is NaN."""
        rows = [self._row_of(request) for request in requests]
        ranked = self._score(
            self.encode(rows),
            allowed=lambda i: self._allowed_rows(requests[i]),
            bar=bar if bar is not None else tqdm(disable=True),
            chunk=chunk,
            second=self._blended(rows),
            # Of the whole history, as exclude_seen takes it; a row ends where the model can read no more.
            seen=self._penalized(lambda i: {self._items.all[numbers[0]].sid for numbers in requests[i].history}),
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
        row_of = dict(zip(self.sids, self._row_of_sid.tolist(), strict=True))
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
            held = sum(len(numbers) for sets in self._only for numbers in sets)
            if len(self._only) >= MOST_CACHED or held > MOST_NUMBERS:
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
                    ids = {"id": item.id, **({"original_id": item.original_id} if item.original_id else {})}
                    found.append({**ids, "title": item.title, "sid": item.sid, "score": round(score, 6)})
            if len(found) >= request.K:
                break
        return found[: request.K]


def _is_count(value: object) -> bool:
    """Whether a value is a whole number above 0, also one of NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _is_allowed(request: Request, number: int) -> bool:
    return number not in request.without and all(number in numbers for numbers in request.only)
