"""Trained rows of the embedding matrices for SID tokens, at the cost of these rows only."""

from collections.abc import Sequence
from typing import Any

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
        self, x: torch.Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The embeddings [..., H] of token ids x [...], or the logits [..., V] of hidden states x [..., H]."""
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        self._check_overlapping_tokens(active_adapters)
        for adapter in active_adapters:
            # With adapters disabled, the rows of the base go through the same arithmetic. So an adapter that has not
            # changed yet gives exactly the logits of its base.
            rows = (self.trainable_tokens_original if self.disable_adapters else self.trainable_tokens_delta)[adapter]
            if isinstance(self.base_layer, nn.Embedding):
                result = self._overwrite_embeddings(result, x, rows, adapter)
            else:
                result = self._overwrite_logits(result, x, rows, adapter)
        return result

    def get_merged_weights(self, active_adapters: Sequence[str]) -> torch.Tensor:
        """As PEFT's, which models ask for its type. The matrix of an 8-bit layer is not written out for that."""
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

    def _overwrite_embeddings(
        self, result: torch.Tensor, token_ids: torch.Tensor, rows: torch.Tensor, adapter: str
    ) -> torch.Tensor:
        row = self._row_of(adapter, token_ids.device)[token_ids]
        trained = F.embedding(row.clamp(min=0), rows)
        scale = self._get_embed_scale()  # Gemma scales its embeddings in the layer itself
        if scale is not None:
            trained = trained * scale.to(trained.dtype)
        return torch.where((row >= 0).unsqueeze(-1), trained.to(result.dtype), result)

    def _overwrite_logits(
        self, result: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, adapter: str
    ) -> torch.Tensor:
        ids = self._ids(adapter, hidden.device)
        bias = self.base_layer.bias
        bias = None if bias is None else bias[ids]
        if result.dtype == torch.float32:  # even with 16-bit hidden states, inside `head.float32_head`
            columns = float32_linear(hidden, rows.float(), bias)
        else:
            columns = F.linear(hidden, rows.to(hidden.dtype), bias)
        return result.index_copy(-1, ids, columns.to(result.dtype))
