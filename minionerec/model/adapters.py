"""Adapters on a model: lean layers, loading, copying, and what FSDP and quantized bases need."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy as shallow
from functools import partial

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minionerec.errors import InputError
from minionerec.model import architecture, experts
from minionerec.model.groups import group_layers
from minionerec.model.low_rank import LEAN_LAYERS
from minionerec.model.sid_rows import SidRows


def use_lean_layers(model: nn.Module) -> None:
    """Replaces PEFT's forward passes by ours, in place: for SID rows, low-rank updates and experts.

    Parameters, their names and files stay PEFT's.
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
    """While open, accelerate can shard a model with FSDP whose tied embedding and output head have trainable rows.

    accelerate recognizes tied weights by comparing the two modules' `weight`. PEFT's wrappers return a new merged copy
    on every access, so a tied matrix would be sharded twice; while open they return the weight of the base. Also, torch
    visits a module only once, but PEFT keeps the rows of tied matrices in one dictionary for both modules; so the head
    gets a dictionary of its own with the same parameters.
    """
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    wrappers = [module for module in embeddings if isinstance(module, TrainableTokensWrapper)]
    for wrapper in wrappers:
        wrapper.__dict__["weight"] = wrapper.original_module.weight
    for rows in (module.token_adapter if module in wrappers else module for module in embeddings):
        if isinstance(rows, TrainableTokensLayer) and rows.tied_adapter is not None:
            rows.trainable_tokens_delta = nn.ParameterDict(rows.trainable_tokens_delta.items())
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.__dict__["weight"]


def prepare_quantized(model: nn.Module) -> None:
    """Freezes a quantized base and converts its norms to float32; embeddings and head keep their type.

    PEFT's own preparation converts everything that is not quantized to float32, 2.2 GB more for a 7B model. Norm
    outputs are cast back to the type that the norm had: a 4-bit layer returns its input's type, so float32 would double
    the activations that it and the layers after it save for the backward pass.
    """
    model.requires_grad_(False)
    for module in model.modules():
        # Some norms have no weight, and some blocks have "norm" in their name.
        weights = list(module.parameters(recurse=False))
        if any(getattr(hook, "func", None) is _cast_output for hook in module._forward_hooks.values()):
            continue  # prepared for an earlier adapter
        if "norm" in type(module).__name__.lower() and weights and not any(module.children()):
            dtype = weights[0].dtype
            module.float().register_forward_hook(partial(_cast_output, dtype))


def _cast_output(
    dtype: torch.dtype, _module: nn.Module, _args: tuple[object, ...], output: torch.Tensor
) -> torch.Tensor:
    return output.to(dtype)


def set_up_adapter(wrapped: PeftModel) -> PeftModel:
    """Adds to a new PEFT model what PEFT lacks: lean layers, an absolute path to the base, and checkpoints that hold
    only the adapter."""
    use_lean_layers(wrapped)
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path = _absolute_path(wrapped.get_base_model().config._name_or_path)
    # PEFT would also save the whole embedding matrix of a resized model, and the reference adapter of RL.
    wrapped.save_pretrained = partial(
        wrapped.save_pretrained, save_embedding_layers=False, selected_adapters=["default"]
    )
    return wrapped


def join_layers(wrapped: PeftModel) -> PeftModel:
    """Lets a GPU compute layers with one input together (`minionerec.model.groups`), where the model can run."""
    kinds = LEAN_LAYERS[lora.Linear], LEAN_LAYERS[lora.Linear4bit]
    group_layers(wrapped, [module for module in wrapped.modules() if type(module) in kinds])
    return wrapped


def _absolute_path(name: str) -> str:
    """The absolute path of a local folder, so that the adapter loads from any directory; a hub name is unchanged."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def load_adapter(model: PreTrainedModel, path: str, trainable: bool = False) -> PeftModel:
    """The model with the adapter of a checkpoint. Raises InputError if their shapes do not fit."""
    if not os.path.isfile(os.path.join(path, SAFETENSORS_WEIGHTS_NAME)):
        raise InputError(f"adapter {path}: has no {SAFETENSORS_WEIGHTS_NAME}")
    if getattr(model, "is_quantized", False) and trainable:
        prepare_quantized(model)
    try:
        config = PeftConfig.from_pretrained(path)
        if getattr(config, "init_lora_weights", None) == "orthogonal":
            config.init_lora_weights = True  # PEFT cannot start so on a quantized base; the file has the values
        with experts.shapes_shown(model):
            wrapped = PeftModel.from_pretrained(model, path, is_trainable=trainable, config=config)
    except SafetensorError as error:
        raise InputError(f"adapter {path}: its weights cannot be read, the file is damaged: {error}") from None
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        raise does_not_fit(path, model, config, error) from None
    _check_names(wrapped, path)
    return join_layers(set_up_adapter(wrapped))


def does_not_fit(path: str, model: nn.Module, config: PeftConfig, error: Exception) -> InputError:
    """What is wrong where PEFT raised `error` for the adapter of a folder on a base."""
    reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
    if "require gradients" in str(error) and config.modules_to_save:
        whole = ", ".join(config.modules_to_save)
        reason = f"it trains all of {whole}, which a quantized base cannot; leave out --use_qlora or --load_in_8bit"
    return InputError(f"adapter {path} does not fit the base {model.config._name_or_path}: {reason.strip()[:300]}")


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter of a PEFT model, SID rows included; their names without the adapter's name."""
    parameters = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if adapter in parts:
            parts.remove(adapter)
            parameters[".".join(parts)] = parameter
    return parameters


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """What `save_pretrained` needs of the state of a PEFT model: its adapter."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in named if "default" in name.split(".")}


def copy_adapter(model: PeftModel, adapter: str, copy: str) -> None:
    """Adds a frozen copy of an adapter under another name, with the same values and precision; it is not active."""
    config = shallow(model.peft_config[adapter])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and OLoRA would change the weights of the base a second time
    model.add_adapter(copy, config)
    use_lean_layers(model)
    copied = adapter_parameters(model, copy)
    for name, parameter in adapter_parameters(model, adapter).items():
        copied[name].data = parameter.detach().clone()
        copied[name].requires_grad_(False)


def _check_names(wrapped: PeftModel, path: str) -> None:
    """Raises InputError if the adapter on disk and the wrapped model do not have the same tensors.

    PEFT loads the tensors that match and skips the others, so an adapter of a deeper base would be loaded only in part.
    """
    with safe_open(os.path.join(path, SAFETENSORS_WEIGHTS_NAME), "pt") as tensors:
        saved = set(tensors.keys())
    model = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    different = sorted(n for n in saved ^ model if "lora_" in n or "trainable_tokens_delta" in n)
    if different:
        holder = "the adapter" if different[0] in saved else "the base"
        raise InputError(
            f"adapter {path} does not fit the base {wrapped.config._name_or_path}: {len(different)} tensors differ, "
            f"such as {different[0]}, which only {holder} has; name the base it was trained on"
        )


def round_weights(model: nn.Module, dtype: torch.dtype, all_of_them: bool = False) -> None:
    """Rounds the weights of a frozen model to `dtype`, in place. It then computes what its float32 original computes
    under autocast, with less memory and time.

    Rounded are the matrices of the linear layers except the output head, or all weights, as FSDP does it. Biases are
    not, because ZeRO-3 adds them as they are.
    """
    parts = [model] if all_of_them else architecture.matrices(model).layers.values()
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        if all_of_them or parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
