"""Log-probabilities of many completions of few prompts, each prompt computed once.

The G completions of one prompt go through the model as a single row `[prompt | c1 | ... | cG]`: a 4-D mask lets every
completion see the prompt and itself alone, and its positions restart behind the prompt. That is P + G * (C - 1) tokens
where a row for each completion takes G * (P + C). Values and gradients are those of the plain way.

Dimensions: `B` completions, `n` prompts, `G` completions of the prompt that has most, `P` prompt tokens, `C` completion
tokens, `L` tokens of a packed row, `N` positions whose next token is wanted, `V` vocabulary.
"""

import torch

from minionerec.sid import attention_bias, takes_tree_mask
from minionerec.trainer import head_on


def completion_logps(
    model,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    temperature: float = 1.0,
    unwrapped=None,
    shared: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [B, C] of completion tokens (nats, differentiable) and entropies [B, C] of the distributions
    they were drawn from (nats, no gradient). Both are 0 where `completion_mask` is.

    Args:
        model: a causal LM, wrapped for distributed training or not.
        prompt_ids, prompt_mask: [B, P], padded on the left; neighbours with the same prompt share its computation.
        completion_ids, completion_mask: [B, C], padded on the right.
        temperature: the logits are divided by it.
        unwrapped: the model inside the wrappers, where there are any.
        shared: share prompts, or give every completion a row of its own; None shares where the attention can.
    """
    inner = unwrapped if unwrapped is not None else model
    width = int(prompt_mask.sum(dim=1).max())
    prompt_ids, prompt_mask = prompt_ids[:, -width:], prompt_mask[:, -width:].bool()
    completion_mask = completion_mask.bool()
    if shared is None:
        shared = takes_tree_mask(inner, width + len(completion_ids) * completion_ids.shape[1])
    pack = _shared_rows if shared else _plain_rows
    inputs, wanted, place = pack(inner, prompt_ids, prompt_mask, completion_ids, completion_mask)
    with head_on(inner, wanted):
        logits = model(**inputs, use_cache=False).logits.float() / temperature  # [N, V]
    row = (wanted.flatten().cumsum(0) - 1)[place].clamp(min=0)  # [B, C], the row of `logits` that predicts each token
    return token_logps(logits, row, completion_ids, completion_mask)


def token_logps(
    logits: torch.Tensor, row: torch.Tensor, completion_ids: torch.Tensor, completion_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `completion_logps` returns, of logits [N, V] whose row `row` [B, C] predicts each completion token."""
    total = logits.logsumexp(dim=1)
    logps = torch.where(completion_mask, logits[row, completion_ids] - total[row], 0.0)
    with torch.no_grad():
        entropy = total - ((logits - total.unsqueeze(1)).exp() * logits).sum(dim=1)
    return logps, torch.where(completion_mask, entropy[row], 0.0)


def _plain_rows(_model, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """One row a completion: the model's inputs, the wanted positions [B, P + C], and where each token is predicted."""
    rows, width = prompt_ids.shape
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
    wanted = torch.zeros_like(attention_mask)
    wanted[:, width - 1 : -1] = completion_mask
    wanted[:, width - 1] = True
    offset = torch.arange(rows, device=wanted.device).unsqueeze(1) * wanted.shape[1]
    place = offset + width - 1 + torch.arange(completion_ids.shape[1], device=wanted.device)
    inputs = {
        "input_ids": torch.cat([prompt_ids, completion_ids], dim=1),
        "attention_mask": attention_mask.long(),
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    return inputs, wanted, place


def _shared_rows(model, prompt_ids, prompt_mask, completion_ids, completion_mask):
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
        "attention_mask": attention_bias(model, visible.unsqueeze(1)),
        "position_ids": torch.cat([(prompt_mask.cumsum(dim=1) - 1).clamp(min=0), end + step], dim=1),
    }
    return inputs, wanted, place
