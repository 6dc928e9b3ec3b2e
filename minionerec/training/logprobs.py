"""Log-probabilities of the completions of prompts, each prompt computed once if the model allows it.

Dimensions: `B` completions, `P` prompt tokens, `C` completion tokens, `N` positions whose logits are computed, `V`
vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minionerec.decoding.probe import probe
from minionerec.model import graphs
from minionerec.model.head import float32_head, head_on
from minionerec.model.packed_rows import Packed, plain_rows, shared_rows
from minionerec.model.token_trees import attends_in_blocks, tree_rows
from minionerec.training.rollouts import Completed


def completion_logps(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    temperature: float = 1.0,
    unwrapped: nn.Module | None = None,
    shared: bool | None = None,
    width: int | None = None,
    groups: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [B, C] of completion tokens (nats, differentiable) and entropies [B, C] of the distributions
    they come from (nats, no gradient). Both are 0 where `completion_mask` is 0.

    Args:
        model: a causal LM, wrapped for distributed training or not.
        prompt_ids, prompt_mask: [B, P], padded on the left; consecutive equal prompts are computed once.
        completion_ids, completion_mask: [B, C], padded on the right.
        temperature: the logits are divided by it.
        unwrapped: the model inside the wrappers, if there are any.
        shared: True for one row per prompt, False for one row per completion, None for one row per prompt if
            `probe.probe` accepts it, or one token tree of all if `attend_in_blocks` did.
        width: tokens of the longest prompt.
        groups: how many consecutive completions have equal prompts, prompt by prompt. Without these two, the host reads
            them from the tensors and waits for a GPU.
    """
    if not len(completion_ids):  # which models do not take
        return torch.zeros(2, *completion_ids.shape, device=completion_ids.device).unbind()
    inner = unwrapped if unwrapped is not None else model
    width = int(prompt_mask.sum(dim=1).max()) if width is None else width
    prompt_ids, prompt_mask = prompt_ids[:, -width:], prompt_mask[:, -width:].bool()
    completion_mask = completion_mask.bool()
    recorded = graphs.of(inner)
    in_tree = shared is None and attends_in_blocks(inner) and not recorded
    if shared is None:
        shared = probe(inner, width, width + len(completion_ids) * completion_ids.shape[1]).shared
    pack: Callable[..., Packed] = plain_rows if not shared else tree_rows if in_tree else shared_rows

    def logps_of(
        groups: Sequence[int] | None,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, wanted, row = pack(inner, prompt_ids, prompt_mask, completion_ids, completion_mask, groups)
        with head_on(inner, wanted), float32_head(inner):
            logits = model(**inputs, use_cache=False).logits.float() / temperature  # [N, V]
        return token_logps(logits, row, completion_ids, completion_mask)

    rows = prompt_ids, prompt_mask, completion_ids, completion_mask
    if recorded and recorded.possible() and shared and groups and len(set(groups)) == 1:
        return _recorded(recorded, logps_of, temperature, groups, *rows)
    return logps_of(groups, *rows)


def _recorded(
    recorded: graphs.Graphs,
    logps_of: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    temperature: float,
    groups: Sequence[int],
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for prompts with equally many completions, as a pass of few shapes: with more padding on the left of
    prompts, so that rows have one of few lengths, and with completions of padding, in which nothing counts."""
    (count, depth), size = completion_ids.shape, groups[0]
    length, prompts = prompt_ids.shape[1] + size * (depth - 1), graphs.size_above(len(groups))
    left, below = graphs.size_above(length, 16) - length, prompts * size - count
    rows = [F.pad(tensor, (left, 0, 0, below)) for tensor in (prompt_ids, prompt_mask)]
    rows += [F.pad(tensor, (0, 0, 0, below)) for tensor in (completion_ids, completion_mask)]
    logps, entropies = recorded(("completions", temperature, size), partial(logps_of, [size] * prompts), *rows)
    return logps[:count], entropies[:count]


def logps_in_passes(
    compute: Callable[[Completed], tuple[torch.Tensor, torch.Tensor]], completed: Completed, size: int, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies [B, C] of completions, as of `completion_logps`. Completions that do not count
    cost nothing, and have 0.

    Args:
        compute: those of the completions of one pass.
        size: completions of a pass at most.
        least: completions of a pass in which none counts, for which other processes wait; 0 to leave it out.
    """
    mask = completed.completion_mask
    logps = torch.zeros(mask.shape, device=mask.device)
    entropies = torch.zeros_like(logps)
    for start in range(0, len(mask), size):
        of_pass = np.arange(start, min(start + size, len(mask)))
        kept = of_pass[completed.known.learns[of_pass]]
        if not len(kept):
            kept = of_pass[:least]
        if len(kept) == len(mask):
            logps, entropies = compute(completed)
        elif len(kept):
            place = torch.from_numpy(kept).to(mask.device, non_blocking=True)
            values, entropy = compute(completed.pick(kept, place))
            logps, entropies = logps.index_copy(0, place, values), entropies.index_copy(0, place, entropy)
    if torch.is_grad_enabled() and not logps.requires_grad:  # no pass was made
        logps.requires_grad_()
    return logps, entropies


def token_logps(
    logits: torch.Tensor, row: torch.Tensor, completion_ids: torch.Tensor, completion_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `completion_logps` returns, from logits [N, V] of which row `row` [B, C] predicts each completion token."""
    total = logits.logsumexp(dim=1)
    logps = torch.where(completion_mask, logits[row, completion_ids] - total[row], 0.0)
    with torch.no_grad():
        entropy = total - ((logits - total.unsqueeze(1)).exp() * logits).sum(dim=1)
    return logps, torch.where(completion_mask, entropy[row], 0.0)
