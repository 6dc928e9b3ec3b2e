"""Loads a base model or checkpoint and its tokenizer, and adds the SID tokens of a catalogue to both."""

import hashlib
import json
import os
import sys
from collections.abc import Collection
from functools import cache
from itertools import chain

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils import logging as transformers_logging

from minionerec import world
from minionerec.checkpoint import HUB_NAME
from minionerec.data.sid_tokens import add_sid_tokens as add_to_tokenizer
from minionerec.errors import InputError
from minionerec.model import device
from minionerec.process_memory import return_freed_memory


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint; the padding token defaults to the end-of-sequence token.

    Texts keep their length: truncation and padding that the checkpoint turns on are turned off. Raises InputError if
    there is no tokenizer, or it has no end-of-sequence token or no fast implementation.
    """
    _look_up(path)
    try:
        tokenizer = _of_tokenizer_file(AutoTokenizer.from_pretrained(path), path)
    except Exception as error:  # `tokenizers` raises a plain Exception for a damaged file
        raise InputError(f"{path}: no tokenizer can be loaded{_no_folder(path)}: {_first_line(error)}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a model's type alone
        raise InputError(f"{path}: the tokenizer has no vocabulary; is tokenizer.json missing?")
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise InputError(f"{path}: the tokenizer must be a fast one with an end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


@cache
def _look_up(path: str) -> None:
    """Says that a name is looked up on the hub, where it is not known yet: if the hub cannot be reached, transformers
    tries for a minute, and the name may be a mistyped folder."""
    if os.path.isdir(path) or not HUB_NAME.fullmatch(path) or world.rank():
        return
    if cached_file(path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False) is None:
        print(f"{path}: is not a folder here; looking it up on the hub", file=sys.stderr, flush=True)


def _no_folder(path: str) -> str:
    """For a message that a model cannot be loaded."""
    return "" if os.path.isdir(path) else "; there is no such folder, and no hub model of this name can be reached"


def _of_tokenizer_file(tokenizer: PreTrainedTokenizerFast, path: str) -> PreTrainedTokenizerFast:
    """The tokenizer that tokenizer.json describes, if transformers 5 replaced it by another. Next to the config of a
    Qwen2 model, it loads a tokenizer of the generic class as Qwen2's byte-level one: a vocabulary without bytes then
    loses spaces and line feeds."""
    generic = ("TokenizersBackend", "PreTrainedTokenizerFast")
    if type(tokenizer).__name__ in generic or get_tokenizer_config(path).get("tokenizer_class") not in generic:
        return tokenizer
    of_file = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer if "ByteLevel" in repr(of_file.backend_tokenizer.pre_tokenizer) else of_file


def load_config(path: str, flag: str = "base_model") -> PreTrainedConfig:
    """The configuration of a base model that `flag` named. Raises InputError if it cannot be loaded, or is not that of
    a causal LM."""
    _look_up(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # huggingface_hub checks the values, with errors of its own
        raise InputError(
            f"--{flag} {path}: no model configuration can be loaded{_no_folder(path)}: {_first_line(error)}"
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"--{flag} {path}: transformers has no causal LM of the type {config.model_type}; choose a text-only model"
        )
    if hasattr(config, "rescale_every"):
        # In evaluation, RWKV divides its weights in place: adapters would not fit, and checkpoints would save them so.
        config.rescale_every = 0
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def saved_dtype(path: str) -> torch.dtype:
    """The precision that a model was saved in; float32 if its configuration does not name one."""
    config = load_config(path)
    return config.dtype or config.get_text_config().dtype or torch.float32


def stored_bits(config: PreTrainedConfig) -> int:
    """Bits of a weight as bitsandbytes has stored a model: 4, 8, or 16 where it has not quantized it."""
    stored = getattr(config, "quantization_config", None) or {}
    return 4 if stored.get("load_in_4bit") else 8 if stored.get("load_in_8bit") else 16


def unrounded(state: dict[str, torch.Tensor], path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a model in `dtype`, on the CPU, with the rounding undone that its base got when it was loaded from
    `path`: values that training did not change are those of the base again."""
    published = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()
    whole = {}
    for name, rounded in state.items():
        whole[name] = rounded.to("cpu", dtype, copy=True)
        if name in published:
            exact = published[name]
            part = tuple(map(slice, exact.shape))  # the embedding may have grown
            same = whole[name][part] == exact.to(rounded.dtype)
            whole[name][part] = torch.where(same, exact, whole[name][part])
    return whole


# Model families that are known to exceed the range of float16 (65,504) in a forward or backward pass.
OVERFLOW_FLOAT16 = ("gemma", "gpt_oss", "qwen3_5", "qwen3_moe", "t5")


# In the RuntimeErrors of a cut pytorch_model.bin, of weights that transformers cannot convert, as it reports above, and
# of a size below 0.
OF_BAD_WEIGHTS = ("PytorchStreamReader", "automatic conversion of the weights", "negative dimension")


def load_base(
    path: str,
    quantization: BitsAndBytesConfig | None = None,
    from_scratch: bool = False,
    dtype: torch.dtype | str | None = None,
    embeddings_in_8_bits: bool = True,
) -> PreTrainedModel:
    """A causal LM on this process's device, for training or evaluation.

    Args:
        quantization: how bitsandbytes stores the base; None for no quantization.
        from_scratch: random float32 weights from the configuration, instead of those of the checkpoint.
        dtype: of the weights that are not quantized; "auto" for the type they were saved in, None for `compute_dtype`.
        embeddings_in_8_bits: whether embedding and output head of a quantized base are stored in 8 bits.
    """
    from minionerec.model import architecture, experts, fewer_kernels, int8_rows

    config = load_config(path)
    if getattr(config.get_text_config(), "output_router_logits", False):
        # They are for an auxiliary loss, which no training here uses and which fails with RL's 4-D masks.
        config.get_text_config().output_router_logits = False
    transformers_logging.disable_progress_bar()
    overflows = device.compute_dtype() == torch.float16 and config.model_type.startswith(OVERFLOW_FLOAT16)
    if overflows and os.environ.get("RANK", "0") == "0":
        print(f"warning: {config.model_type} models often overflow float16, which this GPU computes in")
    if from_scratch:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device.local_device())
        architecture.freeze_non_text_modules(model)
        forget_sampling_defaults(model)
        fewer_kernels.use_fewer_kernels(model)
        return model
    if dtype is None:
        dtype = device.compute_dtype(quantization is not None)
    try:
        with experts.quantizers():
            model, found = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                quantization_config=quantization,
                device_map={"": device.local_device()},
                ignore_mismatched_sizes=True,  # so that they are said below
                output_loading_info=True,
            )
    except (OSError, SafetensorError, ValueError, LookupError, EOFError, AssertionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in OF_BAD_WEIGHTS):
            raise  # out of memory, for example
        raise InputError(f"{_damaged_file(path) or path}: the weights cannot be loaded: {_first_line(error)}") from None
    # transformers makes these random.
    random = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if random:
        raise InputError(
            f"{path}: {len(random)} of the weights that its config.json asks for are missing or have another shape, "
            f"such as {random[0]}; take a complete copy of the model"
        )
    architecture.freeze_non_text_modules(model)
    if getattr(model, "is_quantized", False):  # also where it is stored so
        _keep_training_layout(model)
    if quantization is not None:
        if embeddings_in_8_bits:
            int8_rows.quantize_embeddings(model, device.local_device())
        else:
            model.get_input_embeddings().to(device.local_device())
            model.get_output_embeddings().to(device.local_device())
    return_freed_memory()
    forget_sampling_defaults(model)
    fewer_kernels.use_fewer_kernels(model)
    return model


def unquantized_weights(path: str, quantization: BitsAndBytesConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters and buffers that a quantized base keeps as they are, by name: as published, in `dtype`, on the
    CPU. Those of a base that trains are rounded to its compute dtype."""
    model = load_base(path, quantization, dtype=dtype, embeddings_in_8_bits=False)
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor.data.cpu() for name, tensor in tensors if tensor.is_floating_point()}


def forget_sampling_defaults(model: PreTrainedModel) -> None:
    """Keeps only the token ids of a model's generation_config.json.

    The temperature, top_p and repetition penalty of a base are made for chats. They would be saved in checkpoints, and
    programs that decode those would change the probabilities of items, or sample them.
    """
    ids = {name: value for name, value in model.generation_config.to_dict().items() if name.endswith("_token_id")}
    model.generation_config = GenerationConfig(**ids)


def _keep_training_layout(model: nn.Module) -> None:
    """Keeps 4-bit layers in the layout that has a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in place at its first forward pass in evaluation
    mode, into a layout whose matmul has no backward pass: after the first evaluation, layers below it would not train.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def fingerprint(path: str) -> str | None:
    """A digest of the weights of a base, which does not depend on the precision and shards they were saved in.

    It is made of the shape of every tensor in the safetensors files of a folder or hub model, and of some values in
    bfloat16. None if there are no such files. Raises InputError for a damaged one.
    """
    tensors: dict[str, str] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is not a dictionary
                    part = opened.get_slice(name)
                    shape = part.get_shape()
                    count = shape[0] if shape else 0
                    starts = sorted({0, count // 2, max(count - 8, 0)})  # eight rows from each start
                    values = b"".join(_bytes(part[row : row + 8]) for row in starts if count)
                    tensors[name] = f"{name} {shape} {hashlib.sha256(values).hexdigest()}"
        except SafetensorError as error:
            raise InputError(f"{file}: cannot be read, the file is damaged: {error}") from None
    if not tensors:
        return None
    return hashlib.sha256("".join(tensors[name] for name in sorted(tensors)).encode()).hexdigest()[:16]


def share_kept(path: str, start: str, names: Collection[str]) -> float:
    """Of the values of the weights `names` in a folder, the fraction that are those of another folder or hub model,
    rounded alike. Weights that only one of them has, or in another shape, do not count; 0 if none is left."""
    file_of = {}
    for file in _weight_files(start):
        with safe_open(file, "pt") as before:
            file_of.update(dict.fromkeys(before.keys(), file))
    same = total = 0
    for file in _weight_files(path):
        with safe_open(file, "pt") as after:
            for name in set(after.keys()) & set(names) & set(file_of):
                with safe_open(file_of[name], "pt") as before:
                    old, new = before.get_tensor(name), after.get_tensor(name)
                if old.shape == new.shape:
                    same, total = same + int((old.to(new.dtype) == new).sum()), total + new.numel()
    return same / total if total else 0.0


def _weight_files(path: str, whole: str = SAFE_WEIGHTS_NAME, index: str = SAFE_WEIGHTS_INDEX_NAME) -> list[str]:
    """The files of a base, as transformers chooses them: a leftover index next to the file of all weights counts for
    nothing."""

    def found(name: str) -> str | None:
        return cached_file(
            path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )

    if only := found(whole):
        return [only]
    listed = found(index)
    if listed is None:
        return []
    try:
        with open(listed, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"{listed}: is damaged, it does not say which file has which weight") from None
    return [file for file in map(found, names) if file is not None]


def _damaged_file(path: str) -> str | None:
    """The first weight file of a base that cannot be read; None where all can."""
    safe = _weight_files(path)
    for file in safe or _weight_files(path, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        try:
            if safe:
                with safe_open(file, "pt"):
                    pass
            else:
                torch.load(file, "meta", weights_only=True)
        except Exception:  # of unpickling it may be any
            return file
    return None


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def add_sid_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sid_tokens: list[str]) -> list[int]:
    """Adds SID tokens to the tokenizer and rows for them to the model. Returns the ids of the rows to train, sorted:
    those of the SID tokens, and any other row that the model did not have before.

    Tokens that the tokenizer knows keep their ids; each new one becomes a single token. Raises InputError as
    `sid_tokens.add_sid_tokens` does.
    """
    had = model.get_input_embeddings().weight.shape[0]
    add_to_tokenizer(tokenizer, sid_tokens)
    fit_embeddings(model, tokenizer)
    return sorted({*tokenizer.convert_tokens_to_ids(sid_tokens), *range(had, rows_for(tokenizer))})


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Grows the embedding so that every token has a row. It never shrinks: models often have more rows than their
    tokenizer has tokens, and new tokens use the spare rows first."""
    from minionerec.model import int8_rows

    wanted = rows_for(tokenizer)
    if wanted <= model.get_input_embeddings().weight.shape[0]:
        return
    had = [len(second.weight) for second in _second_embeddings(model)]
    if int8_rows.int8_layers(model):
        int8_rows.grow(model, wanted)
    else:
        # transformers' initialization from mean and covariance would take two float32 copies of the embedding.
        model.resize_token_embeddings(wanted, mean_resizing=False)
    # No adapter holds its new rows, which must be the same whenever a checkpoint is loaded.
    for rows, second in zip(had, _second_embeddings(model), strict=True):
        second.weight.data[rows:] = 0


def _second_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The one of Gemma 3n and 4 that every layer adds a part of."""
    return [module for name, module in model.named_modules() if name.endswith("embed_tokens_per_layer")]


def rows_for(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many rows an embedding needs: there may be gaps between the ids of a tokenizer."""
    return max(tokenizer.get_vocab().values()) + 1
