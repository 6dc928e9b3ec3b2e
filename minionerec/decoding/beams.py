"""Three ways to compute the beams of a prompt: under a tree mask, with a copied cache, or without a cache.

All three are built from left-padded prompts. `logits` [B, 1, V] predict the first token after each prompt, and
`step(parent, token, depth)` appends `token` [B, K] to the beams `parent` [B, K] and returns logits [B, K, V].
`minionerec.decoding.probe` finds out which of them gives the right scores for a model.

Dimensions: `B` prompts, `K` beams, `P` prompt tokens, `T` tokens written by all beams so far, `V` vocabulary.
"""

import torch
from torch import nn
from transformers import Cache, DynamicCache

from minionerec.model import device
from minionerec.model.device import weights_are_sharded
from minionerec.model.head import float32_head
from minionerec.model.packed_rows import attention_masks

SHARED = 4  # tokens that all prompts of a batch begin with, from which on they are computed once


def select_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Replaces the batch of a cache by the given rows of it, in place; a row may occur more than once."""
    # `reorder_cache` selects in every layer. A cache that holds more than its layers (MiniMax) overrides the other one.
    if type(cache).batch_select_indices is not Cache.batch_select_indices:
        cache.batch_select_indices(rows)
    else:
        cache.reorder_cache(rows)


class TreeBeams:
    """The beams of a prompt as one row of the batch: they share the prompt's cache and append their tokens to it.

    Each step appends one token per beam; a 4-D mask lets a beam see only the prompt and its own ancestors. Reordering
    beams copies no keys or values, it only changes the mask.
    """

    def __init__(self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor):
        # Without a config, the cache keeps every token. With one, a layer with a window would drop tokens by their
        # distance in the row, which is larger than the distance of their positions.
        self.model, self.cache = model, DynamicCache()
        self.length = mask.sum(dim=1, keepdim=True)
        self.ancestors = mask.new_zeros((len(mask), 1, 0), dtype=torch.bool)  # [B, K, T]
        self.itself = self.ancestors[0]  # [K, K], once there are K
        shared = _shared_beginning(input_ids, self.length)
        if shared:
            start = input_ids.shape[1] - int(self.length[0])
            self._read(input_ids[:1, start : start + shared])
            select_rows(self.cache, self.length.new_zeros(len(mask)))
            column = torch.arange(input_ids.shape[1] - shared, device=mask.device)
            after = column + shared * (column >= mask.shape[1] - self.length)  # [B, P - shared], the padding stays
            input_ids, mask = input_ids.gather(1, after), mask.gather(1, after)
        self.prompt = torch.cat([mask.new_ones((len(mask), shared)), mask], dim=1).bool()  # [B, P]
        self.positions = (self.prompt.cumsum(dim=1) - 1).clamp(min=0)  # [B, P + T]
        seen: torch.Tensor | dict[str, torch.Tensor] = mask
        if shared or device.starts_kernels(mask.device):  # transformers would wait to see whether `mask` is all 1
            place = torch.arange(self.prompt.shape[1], device=mask.device)
            causal, itself = place[shared:].unsqueeze(1) >= place, place[shared:].unsqueeze(1) == place
            seen = attention_masks(model, (self.prompt.unsqueeze(1) & causal) | itself, self.positions)
        self.logits = self._read(input_ids, attention_mask=seen, position_ids=self.positions[:, shared:])

    def _read(self, input_ids: torch.Tensor, **inputs: object) -> torch.Tensor:
        """Appends tokens to the cache; logits [B, 1, V] after the last one."""
        with float32_head(self.model):
            output = self.model(
                input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **inputs
            )
        return output.logits[:, -1:]  # some models ignore logits_to_keep

    def step(self, parent: torch.Tensor, token: torch.Tensor, depth: int) -> torch.Tensor:
        """Logits [B, K, V] after `token` [B, K], the token number `depth` (from 0) of the beams, written after the
        beams `parent` [B, K]."""
        prompts, beams = token.shape
        inherited = self.ancestors.gather(1, parent.unsqueeze(-1).expand(-1, -1, self.ancestors.shape[2]))
        if self.itself.shape[1] != beams:
            self.itself = torch.eye(beams, dtype=torch.bool, device=token.device)
        self.ancestors = torch.cat([inherited, self.itself.expand(prompts, -1, -1)], dim=2)
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


def _shared_beginning(input_ids: torch.Tensor, length: torch.Tensor) -> int:
    """How many tokens at the beginning of left-padded prompts [B, P] of `length` [B, 1] to compute once for all.

    On a GPU none: it computes a few tokens more in the time that it takes to launch the kernels of one more pass. None
    where weights are sharded, either: every process must run as many passes as the others.
    """
    if len(input_ids) == 1 or device.starts_kernels(input_ids.device) or weights_are_sharded():
        return 0
    # Every prompt keeps a token, whose logits are wanted.
    place = torch.arange(int(length.min()) - 1, device=length.device)
    beginning = input_ids.gather(1, input_ids.shape[1] - length + place)
    shared = int((beginning == beginning[:1]).all(dim=0).cumprod(dim=0).sum())
    return shared if shared >= SHARED else 0


class CopiedBeams:
    """Every beam as a row of the batch, with its own copy of the prompt's cache."""

    def __init__(self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor):
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
        """As `TreeBeams.step`."""
        prompts, beams = token.shape
        first = torch.arange(prompts, device=token.device).unsqueeze(1) * self.beams
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
        return output.logits.view(prompts, beams, -1)


class RereadBeams:
    """Every step runs the prompt and all tokens of every beam through the model again, for models whose cache does not
    give the right scores. Prompts must not be padded."""

    def __init__(self, model: nn.Module, input_ids: torch.Tensor, _mask: torch.Tensor):
        self.model, self.prompt = model, input_ids
        self.written = input_ids.new_zeros((len(input_ids), 1, 0))  # [B, K, depth]
        self.logits = self._last_logits(input_ids.unsqueeze(1))

    def step(self, parent: torch.Tensor, token: torch.Tensor, depth: int) -> torch.Tensor:
        """As `TreeBeams.step`."""
        inherited = self.written.gather(1, parent.unsqueeze(-1).expand(-1, -1, depth))
        self.written = torch.cat([inherited, token.unsqueeze(-1)], dim=2)
        prompts = self.prompt.unsqueeze(1).expand(-1, token.shape[1], -1)
        return self._last_logits(torch.cat([prompts, self.written], dim=2))

    def _last_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, K, V] after the last token of ids [B, K, tokens]."""
        with float32_head(self.model):
            output = self.model(input_ids=ids.flatten(0, 1), use_cache=False, logits_to_keep=1)
        return output.logits[:, -1].view(*ids.shape[:2], -1)
