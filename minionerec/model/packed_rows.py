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

import torch
from torch import nn

# The inputs of the model, the positions whose logits are wanted, and for every completion token [B, C] the position, in
# the flattened rows, that predicts it.
Packed = tuple[dict[str, torch.Tensor | dict[str, torch.Tensor]], torch.Tensor, torch.Tensor]


def attention_masks(
    model: nn.Module, visible: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """4-D masks in the form that the model takes: boolean, or added to the scores for eager attention. If some layers
    have a window, there is one mask per layer type, and the window counts positions, not places in the row.

    Args:
        visible: [B, Q, L] (bool), the keys that each of the last Q tokens may see.
        positions: [B, L], of the keys.
    """
    config = model.config.get_text_config()
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
        if config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        masks[kind] = mask.unsqueeze(1)
    return masks if len(masks) > 1 else masks.popitem()[1]


def plain_rows(
    _model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> Packed:
    """One row per completion: the model's inputs, the wanted positions [B, P + C], and where each token is predicted.

    Args:
        prompt_ids, prompt_mask: [B, P], padded on the left.
        completion_ids, completion_mask: [B, C], padded on the right.

    All padding is moved to the end, where no token sees it. So no mask is needed, which recurrent layers may not take.
    """
    prompt, completion = prompt_ids.shape[1], completion_ids.shape[1]
    length = prompt_mask.sum(dim=1, keepdim=True)  # [B, 1]
    column = torch.arange(prompt + completion, device=prompt_ids.device)
    source = (column + prompt - length).clamp(max=prompt + completion - 1)  # shifts out the padding of the prompt
    step = torch.arange(completion, device=prompt_ids.device)
    wanted = torch.zeros_like(source, dtype=torch.bool).scatter(1, length - 1 + step, completion_mask)
    wanted.scatter_(1, length - 1, True)
    place = torch.arange(len(length), device=length.device).unsqueeze(1) * len(column) + length - 1 + step
    return {"input_ids": torch.cat([prompt_ids, completion_ids], dim=1).gather(1, source)}, wanted, place


def shared_rows(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> Packed:
    """One row per prompt, as drawn above: the model's inputs, the wanted positions [n, L], and where each token is
    predicted. Takes what `plain_rows` takes; consecutive completions with equal prompts share a row."""
    device = prompt_ids.device
    width, depth = prompt_ids.shape[1], completion_ids.shape[1] - 1

    # Which prompt each completion belongs to, and which of its completions it is.
    new = torch.ones(len(prompt_ids), dtype=torch.bool, device=device)
    new[1:] = ((prompt_ids[1:] != prompt_ids[:-1]) | (prompt_mask[1:] != prompt_mask[:-1])).any(dim=1)
    first = new.nonzero().squeeze(1)  # [n]
    group = new.cumsum(0) - 1  # [B]
    slot = torch.arange(len(group), device=device) - first[group]  # [B]
    prompts, slots = len(first), int(slot.max()) + 1 if len(slot) else 0

    # The tokens after the prompt: all completions of a prompt, without their last tokens.
    prompt_mask = prompt_mask[first]
    tokens = prompt_ids.new_zeros((prompts, slots, depth))
    present = torch.zeros((prompts, slots, depth), dtype=torch.bool, device=device)
    tokens[group, slot] = completion_ids[:, :-1]
    present[group, slot] = completion_mask[:, :-1]
    tokens, present = tokens.flatten(1), present.flatten(1)  # [n, G * (C - 1)]

    # The mask: the prompt is causal, a completion sees the prompt and its own tokens so far.
    packed = torch.arange(slots * depth, device=device)
    of_slot, step = packed // max(depth, 1), packed % max(depth, 1)
    own = (of_slot.unsqueeze(1) == of_slot) & (step.unsqueeze(1) >= step)
    length = width + slots * depth
    visible = torch.zeros((prompts, length, length), dtype=torch.bool, device=device)
    visible[:, :, :width] = prompt_mask.unsqueeze(1)
    visible[:, :width, :width] &= torch.ones((width, width), dtype=torch.bool, device=device).tril()
    visible[:, width:, width:] = own & present.unsqueeze(1)
    visible |= torch.eye(length, dtype=torch.bool, device=device)  # padding sees itself, or softmax would give NaN

    # Positions restart after the prompt, and each token is predicted by the one before it in its completion.
    end = prompt_mask.sum(dim=1, keepdim=True)
    positions = torch.cat([(prompt_mask.cumsum(dim=1) - 1).clamp(min=0), end + step], dim=1)
    wanted = torch.zeros((prompts, length), dtype=torch.bool, device=device)
    wanted[:, width - 1] = True
    predicts = torch.zeros((prompts, slots, depth), dtype=torch.bool, device=device)
    predicts[group, slot] = completion_mask[:, 1:]
    wanted[:, width:] = predicts.flatten(1)
    place = torch.empty_like(completion_ids)
    place[:, 0] = group * length + width - 1
    place[:, 1:] = (group * length + width + slot * depth).unsqueeze(1) + torch.arange(depth, device=device)
    inputs = {
        "input_ids": torch.cat([prompt_ids[first], tokens], dim=1),
        "attention_mask": attention_masks(model, visible, positions),
        "position_ids": positions,
    }
    return inputs, wanted, place
