"""Beam search and sampling over the SIDs of a trie.

Dimensions: `B` prompts, `K` beams, `P` prompt tokens, `V` vocabulary, `C` the most children that a trie node has at one
depth.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minionerec.data.sid_tokens import PAD
from minionerec.decoding.beams import CopiedBeams, TreeBeams
from minionerec.decoding.probe import probe
from minionerec.decoding.trie import Trie
from minionerec.decoding.wanted import Wanted
from minionerec.model import device, graphs


def _beams_and_padding(model: nn.Module, prompt: int, row: int, tree: bool | None) -> tuple[type, bool]:
    """The kind of beams to use with prompts of `prompt` tokens and rows of `row`, and whether prompts may be padded."""
    if tree is not None:
        return TreeBeams if tree else CopiedBeams, True
    support = probe(model, prompt, row)
    return support.beams, support.padding


def _single_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every prompt of a batch as a batch of one, without padding."""
    for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
        yield ids[mask].unsqueeze(0), attention_mask.new_ones((1, int(mask.sum())))


@torch.no_grad()  # in inference mode, weights that FSDP gathers could not be used in training afterwards
def constrained_beam_search(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    num_beams: int,
    length_penalty: float = 0.0,
    tree: bool | None = None,
    allowed: torch.Tensor | None = None,
    wanted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `num_beams` best SIDs of every prompt, best first.

    A beam's score is the sum of its tokens' log-probabilities under the whole vocabulary, end-of-sequence token
    included, divided by its length to the power of `length_penalty`. The prompt runs through the model once. Every
    beam is a distinct SID. The cost of a step depends on `widths`, the children of a node, not on the number of SIDs.

    With `allowed`, the result for a prompt is that of a trie of its allowed SIDs: a beam only enters a subtree with an
    allowed SID, so there are K beams wherever K SIDs are allowed.

    Args:
        model: a causal LM in evaluation mode.
        input_ids, attention_mask: [B, P], padded on the left.
        trie: on the model's device.
        tree: True for a tree mask, False for copies of the cache, None for the first way that `probe.probe` accepts.
        allowed: [B, S], the rows of `trie.sequences` that each prompt may get; None for all.
        wanted: [B, M], rows of `trie.sequences` that are scored too, whatever the beams find; PAD for none.

    Returns:
        rows [B, K] of `trie.sequences`, and scores [B, K]; K is `num_beams`, or the number of SIDs if that is smaller.
        Where fewer are allowed, the last rows are PAD and their scores -inf. With `wanted`, M columns more: those rows
        in their order, PAD where they are among the K or not allowed.
    """
    beams = min(num_beams, len(trie))
    prompts = len(input_ids)
    longest = input_ids.shape[1] + (beams + (0 if wanted is None else wanted.shape[1])) * trie.depth
    kind, padding = _beams_and_padding(model, input_ids.shape[1], longest, tree)
    if not padding and (prompts > 1 or not attention_mask.all()):
        found = [
            constrained_beam_search(
                *(model, *single, trie, num_beams, length_penalty),
                allowed=None if allowed is None else allowed[i : i + 1],
                wanted=None if wanted is None else wanted[i : i + 1],
            )
            for i, single in enumerate(_single_prompts(input_ids, attention_mask))
        ]
        return torch.cat([rows for rows, _ in found]), torch.cat([scores for _, scores in found])
    inputs = [input_ids, attention_mask] if allowed is None else [input_ids, attention_mask, allowed]
    search = partial(_search, model, kind, trie, beams, length_penalty, wanted)
    recorded = graphs.of(model) if kind is TreeBeams and tree is None and wanted is None else None
    if recorded is None:
        return search(*inputs)
    rows, scores = recorded(("search", trie, beams, length_penalty), search, *_in_few_sizes(*inputs))
    return rows[:prompts], scores[:prompts]


def _in_few_sizes(*inputs: torch.Tensor) -> list[torch.Tensor]:
    """Prompts, their masks and what else belongs to each, with padding on the left and rows of padding below: a search
    is recorded for every shape."""
    rows, width = inputs[0].shape
    below, left = graphs.size_above(rows) - rows, graphs.size_above(width, 16) - width
    return [F.pad(tensor, (left if i < 2 else 0, 0, 0, below)) for i, tensor in enumerate(inputs)]


def _search(
    model: nn.Module,
    kind: type,
    trie: Trie,
    beams: int,
    length_penalty: float,
    wanted: torch.Tensor | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`constrained_beam_search` of all prompts together, by one kind of beams. No value is read on the host."""
    prompts, where = len(input_ids), input_ids.device
    before = None if allowed is None else trie.count_before(allowed)
    others = None if wanted is None else Wanted(trie, wanted)
    state = kind(model, input_ids, attention_mask)
    logits = state.logits
    running = 1  # beams; what starts a wanted SID follows them, and never takes the place of one
    node = torch.zeros((prompts, 1), dtype=torch.long, device=where)
    score = torch.zeros((prompts, 1), device=where)
    finished_row = torch.full((prompts, beams), PAD, device=where)
    finished_score = torch.full((prompts, beams), -torch.inf, device=where)
    for depth, width in enumerate(trie.widths):
        logits = logits.float()
        child, exists = trie.children(node, width)  # [B, K, C]
        if before is not None:
            exists &= trie.may_go_on(child, before)
        score_of = logits.gather(2, trie.token_id[child]) - _logsumexp(logits) + score.unsqueeze(2)
        score_of = torch.where(exists, score_of, -torch.inf).flatten(1)
        child = child.flatten(1)

        # SIDs that end at this depth compete with those that ended before; the other beams continue.
        if trie.ends[depth]:
            row = trie.row[child]
            ended = torch.where(row == PAD, -torch.inf, score_of / (depth + 1) ** length_penalty)
            if others is not None:
                others.collect(row, ended)
            of_beams = slice(running * width)
            finished_score, best = torch.cat([finished_score, ended[:, of_beams]], dim=1).topk(beams, dim=1)
            finished_row = torch.cat([finished_row, row[:, of_beams]], dim=1).gather(1, best)
            if depth + 1 == trie.depth:
                break
            score_of = torch.where(row == PAD, score_of, -torch.inf)
        score, best = score_of[:, : running * width].topk(min(beams, running * width), dim=1)
        running = best.shape[1]
        if others is not None:
            places, scores = others.left_out(child, score_of, best)
            best, score = torch.cat([best, places], dim=1), torch.cat([score, scores], dim=1)
        node = child.gather(1, best)
        logits = state.step(best // width, trie.token_id[node], depth)
    if others is not None:
        finished_row, finished_score = others.behind(finished_row, finished_score)
    if allowed is not None or wanted is not None:  # what fills the places of missing beams
        finished_row = finished_row.masked_fill(finished_score == -torch.inf, PAD)
    return finished_row, finished_score


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """[B, K, 1] of logits [B, K, V]."""
    if device.starts_kernels(logits.device):
        return logits.logsumexp(dim=2, keepdim=True)
    # A few rows at a time stay in a CPU's cache, which takes a third of the time.
    return torch.cat([rows.logsumexp(dim=1) for rows in logits.flatten(0, 1).split(16)]).view(*logits.shape[:2], 1)


@torch.no_grad()
def constrained_sample(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    count: int,
    temperature: float = 1.0,
    tree: bool | None = None,
    draws: torch.Tensor | None = None,
) -> torch.Tensor:
    """`count` SIDs per prompt, sampled with replacement from the model's distribution over the trie.

    Every token is sampled from the softmax of logits / `temperature` over the tokens that continue a SID: the first one
    up to which the probabilities add up to more than a number between 0 and 1.

    Args:
        input_ids, attention_mask: [B, P], padded on the left.
        tree: as in `constrained_beam_search`.
        draws: [B, count, D], the number for every token, at least 0 and below 1; None for random ones.

    Returns:
        [B, count], rows of `trie.sequences` in the order they were sampled.
    """
    if draws is None:
        draws = torch.rand(len(input_ids), count, trie.depth)
    draws = draws.to(input_ids.device, torch.float64)
    kind, padding = _beams_and_padding(model, input_ids.shape[1], input_ids.shape[1] + count * trie.depth, tree)
    if not padding and (len(input_ids) > 1 or not attention_mask.all()):
        singles = zip(_single_prompts(input_ids, attention_mask), draws.split(1), strict=True)
        return torch.cat([constrained_sample(model, *one, trie, count, temperature, draws=d) for one, d in singles])
    state = kind(model, input_ids, attention_mask)
    logits = state.logits
    node = torch.zeros((len(input_ids), count), dtype=torch.long, device=input_ids.device)
    itself = torch.arange(count, device=node.device).expand_as(node)
    for depth, width in enumerate(trie.widths):
        child, exists = trie.children(node, width)  # [B, count, C]
        scores = logits.float().expand(-1, count, -1).gather(2, trie.token_id[child]) / temperature
        ended = trie.row[node] != PAD  # a leaf has no children, so the beam stays there
        scores = scores.masked_fill(~exists, -torch.inf).masked_fill(ended.unsqueeze(2), 0.0)
        up_to = scores.softmax(dim=2, dtype=torch.float64).cumsum(dim=2)
        sampled = (up_to <= draws[:, :, depth, None] * up_to[:, :, -1:]).sum(dim=2, keepdim=True)
        node = torch.where(ended, node, child.gather(2, sampled).squeeze(2))
        if depth + 1 < trie.depth:
            parent = itself if depth else torch.zeros_like(itself)
            logits = state.step(parent, trie.token_id[node], depth)
    return trie.row[node]
