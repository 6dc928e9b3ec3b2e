"""Ranks the catalogue for many prompts, which are divided among the processes of a distributed run.

Dimensions: `B` prompts, `K` beams, `M` SIDs of a second recommender, `S` SIDs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from minionerec.data.encoding import left_padded
from minionerec.data.sid_tokens import PAD
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.probe import probe
from minionerec.decoding.trie import Trie
from minionerec.errors import RunError
from minionerec.model.device import weights_are_sharded
from minionerec.model.halving import Halving


@dataclass(frozen=True)
class Second:
    """A second recommender. Its best SIDs are ranked with the beams, all of them by both: the score of a SID is that of
    the model, and `weight` times its log-probability here.

    Attributes:
        logps: called with the numbers of prompts, gives [B, S], log-probabilities of `trie.sequences` (nats).
        most: how many of its best SIDs are ranked, M.
    """

    logps: Callable[[Sequence[int]], torch.Tensor]
    weight: float
    most: int

    def best(self, logps: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """[B, M], the rows of its best SIDs, PAD where fewer are `allowed` [B, S]."""
        if allowed is not None:
            logps = torch.where(allowed, logps, -torch.inf)
        scores, rows = logps.topk(min(self.most, logps.shape[1]), dim=1)
        return rows.masked_fill(scores == -torch.inf, PAD)

    def blended(
        self, rows: torch.Tensor, scores: torch.Tensor, logps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [B, K + M] and their scores under both, best first; PAD last."""
        added = logps.gather(1, rows.clamp(min=0))
        both = torch.where(rows == PAD, -torch.inf, scores + self.weight * added)
        both, order = both.sort(dim=1, descending=True, stable=True)
        return rows.gather(1, order), both


@dataclass(frozen=True)
class Seen:
    """SIDs that a prompt's user had before, which a model tends to find too likely.

    Attributes:
        rows: called with the number of a prompt, gives their rows of `trie.sequences`.
        penalty: subtracted from their scores (nats).
    """

    rows: Callable[[int], np.ndarray]
    penalty: float

    def lowered(
        self, batch: Sequence[int], found: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [B, K] that were found for the prompts of a batch, and their scores, best first; on the CPU."""
        found, scores = found.cpu(), scores.cpu()
        seen = np.stack([np.isin(of_prompt, self.rows(i)) for i, of_prompt in zip(batch, found.numpy(), strict=True)])
        scores, order = (scores - self.penalty * torch.from_numpy(seen)).sort(dim=1, descending=True, stable=True)
        return found.gather(1, order), scores


def score_prompts(
    model: nn.Module,
    trie: Trie,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    num_beams: int,
    batch_size: int,
    length_penalty: float = 0.0,
    allowed: Callable[[int], np.ndarray | None] | None = None,
    bar: tqdm | None = None,
    chunk: int | None = None,
    halving: Halving | None = None,
    second: Second | None = None,
    seen: Seen | None = None,
) -> list[list[tuple[int, float]]]:
    """The best SIDs of every prompt, best first, as indices into the list the trie was built from, each with its score:
    the sum of its tokens' log-probabilities, in nats, divided by their number to the power of `length_penalty`. All
    processes return the same. With `second`, rankings and scores are blended, and a ranking also has those of its best
    SIDs that no beam found: up to `num_beams` + M. With `seen`, its penalty is subtracted from what was found.

    Args:
        prompts: token ids, one list per prompt.
        num_beams: SIDs in a ranking, or all that are allowed if there are fewer.
        batch_size: prompts of a forward pass.
        allowed: called with the number of a prompt, gives the rows of `trie.sequences` that it may get, [S] of bool, or
            None for all.
        bar: a progress bar to move on by the number of prompts; None for a new one.
        chunk: batches are formed within chunks of so many prompts, a multiple of `batch_size`; None for one chunk. A
            score depends on its batch in the last digits, so the same chunks give the same bytes, whoever ranks them.
        halving: splits batches that do not fit in memory; None for a new one.

    Raises RunError, in all processes, if a score is NaN.
    """
    state = PartialState()
    longest = max(map(len, prompts), default=0)
    searched = min(num_beams, len(trie)) + (min(second.most, len(trie)) if second else 0)
    if not probe(model, longest, longest + searched * trie.depth).padding:
        batch_size = 1  # so that all processes run the same number of forward passes
    # Prompts of similar length are in one batch. The longest come first, so a run that does not fit into memory fails
    # at its start. Batches go to the processes in turn, so each process gets short and long ones.
    order = sorted(range(len(prompts)), key=lambda i: (i // (chunk or len(prompts)), -len(prompts[i])))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    # If the weights are sharded, all processes must take part in every forward pass: those with one batch fewer repeat
    # the last one.
    turns = math.ceil(len(batches) / state.num_processes)
    rankings: list[tuple[int, list[tuple[int, float]]]] = []
    finite = True
    halving = halving or Halving("batches of prompts")

    def search(batch: Sequence[int]) -> list[tuple[int, list[int], list[float]]]:
        input_ids, attention_mask = left_padded([prompts[i] for i in batch], pad_token_id)
        mask = masks_of(list(map(allowed, batch)), trie) if allowed is not None else None
        ids, attention = input_ids.to(model.device), attention_mask.to(model.device)
        logps = wanted = None
        if second:
            logps = second.logps(batch)
            wanted = second.best(logps, mask)
        beams, scores = constrained_beam_search(
            model, ids, attention, trie, num_beams, length_penalty, allowed=mask, wanted=wanted
        )
        if second and logps is not None:
            beams, scores = second.blended(beams, scores, logps)
        if seen:
            beams, scores = seen.lowered(batch, beams, scores)
        return list(zip(batch, beams.tolist(), scores.tolist(), strict=True))

    own = tqdm(total=sum(map(len, mine)), unit="row", leave=False, disable=bar is not None or not state.is_main_process)
    with own:
        for batch in [*mine, *batches[-1:]][:turns]:
            # Where weights are sharded, all processes take part in every pass, and none may split a batch.
            parts = [search(batch)] if weights_are_sharded() else halving(search, batch)
            found = [one for part in parts for one in part]
            finite = finite and not any(math.isnan(score) for _, _, of_rows in found for score in of_rows)
            rankings += [
                (i, [(int(trie.source[row]), score) for row, score in zip(rows, of_rows, strict=True) if row != PAD])
                for i, rows, of_rows in found
            ]
            own.update(len(batch))
            if bar is not None:
                bar.update(len(batch) * state.num_processes)
    # All processes raise together: if only one did, the others would wait for it forever.
    if not all(gather_object([finite])):
        raise RunError(
            f"the model's predictions are NaN or infinite in {model.dtype}; items cannot be ranked", everywhere=True
        )
    ranking_of = dict(gather_object(rankings))
    return [ranking_of[i] for i in range(len(prompts))]


def masks_of(allowed: Sequence[np.ndarray | None], trie: Trie) -> torch.Tensor | None:
    """[B, S], the rows of `trie.sequences` that are allowed for each prompt of a batch; None if all are for all."""
    if all(mask is None for mask in allowed):
        return None
    masks: np.ndarray = np.ones((len(allowed), len(trie)), dtype=bool)
    for row, mask in zip(masks, allowed, strict=True):
        if mask is not None:
            row[:] = mask
    return torch.from_numpy(masks).to(trie.sequences.device)
