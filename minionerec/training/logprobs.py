"""Log-probabilities of the completions of prompts, each prompt computed once if the model allows it.

Dimensions: `B` completions, `P` prompt tokens, `C` completion tokens, `N` positions whose logits are computed, `V`
vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minionerec.decoding.probe import shares_rows
from minionerec.model import graphs
from minionerec.model.head import float32_head, head_on
from minionerec.model.packed_rows import groups_of, plain_rows, shared_rows


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
    they were drawn from (nats, no gradient). Both are 0 where `completion_mask` is 0.

    Args:
        model: a causal LM, wrapped for distributed training or not.
        prompt_ids, prompt_mask: [B, P], padded on the left; consecutive equal prompts are computed once.
        completion_ids, completion_mask: [B, C], padded on the right.
        temperature: the logits are divided by it.
        unwrapped: the model inside the wrappers, if there are any.
        shared: True for one row per prompt, False for one row per completion, None for one row per prompt if
            `probe.probe` accepts it.
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
    if shared is None:
        shared = shares_rows(inner, width, width + len(completion_ids) * completion_ids.shape[1])
    pack = shared_rows if shared else plain_rows

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
    recorded = graphs.of(inner)
    if recorded and shared and groups and len(set(groups)) == 1:
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


def with_targets(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    target_ids: torch.Tensor,
    target_mask: torch.Tensor,
    groups: Sequence[int] | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor, list[int]]:
    """Adds the target of each prompt as one more completion, after the others of that prompt.

    Args:
        prompt_ids to completion_mask, groups: as `completion_logps` takes them.
        target_ids, target_mask: [B, T], padded on the right; equal for the completions of a prompt.

    Returns (rows, place, share, groups): what `completion_logps` takes, with B + R rows for R prompts; in which of them
    the B completions and then the R targets are, [B + R]; the fraction of the completions that each prompt has, [R];
    how many rows each prompt has now.
    """
    device = prompt_ids.device
    if groups is None:
        key = torch.cat([prompt_ids, target_ids], dim=1)
        groups = groups_of(key, key)
    count = torch.tensor(groups, dtype=torch.int64)
    first = (count.cumsum(0) - count).to(device)
    prompt = torch.arange(len(groups)).repeat_interleave(count)
    place = torch.cat([torch.arange(len(prompt)) + prompt, (count + 1).cumsum(0) - 1]).to(device)
    order = place.argsort()

    def joined(completions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        width = max(completions.shape[1], targets.shape[1])
        parts = [nn.functional.pad(part, (0, width - part.shape[1])) for part in (completions, targets[first])]
        return torch.cat(parts)[order]

    rows = (
        torch.cat([prompt_ids, prompt_ids[first]])[order],
        torch.cat([prompt_mask, prompt_mask[first]])[order],
        joined(completion_ids, target_ids),
        joined(completion_mask, target_mask),
    )
    return rows, place, (count / len(prompt)).to(device), [size + 1 for size in groups]


def token_logps(
    logits: torch.Tensor, row: torch.Tensor, completion_ids: torch.Tensor, completion_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `completion_logps` returns, from logits [N, V] of which row `row` [B, C] predicts each completion token."""
    total = logits.logsumexp(dim=1)
    logps = torch.where(completion_mask, logits[row, completion_ids] - total[row], 0.0)
    with torch.no_grad():
        entropy = total - ((logits - total.unsqueeze(1)).exp() * logits).sum(dim=1)
    return logps, torch.where(completion_mask, entropy[row], 0.0)
