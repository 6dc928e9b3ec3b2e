"""Packs completions and their prompts into rows: one row per completion, or all completions of a prompt in one row.

The G completions of a prompt share a row `[prompt | c1 | ... | cG]`: a 4-D mask lets every completion see only the
prompt and itself, and its positions restart after the prompt. That takes P + G * (C - 1) tokens instead of the
G * (P + C) of a row per completion. Values and gradients are those of the plain rows, in models whose layers follow the
mask.

G = 2 completions a0 a1 a2 and b0 b1 b2 (C = 3) of the prompt p0 p1 (P = 2): 6 tokens instead of 10. Each line is a
query, an x marks a key that it sees.

    sees      p0  p1  a0  a1  b0  b1    predicts
    p0         x   .   .   .   .   .
    p1         x   x   .   .   .   .    a0, b0
    a0         x   x   x   .   .   .    a1
    a1         x   x   x   x   .   .    a2
    b0         x   x   .   .   x   .    b1
    b1         x   x   .   .   x   x    b2
    position   0   1   2   3   2   3

The last token of a completion predicts nothing, so a2 and b2 are left out.

Dimensions: `B` completions, `n` prompts, `G` the most completions that a prompt has, `P` prompt tokens, `C` completion
tokens, `L` tokens of a shared row.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

# The inputs of the model, the positions [N] in the flattened rows whose logits are wanted, and for every completion
# token [B, C] which of them predicts it.
Packed = tuple[dict[str, torch.Tensor | dict[str, torch.Tensor]], torch.Tensor, torch.Tensor]


def attention_masks(
    model: nn.Module, visible: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """4-D masks to be added to the scores. (Attention would convert a boolean one in every layer, and keep each copy
    for the backward pass.) If some layers have a window, there is one mask per layer type, and the window counts
    positions, not places in the row.

    Args:
        visible: [B, Q, L] (bool), the keys that each of the last Q tokens may see.
        positions: [B, L], of the keys.
        dtype: what attention computes in; None for that of autocast, or the model's without it.
    """
    config, target = model.config.get_text_config(), visible.device
    # `model.dtype` of a quantized model is that of its adapter. A GPU's kernels take masks in the type of the queries.
    own = (getattr(model, "is_quantized", False) and model.config.dtype) or model.dtype
    if config._attn_implementation == "eager":
        dtype = own
    elif dtype is None:
        dtype = torch.get_autocast_dtype(target.type) if torch.is_autocast_enabled(target.type) else own
    # On the device: from the CPU, `where` would copy it, and the host wait.
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=target)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"sliding_attention" if window else "chunked_attention" if chunk else "full_attention"}
    query, key = positions[:, -visible.shape[1] :].unsqueeze(2), positions.unsqueeze(1)
    masks: dict[str, torch.Tensor] = {}
    for kind in kinds:
        mask = visible
        if kind == "sliding_attention" and window:
            mask = visible & (query - key < window)
        elif kind == "chunked_attention" and chunk:
            mask = visible & (query // chunk == key // chunk)
        masks[kind] = torch.where(mask, 0.0, hidden).unsqueeze(1)
    return masks if len(masks) > 1 else masks.popitem()[1]


def plain_rows(
    _model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    _groups: Sequence[int] | None = None,
) -> Packed:
    """One row per completion: the model's inputs, the wanted positions [B * C], and which predicts each token.

    Args:
        prompt_ids, prompt_mask: [B, P], padded on the left.
        completion_ids, completion_mask: [B, C], padded on the right.

    All padding is moved to the end, where no token sees it. So no mask is needed, which recurrent layers may not take.
    """
    prompt, (count, completion), device = prompt_ids.shape[1], completion_ids.shape, prompt_ids.device
    length = prompt_mask.sum(dim=1, keepdim=True)  # [B, 1]
    column = torch.arange(prompt + completion, device=device)
    source = (column + prompt - length).clamp(max=prompt + completion - 1)  # shifts out the padding of the prompt
    step = torch.arange(completion, device=device)
    first = torch.arange(count, device=device).unsqueeze(1) * len(column)
    inputs = {"input_ids": torch.cat([prompt_ids, completion_ids], dim=1).gather(1, source)}
    row = torch.arange(count * completion, device=device).view(count, completion)
    return inputs, (first + length - 1 + step).flatten(), row


def groups_of(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> list[int]:
    """How many consecutive completions have equal prompts, prompt by prompt. The host waits for the device."""
    if not len(prompt_ids):
        return []
    same = ((prompt_ids[1:] == prompt_ids[:-1]) & (prompt_mask[1:] == prompt_mask[:-1])).all(dim=1)
    starts = [0, *(i + 1 for i, equal in enumerate(same.tolist()) if not equal), len(prompt_ids)]
    return [end - start for start, end in pairwise(starts)]


def shared_rows(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    groups: Sequence[int] | None = None,
) -> Packed:
    """One row per prompt, as drawn above: the model's inputs, the wanted positions [n * (1 + G * (C - 1))], which are
    all from the last token of the prompt on, and which of them predicts each token. Takes what `plain_rows` takes;
    consecutive completions with equal prompts share a row.

    Args:
        groups: how many these are, prompt by prompt; None for what `groups_of` finds.
    """
    groups = groups_of(prompt_ids, prompt_mask) if groups is None else groups
    device = prompt_ids.device
    width, depth = prompt_ids.shape[1], completion_ids.shape[1] - 1
    prompts, slots = len(groups), max(groups, default=1)

    # The tokens after the prompt: all completions of a prompt, without their last tokens.
    if min(groups, default=1) == slots:
        shape = prompts, slots * depth
        prompt_ids, prompt_mask = prompt_ids[::slots], prompt_mask[::slots]
        tokens, present = completion_ids[:, :-1].reshape(shape), completion_mask[:, :-1].reshape(shape)
        slot = torch.arange(prompts * slots, device=device)  # of each completion, counted through the rows
    else:
        count = torch.tensor(groups, dtype=torch.int64)
        group = torch.arange(prompts).repeat_interleave(count)
        first = count.cumsum(0) - count
        slot = (group * slots + torch.arange(len(group)) - first[group]).to(device, non_blocking=True)
        first = first.to(device, non_blocking=True)
        prompt_ids, prompt_mask = prompt_ids[first], prompt_mask[first]
        tokens = prompt_ids.new_zeros((prompts * slots, depth)).index_copy(0, slot, completion_ids[:, :-1])
        present = prompt_mask.new_zeros((prompts * slots, depth)).index_copy(0, slot, completion_mask[:, :-1])
        tokens, present = tokens.view(prompts, -1), present.view(prompts, -1)  # [n, G * (C - 1)]

    # The mask: the prompt is causal, a completion sees the prompt and its own tokens so far.
    length = width + slots * depth
    column = torch.arange(length, device=device)
    of_slot = (column - width).div(max(depth, 1), rounding_mode="floor").clamp(min=-1)  # -1 in the prompt
    sees = (of_slot.unsqueeze(1) == of_slot) | (of_slot < 0)
    visible = sees.tril() & torch.cat([prompt_mask, present], dim=1).unsqueeze(1)
    visible = visible | (column.unsqueeze(1) == column)  # padding sees itself, or softmax would give NaN

    # Positions restart after the prompt, and each token is predicted by the one before it in its completion.
    end = prompt_mask.sum(dim=1, keepdim=True)
    step = (column[width:] - width) % max(depth, 1)
    positions = torch.cat([(prompt_mask.cumsum(dim=1) - 1).clamp(min=0), end + step], dim=1)
    wanted = torch.arange(prompts, device=device).unsqueeze(1) * length + column[width - 1 :]
    of_row = wanted.shape[1]
    row = slot.div(slots, rounding_mode="floor") * of_row
    after = (row + slot % slots * depth).unsqueeze(1) + 1 + torch.arange(depth, device=device)
    inputs = {
        "input_ids": torch.cat([prompt_ids, tokens], dim=1),
        "attention_mask": attention_masks(model, visible, positions),
        "position_ids": positions,
    }
    return inputs, wanted.flatten(), torch.cat([row.unsqueeze(1), after], dim=1)
