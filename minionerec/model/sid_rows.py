"""Trained rows of the embedding matrices for SID tokens, at the cost of these rows only: those of an adapter, and those
that have a parameter of their own in full fine-tuning.

Dimensions: `n` SID tokens, `V` vocabulary, `H` hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from minionerec.model.head import float32_linear
from minionerec.model.int8_rows import Int8Layer


class SidRows(TrainableTokensLayer):
    """PEFT's trainable token rows with a forward pass that touches only these rows.

    PEFT writes the trained rows into a copy of the whole [V, H] matrix in every forward pass, and the gradient is as
    large. Here the base matrix is used unchanged; then the embeddings of SID tokens are overwritten by the trained
    rows, and in an output head the logits of SID columns. Parameters, names and files stay PEFT's.
    """

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: Sequence[str], *args: object, **kwargs: object
    ) -> torch.Tensor:
        """The embeddings [..., H] of token ids x [...], or the logits [..., V] of hidden states x [..., H]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        self._check_overlapping_tokens(active_adapters)
        for adapter in active_adapters:
            # With adapters disabled, the rows of the base go through the same arithmetic. So an adapter that has not
            # changed yet gives exactly the logits of its base.
            rows = (self.trainable_tokens_original if self.disable_adapters else self.trainable_tokens_delta)[adapter]
            if isinstance(self.base_layer, nn.Embedding):
                row = self._row_of(adapter, x.device)[x]
                # Gemma scales its embeddings in the layer itself.
                result = _overwritten_embeddings(result, row, rows, self._get_embed_scale())
            else:
                result = _overwritten_logits(result, x, rows, self._ids(adapter, x.device), self.base_layer.bias)
        return result

    def update_layer(self, adapter_name: str, **kwargs: object) -> None:
        """As PEFT's: new rows, whose ids may be others than those of an earlier adapter of this name."""
        for cache in ("_ids_cache", "_row_of_cache"):
            self.__dict__.pop(cache, None)
        super().update_layer(adapter_name, **kwargs)

    def merge(self, *args: object, **kwargs: object) -> None:
        """As PEFT's. Raises RuntimeError for a matrix in 8 bits, which cannot hold the rows."""
        if isinstance(self.base_layer, Int8Layer):
            raise RuntimeError(
                "the SID rows cannot be merged into a quantized base; merge_lora.py dequantizes it first"
            )
        super().merge(*args, **kwargs)

    def get_merged_weights(self, active_adapters: Sequence[str]) -> torch.Tensor:
        """As PEFT's, which models ask for its type. The matrix of an 8-bit layer is not materialized for that."""
        if isinstance(self.base_layer, Int8Layer):
            return self.base_layer.weight
        return super().get_merged_weights(active_adapters)

    def _ids(self, adapter: str, device: torch.device) -> torch.Tensor:
        """The token ids of the rows, [n], cached on the device."""
        cache = self.__dict__.setdefault("_ids_cache", {})
        if (adapter, device) not in cache:
            cache[adapter, device] = torch.tensor(self.token_indices[adapter], device=device)
        return cache[adapter, device]

    def _row_of(self, adapter: str, device: torch.device) -> torch.Tensor:
        """[V], for every token id its row, or -1."""
        cache = self.__dict__.setdefault("_row_of_cache", {})
        if (adapter, device) not in cache:
            ids = self._ids(adapter, device)
            row_of = torch.full((self.base_layer.num_embeddings,), -1, device=device)
            row_of[ids] = torch.arange(len(ids), device=device)
            cache[adapter, device] = row_of
        return cache[adapter, device]


def _overwritten_embeddings(
    result: torch.Tensor, row: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | float | None
) -> torch.Tensor:
    """Embeddings [..., H] in which each token with a row in `rows` [n, H] has that one; `row` [...] is its number, or
    -1."""
    trained = F.embedding(row.clamp(min=0), rows)
    if isinstance(scale, torch.Tensor):
        scale = scale.to(trained.dtype)
    if scale is not None:
        trained = trained * scale
    return torch.where((row >= 0).unsqueeze(-1), trained.to(result.dtype), result)


def _overwritten_logits(
    result: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Logits [..., V] of hidden states [..., H] in which the columns `ids` [n] are those of `rows` [n, H]."""
    bias = None if bias is None else bias[ids]
    if result.dtype == torch.float32:  # even with 16-bit hidden states, inside `head.float32_head`
        columns = float32_linear(hidden, rows.float(), bias)
    else:
        columns = F.linear(hidden, rows.to(hidden.dtype), bias)
    # Without a copy of all logits where no backward pass may have saved them.
    write = result.index_copy if result.requires_grad else result.index_copy_
    return write(-1, ids, columns.to(result.dtype))


# --- Full fine-tuning -------------------------------------------------------------------------------------------------

OWN_ROWS = "sid_rows"


def give_own_rows(model: nn.Module, ids: Sequence[int]) -> None:
    """Makes the rows `ids`, sorted, of the embedding matrix and of an untied output head parameters [n, H] of their
    own, in place. An optimizer, and an engine that shards, can then treat them apart. The rows of the matrices
    themselves are not used any more, until `merge_own_rows` writes the trained ones there."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.sid_ids = torch.tensor(ids, device=module.weight.device)
        if module.weight not in made:
            made[module.weight] = nn.Parameter(module.weight.detach()[module.sid_ids])
        module.register_parameter(OWN_ROWS, made[module.weight])
        module.register_forward_hook(_own_embeddings if isinstance(module, nn.Embedding) else _own_logits)
        module.register_load_state_dict_pre_hook(_load_own_rows)


def own_rows(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `give_own_rows` made, by the names of their modules; those of tied matrices are one."""
    named = {name: module._parameters.get(OWN_ROWS) for name, module in model.named_modules()}
    return {name: rows for name, rows in named.items() if rows is not None}


def merge_own_rows(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Turns the state dict of a model with `own_rows` into that of one without, in place: the rows are written into
    their matrices."""
    for name in own_rows(model):
        rows, weight = state.pop(f"{name}.{OWN_ROWS}", None), state.get(f"{name}.weight")
        if rows is not None and weight is not None:
            ids = model.get_submodule(name).sid_ids.to(weight.device)
            state[f"{name}.weight"] = weight.index_copy(0, ids, rows.to(weight))


def _load_own_rows(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_others: object) -> None:
    """Adds to a state dict that is loaded the rows that it has in its matrix only: of a checkpoint, not of an engine,
    whose own files have both."""
    weight, rows = state.get(f"{prefix}weight"), f"{prefix}{OWN_ROWS}"
    if weight is not None and rows not in state:
        state[rows] = weight[module.sid_ids.to(weight.device)]


def _ids_on(module: nn.Module, device: torch.device) -> torch.Tensor:
    if module.sid_ids.device != device:
        module.sid_ids = module.sid_ids.to(device)
    return module.sid_ids


def _own_embeddings(module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
    ids = _ids_on(module, args[0].device)
    row = torch.searchsorted(ids, args[0]).clamp(max=len(ids) - 1)
    row = torch.where(ids[row] == args[0], row, -1)
    return _overwritten_embeddings(result, row, module.sid_rows, getattr(module, "embed_scale", None))


def _own_logits(module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
    return _overwritten_logits(result, args[0], module.sid_rows, _ids_on(module, result.device), module.bias)
