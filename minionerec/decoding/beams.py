"""How the beams of a prompt go on from it: under a tree mask, with copies of its cache, or without a cache.

All three are made from left-padded prompts and have `logits` [B, 1, V], those after the prompts, and
`step(parent, token, depth)`, which writes `token` [B, K] after the beams `parent` [B, K] and returns [B, K, V].
`minionerec.probe` finds out which of them a model can be trusted with.

Dimensions: `B` prompts, `K` beams, `P` prompt tokens, `T` tokens written by all beams so far, `V` vocabulary.
"""

import torch
from transformers import Cache, DynamicCache

from minionerec.model.head import float32_head
from minionerec.model.packed_rows import attention_masks


def select_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Makes a cache hold the given rows of its batch, in place; a row may be wanted more than once."""
    # Layers select by `reorder_cache`; a cache that holds more than layers (MiniMax) has a selection of its own.
    if type(cache).batch_select_indices is not Cache.batch_select_indices:
        cache.batch_select_indices(rows)
    else:
        cache.reorder_cache(rows)


class TreeBeams:
    """The beams of a prompt as one row of the batch: they share the prompt's cache and write theirs behind it.

    Each step appends one token a beam; a 4-D mask lets a beam see only the prompt and its own ancestors. Nothing is
    copied when beams are reordered: only the mask is.
    """

    def __init__(self, model, input_ids: torch.Tensor, mask: torch.Tensor):
        # The cache of a layer with a window would drop its first tokens, however near they are by position.
        self.model, self.cache = model, DynamicCache()
        self.prompt = mask.bool()  # [B, P]
        self.positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # [B, P + T]
        self.length = mask.sum(dim=1, keepdim=True)
        self.ancestors = mask.new_zeros((len(mask), 1, 0), dtype=torch.bool)  # [B, K, T]
        with float32_head(model):
            self.logits = model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1:]  # some ignore what to keep

    def step(self, parent: torch.Tensor, token: torch.Tensor, depth: int) -> torch.Tensor:
        rows, beams = token.shape
        inherited = self.ancestors.gather(1, parent.unsqueeze(-1).expand(-1, -1, self.ancestors.shape[2]))
        itself = torch.eye(beams, dtype=torch.bool, device=token.device).expand(rows, -1, -1)
        self.ancestors = torch.cat([inherited, itself], dim=2)
        position = (self.length + depth).expand(-1, beams)
        self.positions = torch.cat([self.positions, position], dim=1)
        visible = torch.cat([self.prompt.unsqueeze(1).expand(-1, beams, -1), self.ancestors], dim=2)
        with float32_head(self.model):
            return self.model(
                input_ids=token,
                attention_mask=attention_masks(self.model, visible, self.positions),
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
            ).logits


class CopiedBeams:
    """Every beam as its own row of the batch, with its own copy of the prompt's cache."""

    def __init__(self, model, input_ids: torch.Tensor, mask: torch.Tensor):
        self.model, self.mask = model, mask
        self.length = mask.sum(dim=1, keepdim=True)
        self.beams = 1
        with float32_head(model):
            output = model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
            )
        self.logits, self.cache = output.logits[:, -1:], output.past_key_values

    def step(self, parent: torch.Tensor, token: torch.Tensor, depth: int) -> torch.Tensor:
        rows, beams = token.shape
        first = torch.arange(rows, device=token.device).unsqueeze(1) * self.beams
        select_rows(self.cache, (first + parent).flatten())
        self.beams = beams
        mask = self.mask.repeat_interleave(beams, dim=0)
        mask = torch.cat([mask, mask.new_ones((len(mask), depth + 1))], dim=1)
        with float32_head(self.model):
            output = self.model(
                input_ids=token.reshape(-1, 1),
                attention_mask=mask,
                position_ids=(self.length + depth).repeat_interleave(beams, dim=0),
                past_key_values=self.cache,
                use_cache=True,
            )
        return output.logits.view(rows, beams, -1)


class RereadBeams:
    """Every step reads the prompt and the tokens of every beam again, for models without a cache that can be trusted.
    Prompts must not be padded."""

    def __init__(self, model, input_ids: torch.Tensor, _mask: torch.Tensor):
        self.model, self.prompt = model, input_ids
        self.written = input_ids.new_zeros((len(input_ids), 1, 0))  # [B, K, depth]
        self.logits = self._read(input_ids.unsqueeze(1))

    def step(self, parent: torch.Tensor, token: torch.Tensor, depth: int) -> torch.Tensor:
        inherited = self.written.gather(1, parent.unsqueeze(-1).expand(-1, -1, depth))
        self.written = torch.cat([inherited, token.unsqueeze(-1)], dim=2)
        return self._read(torch.cat([self.prompt.unsqueeze(1).expand(-1, token.shape[1], -1), self.written], dim=2))

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        with float32_head(self.model):
            output = self.model(input_ids=rows.flatten(0, 1), use_cache=False, logits_to_keep=1)
        return output.logits[:, -1].view(*rows.shape[:2], -1)
