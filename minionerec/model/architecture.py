"""Inspects the architecture of a causal LM: its text decoder, and the weights that LoRA and bitsandbytes can handle.

All functions take a model without adapters, with its weights or on the meta device.
"""

import inspect
import re
from dataclasses import dataclass
from functools import cache

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from minionerec.errors import InputError

ROUTERS = {"gate", "router", "router_gate", "shared_expert_gate"}  # in the dotted name of a router of experts


# --- The text decoder -------------------------------------------------------------------------------------------------


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model that contains the input embedding: the part of a composite model that reads text."""
    embedding = model.get_input_embeddings()
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and _holds(m, embedding)][-1]


def non_text_modules(model: PreTrainedModel) -> list[str]:
    """The names of the parts of a composite model that text does not go through, such as a vision tower."""
    decoder, head = text_decoder(model), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    around = [m for m in model.base_model.modules() if m is not decoder and _holds(m, decoder)]
    return [
        names[child]
        for module in around
        for child in module.children()
        if child is not head and not _holds(child, decoder)
    ]


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def freeze_non_text_modules(model: PreTrainedModel) -> None:
    """Freezes the parts that text does not go through, in place: they get no gradient, and DDP would wait for one."""
    for name in non_text_modules(model):
        model.get_submodule(name).requires_grad_(False)
    # FSDP shards by the classes named here, and fails if one of them is not in the model.
    model._no_split_modules = set(model._no_split_modules or ()) & {type(module).__name__ for module in model.modules()}


# --- What LoRA can adapt ----------------------------------------------------------------------------------------------


@dataclass
class Matrices:
    """The matrices of a text decoder, without embeddings and output head.

    Attributes:
        layers: name → linear layer that LoRA can adapt.
        experts: name → parameter [E, ...] that holds one matrix for each of E experts.
        left_out: name → why a weight can have neither LoRA nor 4 bits.
    """

    layers: dict[str, nn.Module]
    experts: dict[str, nn.Parameter]
    left_out: dict[str, str]


def matrices(model: PreTrainedModel) -> Matrices:
    """Sorts the weights of the text decoder into those groups."""
    others = tuple(f"{name}." for name in non_text_modules(model))
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    found = Matrices({}, {}, {})
    for name, module in model.named_modules():
        if f"{name}.".startswith(others) or any(module is embedding for embedding in embeddings):
            continue
        if ROUTERS & set(name.split(".")):
            reason = "a router"
        elif isinstance(module, (nn.Linear, Conv1D)):
            reason = _why_not(model, name)
        elif expert_parameters(module):
            found.experts.update({f"{name}.{own}": getattr(module, own) for own in expert_parameters(module)})
            continue
        else:
            reason = "not a linear layer"
        if not reason:
            found.layers[name] = module
        elif isinstance(module, (nn.Linear, Conv1D)):
            found.left_out[name] = reason
        elif not isinstance(module, nn.Embedding):
            weights = [key for key, p in module.named_parameters(recurse=False) if p.squeeze().ndim >= 2]
            weights = [key for key in weights if not key.endswith("bias")]
            found.left_out.update({f"{name}.{key}".removesuffix(".weight"): reason for key in weights})
    return found


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights [E, ...] of a module of experts that `minionerec.model.experts` can compute; none for
    other modules. It can compute modules of transformers' experts interface, and those of Llama 4."""
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return ("gate_up_proj", "down_proj") if type(module).__name__ == "Llama4TextExperts" else ()


def experts_per_token(config: PreTrainedConfig) -> int:
    """How many experts each token goes through."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk")
    counts = [getattr(config.get_text_config(), name, None) for name in names]
    return next((count for count in counts if isinstance(count, int) and count > 0), 1)


def _why_not(model: PreTrainedModel, name: str) -> str:
    """Why a linear layer can have neither an adapter nor a 4-bit weight; empty if it can."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    kind: type = type(owner)
    # State-space mixers pass the weight to a fused kernel. Bloom's layers read it only if `slow_but_exact` is set.
    if reads(kind, f"{leaf}.weight") and getattr(owner, "slow_but_exact", True):
        return "weight read directly"
    try:
        LoraModel._check_target_module_compatiblity(None, LoraConfig(), model, leaf)
    except ValueError:
        return "PEFT refuses it"
    return ""


def reads(kind: type, attribute: str) -> bool:
    """Whether the code of a class reads the values of `self.attribute`, rather than their type or device."""
    return re.search(rf"self\.{re.escape(attribute)}\b(?!\.(dtype|device))", _source(kind)) is not None


@cache
def _source(kind: type) -> str:
    """The source code of a class; empty if it cannot be found."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


# --- What bitsandbytes can quantize -----------------------------------------------------------------------------------


def not_to_quantize(model: PreTrainedModel) -> list[str]:
    """The names of the linear layers that stay in 16 bits, although bitsandbytes could replace them."""
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return [name for name in matrices(model).left_out if name in linear]


def quantized_weights(model: PreTrainedModel, bits: int) -> dict[str, nn.Parameter]:
    """The weights that `loading.load_base` stores in 4 or 8 bits, by name: those of linear layers, which transformers
    replaces unless they are of a subclass, and with 4 bits those of experts."""
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules) + not_to_quantize(model)
    layers = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, skipped)
    }
    return {**layers, **(matrices(model).experts if bits == 4 else {})}


def check_quantized(model: PreTrainedModel, bits: int) -> dict[str, nn.Parameter]:
    """`quantized_weights`. Raises InputError where there are none."""
    weights = quantized_weights(model, bits)
    if not weights:
        flag = "--use_qlora True" if bits == 4 else "--load_in_8bit True"
        raise InputError(
            f"{flag}: bitsandbytes has no layer for any of {type(model).__name__}; use --use_lora True only"
        )
    return weights


def meta_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The architecture of a configuration on the meta device: every module, no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    freeze_non_text_modules(model)
    return model
