"""Completions and their prompts as rows of a batch: one row each, or all completions of a prompt in one.

The G completions of one prompt share a row `[prompt | c1 | ... | cG]`: a 4-D mask lets every completion see only the
prompt and itself, and its positions restart after the prompt. That is P + G * (C - 1) tokens where a row for each
completion takes G * (P + C). Values and gradients are those of the plain rows, in models whose layers keep to the mask.

Dimensions: `B` completions, `n` prompts, `G` completions of the prompt that has most, `P` prompt tokens, `C` completion
tokens, `L` tokens of a shared row.
"""

import torch


def attention_masks(model, visible: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """4-D masks in the form the model takes: boolean, or added to the scores where attention is eager; by layer type
    where some layers have a window, which then counts positions, not places in the row.

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
    masks = {}
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


def plain_rows(_model, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """One row a completion: the model's inputs, the wanted positions [B, P + C], and where each token is predicted.

    The padding stands at the end, where no token sees it: it needs no mask, which recurrent layers may not know.
    """
    prompt, completion = prompt_ids.shape[1], completion_ids.shape[1]
    length = prompt_mask.sum(dim=1, keepdim=True)  # [B, 1]
    column = torch.arange(prompt + completion, device=prompt_ids.device)
    from_left = (column + prompt - length).clamp(max=prompt + completion - 1)  # without the padding of the prompt
    answer = torch.arange(completion, device=prompt_ids.device)
    wanted = torch.zeros_like(from_left, dtype=torch.bool).scatter(1, length - 1 + answer, completion_mask)
    wanted.scatter_(1, length - 1, True)
    place = torch.arange(len(length), device=length.device).unsqueeze(1) * len(column) + length - 1 + answer
    return {"input_ids": torch.cat([prompt_ids, completion_ids], dim=1).gather(1, from_left)}, wanted, place


def shared_rows(model, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """One row a prompt: the model's inputs, the wanted positions [n, L], and where each token is predicted.

    The last token of a completion predicts nothing, so C - 1 of each go in.
    """
    device = prompt_ids.device
    width, depth = prompt_ids.shape[1], completion_ids.shape[1] - 1
    new = torch.ones(len(prompt_ids), dtype=torch.bool, device=device)
    new[1:] = ((prompt_ids[1:] != prompt_ids[:-1]) | (prompt_mask[1:] != prompt_mask[:-1])).any(dim=1)
    first = new.nonzero().squeeze(1)  # [n]
    group = new.cumsum(0) - 1  # [B]
    slot = torch.arange(len(group), device=device) - first[group]  # [B], which completion of its prompt
    prompts, slots = len(first), int(slot.max()) + 1

    prompt_mask = prompt_mask[first]
    tokens = prompt_ids.new_zeros((prompts, slots, depth))
    present = torch.zeros((prompts, slots, depth), dtype=torch.bool, device=device)
    tokens[group, slot] = completion_ids[:, :-1]
    present[group, slot] = completion_mask[:, :-1]
    tokens, present = tokens.flatten(1), present.flatten(1)  # [n, G * (C - 1)]

    packed = torch.arange(slots * depth, device=device)
    of_slot, step = packed // max(depth, 1), packed % max(depth, 1)
    own = (of_slot.unsqueeze(1) == of_slot) & (step.unsqueeze(1) >= step)
    length = width + slots * depth
    visible = torch.zeros((prompts, length, length), dtype=torch.bool, device=device)
    visible[:, :, :width] = prompt_mask.unsqueeze(1)
    visible[:, :width, :width] &= torch.ones((width, width), dtype=torch.bool, device=device).tril()
    visible[:, width:, width:] = own & present.unsqueeze(1)
    visible |= torch.eye(length, dtype=torch.bool, device=device)  # padding sees itself: no row of scores is empty

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
