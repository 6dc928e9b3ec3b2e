"""Experts of a mixture of experts, with low-rank updates and in 4 bits.

transformers holds the weights of all experts of a layer in parameters [E, ...] of one module. PEFT adapts those by
adding the whole update [E, ...] to the weight on every forward, so that each layer keeps a second copy of its experts
for the backward pass; transformers' quantizer leaves them in 16 bits. Here an expert's update is computed on the tokens
that the expert gets, as that of a linear layer is, and a weight in 4 bits is written out where it is used, in the
forward and again in the backward pass. Parameters, names and files stay PEFT's.

Dimensions: `E` experts, `T` tokens, `K` experts of a token, `S` = T K rows sorted by their expert, `I` features in, `O`
out, `r` rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import bitsandbytes
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.integrations import moe
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from minionerec.model import architecture


def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [S, I] times weight [E, I, O]: rows up to `ends`[e] [E] with expert e. Returns [S, O] in the weight's type."""
    return moe._grouped_mm(x, weight, ends)


class _FourBits(torch.autograd.Function):
    """`grouped` with a weight in 4 bits, which both passes write out and neither keeps."""

    @staticmethod
    def forward(ctx, x, weight, state, ends, transposed: bool):
        ctx.save_for_backward(ends)
        ctx.weight, ctx.state, ctx.transposed, ctx.dtype = weight, state, transposed, x.dtype
        stored = bitsandbytes.functional.dequantize_4bit(weight, state)
        return grouped(x, stored if transposed else stored.mT, ends)

    @staticmethod
    def backward(ctx, gradient):
        (ends,) = ctx.saved_tensors
        stored = bitsandbytes.functional.dequantize_4bit(ctx.weight, ctx.state)
        of_x = grouped(gradient.contiguous(), stored.mT if ctx.transposed else stored, ends)
        return of_x.to(ctx.dtype), None, None, None, None


class LeanExperts:
    """A module of experts whose weights may have low-rank updates and may be in 4 bits.

    Attributes:
        states: weight name → the quantization state of a weight in 4 bits.
        updates: weight name → its low-rank updates, while a `LeanParameter` around the module runs.
    """

    states: dict
    updates: dict

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """The output of hidden_states [T, I]. `routing` is each token's experts and their weights, [T, K] each; Llama 4
        routes before it calls, with T / E rows for each expert in turn."""
        if not self.states and not any(self.updates.values()):
            return super().forward(hidden_states, *routing)
        if not routing:
            rows = hidden_states.reshape(-1, self.hidden_size)
            ends = torch.arange(1, self.num_experts + 1, device=rows.device, dtype=torch.int32)
            ends *= len(rows) // self.num_experts
            gate, up = self._project("gate_up_proj", rows, ends).chunk(2, dim=-1)
            return self._project("down_proj", up * self.act_fn(gate), ends)
        chosen, weights = routing
        expert, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(self.num_experts, device=expert.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        rows = hidden_states[order // chosen.shape[-1]]
        if self.has_gate:
            rows = self._apply_gate(self._project("gate_up_proj", rows, ends, expert))
        else:
            rows = self.act_fn(self._project("up_proj", rows, ends, expert))
        rows = self._project("down_proj", rows, ends, expert)
        if self.has_post_expert_norm:
            rows = self.post_expert_norm(rows)
        rows = rows * weights.flatten()[order].unsqueeze(-1)
        outputs = rows[order.argsort()].view(*chosen.shape, -1).sum(dim=1)
        return outputs.to(hidden_states.dtype)

    def _project(self, name: str, x: torch.Tensor, ends: torch.Tensor, expert: torch.Tensor | None = None):
        """x [S, I] through the weight of this name and its updates, [S, O]."""
        weight, state = getattr(self, name), self.states.get(name)
        if state is not None:
            result = _FourBits.apply(x, weight, state, ends, self.multiplies_right)
        else:
            result = grouped(x, weight if self.multiplies_right else weight.mT, ends)
        if getattr(self, "has_bias", False):
            result = result + getattr(self, f"{name}_bias")[expert]
        for first, second, scale, dropout in self.updates.get(name, ()):
            low = grouped(dropout(x), first, ends)
            result = result + (grouped(low, second, ends) * scale).to(result.dtype)
        return result

    @property
    def multiplies_right(self) -> bool:
        """Whether a weight is [E, I, O] rather than [E, O, I]. Llama 4 does not say that its are."""
        return getattr(self, "is_transposed", True)


class LeanParameter:
    """PEFT's layer around a module of experts, for one of its parameters."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.merged or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        experts = self.get_base_layer()
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        experts.updates[self.parameter_name] = [self._factors(name, experts, x.device.type) for name in active]
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            del experts.updates[self.parameter_name]

    def _factors(self, adapter: str, experts: LeanExperts, device: str) -> tuple:
        """(first [E, I, r], second [E, r, O], scale, dropout) of an update, in the type they are multiplied in."""
        rank = self.r[adapter]
        a = self.lora_A[adapter].weight.view(self.num_experts, rank, -1)
        b = self.lora_B[adapter].weight.view(-1, rank, self.num_experts).permute(2, 0, 1)
        # PEFT takes the last dimension of a weight for the input unless the module says otherwise.
        swapped = self._did_swap_in_out_features and experts.multiplies_right
        first, second = (b, a) if swapped else (a.mT, b.mT)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
        missing = -rank % 8  # GPUs group products whose rows are multiples of 16 bytes
        first, second = F.pad(first, (0, missing)), F.pad(second, (0, 0, 0, missing))
        return (
            first.to(dtype).contiguous(),
            second.to(dtype).contiguous(),
            self.scaling[adapter],
            self.lora_dropout[adapter],
        )


@cache
def _lean(kind: type) -> type:
    return type(kind.__name__, (LeanExperts, kind), {})


# PEFT finds the layer of a parameter by this name when it adds another adapter.
_LeanParamWrapper = type("ParamWrapper", (LeanParameter, ParamWrapper), {})


def make_lean(module: nn.Module) -> None:
    """Turns a module of experts into a `LeanExperts`, in place."""
    if not isinstance(module, LeanExperts):
        module.__class__ = _lean(type(module))
        module.states, module.updates = {}, {}


def use_lean_parameters(model: nn.Module) -> None:
    """Gives PEFT's layers of experts, and those experts, their lean forwards, in place."""
    for module in list(model.modules()):
        if type(module) is ParamWrapper and architecture.expert_parameters(module.get_base_layer()):
            module.__class__ = _LeanParamWrapper
            make_lean(module.get_base_layer())


@contextmanager
def shapes_shown(model: nn.Module) -> Iterator[None]:
    """While open, experts in 4 bits show the shape and type they stand for, of which PEFT makes their adapters."""
    packed = [(m, name) for m in model.modules() if isinstance(m, LeanExperts) for name in m.states]
    weights = [getattr(module, name) for module, name in packed]
    for (module, name), weight in zip(packed, weights, strict=True):
        state = module.states[name]
        shown = torch.empty((), dtype=state.dtype, device=weight.device).expand(state.shape)
        setattr(module, name, nn.Parameter(shown, requires_grad=False))
    try:
        yield
    finally:
        for (module, name), weight in zip(packed, weights, strict=True):
            setattr(module, name, weight)


# --- Loading ----------------------------------------------------------------------------------------------------------


class _QuantizeExperts(Bnb4bitQuantize):
    """transformers' 4-bit quantization of a weight as it is loaded, of experts too."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        config, result = self.hf_quantizer.quantization_config, {}
        for name, value in input_dict.items():
            module, leaf = get_module_from_name(model, name)
            if leaf not in architecture.expert_parameters(module):
                result |= super().convert({name: value}, full_layer_name, model, **kwargs)
                continue
            value = value[0] if isinstance(value, list) else value
            result[name] = bitsandbytes.nn.Params4bit(
                value,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                quant_storage=config.bnb_4bit_quant_storage,
            ).to(value.device)
            make_lean(module)
            module.states[leaf] = result[name].quant_state
        return result


class _LeavesOut:
    @staticmethod
    def get_modules_to_not_convert(model, *args, **kwargs):
        found = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *args, **kwargs)
        return found + architecture.not_to_quantize(model)


class _Quantizer4bit(_LeavesOut, Bnb4BitHfQuantizer):
    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return leaf in architecture.expert_parameters(module) or super().param_needs_quantization(model, param_name)

    def get_quantize_ops(self):
        return _QuantizeExperts(self)

    def _dequantize(self, model, dtype=None):
        model = super()._dequantize(model, dtype=dtype)
        for module in model.modules():
            if isinstance(module, LeanExperts):
                for name, state in module.states.items():
                    weight = bitsandbytes.functional.dequantize_4bit(getattr(module, name).data, state)
                    setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
                module.states = {}
        return model


class _Quantizer8bit(_LeavesOut, Bnb8BitHfQuantizer):
    pass


@contextmanager
def quantizers() -> Iterator[None]:
    """While open, transformers loads a base for QLoRA with its experts in 4 bits, and leaves alone what
    `architecture.not_to_quantize` names."""
    ours = {"bitsandbytes_4bit": _Quantizer4bit, "bitsandbytes_8bit": _Quantizer8bit}
    with mock.patch.dict(AUTO_QUANTIZER_MAPPING, ours):
        yield
