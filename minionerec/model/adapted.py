"""Loads trained checkpoints: a whole model, or an adapter on its base, which is stored as in training or merged."""

from itertools import chain
from operator import methodcaller

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from minionerec.checkpoint import Checkpoint
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import architecture, device, loading
from minionerec.model.adapters import load_adapter
from minionerec.model.groups import join_frozen_layers
from minionerec.model.merging import Merge, merged

DEFAULTS = AdapterFlags()


def quantization_config(flags: AdapterFlags = DEFAULTS) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the frozen base: NF4 with double quantization and matmuls in the device's 16-bit dtype
    for QLoRA, LLM.int8 for `load_in_8bit`, None for neither.

    Source: Dettmers et al., QLoRA (2023) and LLM.int8 (2022).
    """
    if flags.bits == 4:
        dtype = device.compute_dtype(quantized=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP and ZeRO-3 shard tensors of a floating dtype only; the stored bits are the same.
            bnb_4bit_quant_storage=dtype if device.weights_are_sharded() else torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if flags.bits == 8 else None


def check_dora(use_dora: bool, bits: int, where: str) -> None:
    """Raises InputError for DoRA on an 8-bit base on a CPU, where PEFT loses the scales of the base. `where` begins the
    message."""
    if use_dora and bits == 8 and device.local_device().type == "cpu":
        raise InputError(
            f"{where}: DoRA (--use_dora) does not work on an 8-bit base (--load_in_8bit) on a CPU; use a GPU, or train "
            "on a base in 16 bits or, with --use_qlora True, in 4"
        )


def load_adapted(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerFast,
    base_model: str = "",
    quantization: BitsAndBytesConfig | None = None,
    trainable: bool = False,
    merge_in: torch.dtype | None = None,
    merge: Merge = methodcaller("merge_and_unload"),
    fingerprint: str | None = None,
) -> PreTrainedModel | PeftModel:
    """The model of an adapter checkpoint on its base, or, with `merge_in`, what `merge` makes of it on a base of that
    precision: one whole model.

    What was trained on a quantized base is merged into the values that its 4 or 8 bits stand for, and into the other
    weights as published.

    Args:
        base_model: where the base is, if not where the adapter says.
        fingerprint: of the base, where it is known already.

    Raises InputError where the base cannot be loaded, is not the one that the adapter was trained on, or has other
    shapes.
    """
    base_model = base_model or checkpoint.base()
    if checkpoint.base_fingerprint and checkpoint.base_fingerprint != (fingerprint or loading.fingerprint(base_model)):
        raise InputError(
            f"adapter {checkpoint.path} does not fit the base {base_model}: these are not the weights it was trained "
            "on; name the base it was trained on"
        )
    if merge_in is None or quantization is None:
        bits = 8 if quantization and quantization.load_in_8bit else 16
        check_dora(bool(checkpoint.adapter and checkpoint.adapter.get("use_dora")), bits, f"adapter {checkpoint.path}")
        model = loading.load_base(base_model, quantization, dtype=merge_in)
    else:
        published = loading.unquantized_weights(base_model, quantization, merge_in)
        model = _dequantized(loading.load_base(base_model, quantization, embeddings_in_8_bits=False), merge_in)
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if name in published:
                tensor.data = published[name].to(tensor.device)
    loading.fit_embeddings(model, tokenizer)
    wrapped = load_adapter(model, checkpoint.path, trainable)
    return wrapped if merge_in is None else merged(wrapped, merge)


def _dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its layers in 4 or 8 bits as they would be loaded in `dtype`, with the values of these bits."""
    model = model.dequantize(dtype).to(dtype)
    # A base that is stored in these bits would be saved in them again, which transformers cannot.
    model._weight_conversions = [
        conversion
        for conversion in model._weight_conversions or ()
        if not any("Bnb" in type(operation).__name__ for operation in getattr(conversion, "operations", ()))
    ]
    for name, published in architecture.meta_model(model.config).named_modules():
        if isinstance(published, Conv1D):  # of GPT-2, which stores [in, out]
            linear = model.get_submodule(name)
            layer = Conv1D(linear.out_features, linear.in_features)
            layer.weight, layer.bias = nn.Parameter(linear.weight.data.T.contiguous()), linear.bias
            model.set_submodule(name, layer)
    return model


def load_checkpoint(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, base_model: str, fast: bool = False
) -> PreTrainedModel | PeftModel:
    """The model of a whole or adapter checkpoint, in evaluation mode, its base stored as in training. Errors as in
    `load_adapted`.

    An adapter is merged into a base in float32, which changes log-probabilities by rounding only (about 1e-5 nats).
    `fast` lets a GPU merge it into a base in 16 bits, too, which rounds the update to them: for serving, not for
    comparing checkpoints, whose difference may be smaller.
    """
    if checkpoint.adapter is None:
        model = loading.load_base(checkpoint.path)
    else:
        quantization = quantization_config(checkpoint.adapter_flags)
        model = load_adapted(checkpoint, tokenizer, base_model, quantization)
        exact = model.dtype == torch.float32
        if quantization is None and (exact or (fast and device.starts_kernels(model.device))):
            model = merged(model)
    if not isinstance(model, PeftModel):
        join_frozen_layers(model)
    return model.eval()
