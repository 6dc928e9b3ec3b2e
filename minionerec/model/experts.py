"""Computes mixture-of-experts layers with low-rank updates and 4-bit weights.

transformers holds the weights of all experts of a layer in parameters [E, ...] of one module. PEFT adapts those by
adding the whole update [E, ...] to the weight in every forward pass, so each layer keeps a second copy of its experts
for the backward pass; transformers' quantizer leaves them in 16 bits. Here the update of an expert is computed on the
tokens that are routed to it, as for a linear layer, and a 4-bit weight is dequantized when it is used, in the forward
pass and again in the backward pass. Parameters, names and files stay PEFT's.

Dimensions: `E` experts, `T` tokens, `K` experts per token, `S` = T K rows sorted by expert, `I` features in, `O` out,
`r` rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import bitsandbytes
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel
from transformers.integrations import moe
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from minionerec.model import architecture, int8_rows

if TYPE_CHECKING:  # what the classes here are mixed into
    from peft.tuners.lora.layer import ParamWrapper as _Wrapper
    from torch.nn import Module as _Experts
    from transformers.core_model_loading import ConversionOps as _Conversion
    from transformers.quantizers.base import HfQuantizer as _Quantizer
else:
    _Experts = _Wrapper = _Conversion = _Quantizer = object


def grouped(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The matmul of x [S, I] and weight [E, I, O], [S, O] in the type of the weight: expert e gets the rows from
    offsets[e - 1] to offsets[e], with `offsets` [E]."""
    if not len(x):  # which torch refuses
        return x.to(weight.dtype) @ weight[0]
    return moe._grouped_mm(x, weight, offsets)


class _FourBits(torch.autograd.Function):
    """`grouped` with a 4-bit weight, which both passes dequantize and neither keeps."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        state: bitsandbytes.functional.QuantState,
        offsets: torch.Tensor,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(offsets)
        ctx.weight, ctx.state, ctx.transposed, ctx.dtype = weight, state, transposed, x.dtype
        stored = bitsandbytes.functional.dequantize_4bit(weight, state)
        return grouped(x, stored if transposed else stored.mT, offsets)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (offsets,) = ctx.saved_tensors
        stored = bitsandbytes.functional.dequantize_4bit(ctx.weight, ctx.state)
        grad_x = grouped(gradient.contiguous(), stored.mT if ctx.transposed else stored, offsets)
        return grad_x.to(ctx.dtype), None, None, None, None


class LeanExperts(_Experts):
    """A module of experts whose weights may have low-rank updates and may be in 4 bits.

    Attributes:
        states: weight name → the quantization state of a 4-bit weight.
        updates: weight name → its low-rank updates, while a `LeanParameter` around the module runs.
    """

    states: dict[str, bitsandbytes.functional.QuantState]
    updates: dict[str, list[tuple]]

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """The output for hidden_states [T, I]. `routing` is the experts of each token and their weights, [T, K] each.
        Llama 4 routes before it calls this, without `routing`: each expert in turn has T / E rows."""
        if not self.states and not any(self.updates.values()):
            return super().forward(hidden_states, *routing)
        if not routing:
            x = hidden_states.reshape(-1, self.hidden_size)
            offsets = torch.arange(1, self.num_experts + 1, device=x.device, dtype=torch.int32)
            offsets *= len(x) // self.num_experts
            gate, up = self._project("gate_up_proj", x, offsets).chunk(2, dim=-1)
            return self._project("down_proj", up * self.act_fn(gate), offsets)
        chosen, weights = routing
        expert, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(self.num_experts, device=expert.device)
        offsets = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        x = hidden_states[order // chosen.shape[-1]]  # [S, I]
        if self.has_gate:
            x = self._apply_gate(self._project("gate_up_proj", x, offsets, expert))
        else:
            x = self.act_fn(self._project("up_proj", x, offsets, expert))
        x = self._project("down_proj", x, offsets, expert)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        x = x * weights.flatten()[order].unsqueeze(-1)
        outputs = x[order.argsort()].view(*chosen.shape, x.shape[1]).sum(dim=1)
        return outputs.to(hidden_states.dtype)

    def _project(
        self, name: str, x: torch.Tensor, offsets: torch.Tensor, expert: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [S, I] through the weight `name` and its updates, [S, O]; `expert` [S] picks the bias of each row."""
        weight, state = getattr(self, name), self.states.get(name)
        if state is not None:
            result = _FourBits.apply(x, weight, state, offsets, self.multiplies_right)
        else:
            result = grouped(x, weight if self.multiplies_right else weight.mT, offsets)
        if getattr(self, "has_bias", False):
            result = result + getattr(self, f"{name}_bias")[expert]
        for first, second, scale, dropout in self.updates.get(name, ()):
            low = grouped(dropout(x), first, offsets)
            result = result + (grouped(low, second, offsets) * scale).to(result.dtype)
        return result

    @property
    def multiplies_right(self) -> bool:
        """Whether a weight is [E, I, O] rather than [E, O, I]. Llama 4 has the first, without an attribute for it."""
        return getattr(self, "is_transposed", True)


class LeanParameter(_Wrapper):
    """PEFT's layer around a module of experts, for one of its parameters."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
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
        """(first [E, I, r], second [E, r, O], scale, dropout) of an update, in the type of the matmul."""
        rank = self.r[adapter]
        a = self.lora_A[adapter].weight.view(self.num_experts, rank, -1)
        b = self.lora_B[adapter].weight.view(-1, rank, self.num_experts).permute(2, 0, 1)
        # PEFT takes the last dimension of a weight for the input, unless the module is marked as transposed.
        swapped = self._did_swap_in_out_features and experts.multiplies_right
        first, second = (b, a) if swapped else (a.mT, b.mT)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
        missing = -rank % 8  # grouped matmuls on GPUs need rows of a multiple of 16 bytes
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


# PEFT finds the layer of a target parameter by this class name when it adds another adapter.
_LeanParamWrapper = type("ParamWrapper", (LeanParameter, ParamWrapper), {})


def make_lean(module: nn.Module) -> None:
    """Turns a module of experts into a `LeanExperts`, in place."""
    if not isinstance(module, LeanExperts):
        kind: type = type(module)
        module.__class__ = _lean(kind)
        module.states, module.updates = {}, {}


def use_lean_parameters(model: nn.Module) -> None:
    """Replaces the forward passes of PEFT's layers around experts, and of these experts, by ours, in place."""
    for module in list(model.modules()):
        if type(module) is ParamWrapper and architecture.expert_parameters(module.get_base_layer()):
            module.__class__ = _LeanParamWrapper
            make_lean(module.get_base_layer())


@contextmanager
def shapes_shown(model: nn.Module) -> Iterator[None]:
    """While open, 4-bit weights of experts show their original shape and type, from which PEFT creates adapters."""
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
    """transformers' 4-bit quantization of weights during loading, extended to experts."""

    def convert(
        self,
        input_dict: dict[str, torch.Tensor | list[torch.Tensor]],
        full_layer_name: str | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> dict[str, torch.Tensor]:
        config = self.hf_quantizer.quantization_config
        result: dict[str, torch.Tensor] = {}
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


class _OfGivenShape(_Conversion):
    """Converts only weights of the shape that the configuration asks for: transformers does not compare the shapes of
    what a quantizer handles. Others are left out, so that they count as missing.

    The embedding and the output head are left on the CPU while the other weights are loaded:
    `int8_rows.quantize_embeddings` packs them there, so that a GPU never holds them in 16 bits."""

    def convert(
        self,
        input_dict: dict[str, torch.Tensor | list[torch.Tensor]],
        full_layer_name: str | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> dict[str, torch.Tensor]:
        name, value = next(iter(input_dict.items()))  # weights come one by one
        assert model
        value = value[0] if isinstance(value, list) else value
        module, _ = get_module_from_name(model, name)
        shape = model.get_parameter(name).shape
        if value.shape != (shape[::-1] if getattr(module, "source_cls", None) is Conv1D else shape):
            return {}
        if not _is_embedding(model, name):
            return super().convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        return {name: value.to("cpu")}


def _is_embedding(model: PreTrainedModel, name: str) -> bool:
    module, leaf = get_module_from_name(model, name)
    return leaf == "weight" and (module is model.get_input_embeddings() or module is model.get_output_embeddings())


class _Quantize4bit(_OfGivenShape, _QuantizeExperts):
    pass


class _Quantize8bit(_OfGivenShape, Bnb8bitQuantize):
    pass


class _OurQuantizer(_Quantizer):
    """Adds the layers of `architecture.not_to_quantize` to those that a quantizer skips, and handles the embedding and
    the output head itself."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: object) -> bool:
        return _is_embedding(model, param_name) or super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """What transformers reserves on a GPU before it loads."""
        return 0 if _is_embedding(model, param_name) else super().param_element_size(model, param_name, param)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        model = super()._dequantize(model, dtype=dtype)
        int8_rows.dequantize_embeddings(model, dtype or model.config.dtype)
        return model

    @staticmethod
    def get_modules_to_not_convert(model: PreTrainedModel, *args: object, **kwargs: object) -> list[str]:
        found = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *args, **kwargs)
        return found + architecture.not_to_quantize(model)


class _With4BitExperts(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantizer, extended to experts."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: object) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return leaf in architecture.expert_parameters(module) or super().param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> _Quantize4bit:
        return _Quantize4bit(self)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        model = super()._dequantize(model, dtype=dtype)
        for module in model.modules():
            if isinstance(module, LeanExperts):
                for name, state in module.states.items():
                    weight = bitsandbytes.functional.dequantize_4bit(getattr(module, name).data, state)
                    setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
                module.states = {}
        return model


class _Quantizer4bit(_OurQuantizer, _With4BitExperts):
    pass


class _Quantizer8bit(_OurQuantizer, Bnb8BitHfQuantizer):
    def get_quantize_ops(self) -> _Quantize8bit:
        return _Quantize8bit(self)


@contextmanager
def quantizers() -> Iterator[None]:
    """While open, transformers loads a base for QLoRA with its experts in 4 bits, leaves the embedding and the output
    head of a quantized base on the CPU, and does not quantize the layers of `architecture.not_to_quantize`."""
    theirs = dict(AUTO_QUANTIZER_MAPPING)
    AUTO_QUANTIZER_MAPPING.update(bitsandbytes_4bit=_Quantizer4bit, bitsandbytes_8bit=_Quantizer8bit)
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(theirs)
