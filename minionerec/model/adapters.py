"""Adapters on a model: lean layers, loading from a checkpoint, copies, and what FSDP and a quantized base need."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from minionerec.errors import InputError
from minionerec.model import architecture, experts
from minionerec.model.low_rank import LEAN_LAYERS
from minionerec.model.sid_rows import SidRows


def use_lean_layers(model: nn.Module) -> None:
    """Gives the layers of a PEFT model their lean forwards, in place: those of SID rows, low-rank updates and experts.

    Parameters, names and files stay PEFT's.
    """
    experts.use_lean_parameters(model)
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = SidRows
        elif (
            type(module) in LEAN_LAYERS
            and isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
            and not any(layer.bias is not None for layer in module.lora_B.values())
        ):
            module.__class__ = LEAN_LAYERS[type(module)]


@contextmanager
def ready_for_fsdp(model: nn.Module) -> Iterator[None]:
    """While open, accelerate can share out with FSDP what an embedding and an output head with trained rows share.

    It compares the two weights, of which PEFT's wrappers show a new, merged copy at every look, and would share a tied
    matrix out twice; so they show the base's own. And torch looks into a module once: the rows of tied matrices stand
    in one dictionary, so the head gets one of its own with the same parameters.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    wrappers = [module for module in ends if isinstance(module, TrainableTokensWrapper)]
    for wrapper in wrappers:
        wrapper.__dict__["weight"] = wrapper.original_module.weight
    for rows in (module.token_adapter if module in wrappers else module for module in ends):
        if isinstance(rows, TrainableTokensLayer) and rows.tied_adapter is not None:
            rows.trainable_tokens_delta = nn.ParameterDict(rows.trainable_tokens_delta.items())
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.__dict__["weight"]


def prepare_quantized(model: nn.Module) -> None:
    """Freezes a quantized base and keeps its norms in float32; embeddings and head stay as they are.

    PEFT's own preparation turns everything that is not quantized into float32, 2.2 GB more for a 7B model. What leaves
    a norm goes on in the type it had: 4-bit layers answer in the type they are asked in, which would double what they
    and those behind them keep for the backward pass.
    """
    model.requires_grad_(False)
    for module in model.modules():
        own = list(module.parameters(recurse=False))  # some have no weight, some blocks are called after their norm
        if "norm" in type(module).__name__.lower() and own and not any(module.children()):
            dtype = own[0].dtype
            module.float().register_forward_hook(partial(_to, dtype))


def _to(dtype: torch.dtype, _module, _args, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


def _finish(wrapped: PeftModel) -> PeftModel:
    """What PEFT's model lacks: the row-only SID rows, a base path that lasts, and checkpoints of the adapter alone."""
    use_lean_layers(wrapped)
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path = _lasting_path(wrapped.get_base_model().config._name_or_path)
    # PEFT would add the whole embedding matrix of a resized model to every checkpoint, and the reference of RL.
    wrapped.save_pretrained = partial(
        wrapped.save_pretrained, save_embedding_layers=False, selected_adapters=["default"]
    )
    return wrapped


def _lasting_path(name: str) -> str:
    """A local folder as an absolute path, so that the adapter loads from any directory; a hub name as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def load_adapter(model: nn.Module, path: str, trainable: bool = False) -> PeftModel:
    """The model with the adapter of a checkpoint. Raises InputError where their shapes do not fit."""
    if not os.path.isfile(os.path.join(path, SAFETENSORS_WEIGHTS_NAME)):
        raise InputError(f"adapter {path}: holds no {SAFETENSORS_WEIGHTS_NAME}")
    if getattr(model, "is_quantized", False) and trainable:
        prepare_quantized(model)
    try:
        with experts.shapes_shown(model):
            wrapped = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    except SafetensorError as error:
        raise InputError(f"adapter {path}: its weights cannot be read, the file is damaged: {error}") from None
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise InputError(
            f"adapter {path} does not fit the base {model.config._name_or_path}: {reason.strip()[:300]}"
        ) from None
    _check_names(wrapped, path)
    return _finish(wrapped)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter of a PEFT model, SID rows included, by their names without the adapter's."""
    parameters = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if adapter in parts:
            parts.remove(adapter)
            parameters[".".join(parts)] = parameter
    return parameters


def copy_adapter(model: PeftModel, adapter: str, copy: str) -> None:
    """Adds a frozen copy of an adapter, values and precision the same, under another name; it is not active."""
    model.add_adapter(copy, model.peft_config[adapter])
    use_lean_layers(model)
    copied = adapter_parameters(model, copy)
    for name, parameter in adapter_parameters(model, adapter).items():
        copied[name].data = parameter.detach().clone()
        copied[name].requires_grad_(False)


def _check_names(wrapped: PeftModel, path: str) -> None:
    """Raises InputError where the adapter on disk has tensors the wrapped model lacks, or lacks some it has.

    PEFT loads what matches and leaves the rest out, so an adapter of a deeper base would load in part.
    """
    with safe_open(os.path.join(path, SAFETENSORS_WEIGHTS_NAME), "pt") as tensors:
        saved = set(tensors.keys())
    model = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    different = sorted(n for n in saved ^ model if "lora_" in n or "trainable_tokens_delta" in n)
    if different:
        holder = "the adapter alone" if different[0] in saved else "the base alone"
        raise InputError(
            f"adapter {path} does not fit the base {wrapped.config._name_or_path}: {len(different)} tensors differ, "
            f"such as {different[0]}, which {holder} has a place for; name the base it was trained on"
        )


def round_weights(model: nn.Module, dtype: torch.dtype, all_of_them: bool = False) -> None:
    """Rounds weights of a frozen model to `dtype`, in place, so that it computes what its float32 original does under
    autocast in less memory and time: those of the linear layers but the output head, or all of them, as FSDP does."""
    parts = [model] if all_of_them else architecture.matrices(model).layers.values()
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        parameter.data = parameter.data.to(dtype)
