"""Loading: a base model or checkpoint, its tokenizer, and the SID tokens that a catalogue adds to both."""

import hashlib
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from minionerec.data.sid_tokens import add_sid_tokens as add_to_tokenizer
from minionerec.errors import InputError
from minionerec.model import device


def load_tokenizer(path: str):
    """The tokenizer of a checkpoint; padding falls back to the end-of-sequence token.

    Texts keep their length: a truncation or padding that the checkpoint has switched on is off here. Raises InputError
    where there is none, or one without an end-of-sequence token or a fast implementation.
    """
    try:
        tokenizer = _as_its_file_says(AutoTokenizer.from_pretrained(path), path)
    except Exception as error:  # what `tokenizers` raises at a damaged file has no type of its own
        raise InputError(f"{path}: no tokenizer can be loaded: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise InputError(f"{path}: the tokenizer must be a fast one with an end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _as_its_file_says(tokenizer, path: str):
    """The tokenizer of tokenizer.json where transformers 5 replaced it. Next to a qwen2 config it loads a tokenizer of
    the generic class as Qwen2's, over bytes: a vocabulary without bytes then loses spaces and line feeds."""
    generic = ("TokenizersBackend", "PreTrainedTokenizerFast")
    if type(tokenizer).__name__ in generic or get_tokenizer_config(path).get("tokenizer_class") not in generic:
        return tokenizer
    of_file = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer if "ByteLevel" in repr(of_file.backend_tokenizer.pre_tokenizer) else of_file


def load_config(path: str, flag: str = "base_model"):
    """The configuration of a base model, which `flag` named. Raises InputError where none can be loaded, or where it is
    of no causal LM."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--{flag} {path}: no model configuration can be loaded; there is no such folder with a "
            f"config.json, and no hub model of this name can be reached: {_first_line(error)}"
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"--{flag} {path}: transformers has no causal LM of the type {config.model_type}; take a text-only model"
        )
    if hasattr(config, "rescale_every"):
        # In evaluation RWKV divides weights, where they stand: adapters would not fit them, checkpoints would keep it.
        config.rescale_every = 0
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def saved_dtype(path: str) -> torch.dtype:
    """The precision that a model was saved in, float32 where its configuration does not say."""
    config = load_config(path)
    return config.dtype or config.get_text_config().dtype or torch.float32


def unrounded(state: dict[str, torch.Tensor], path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a model whose base was rounded when it was loaded from `path`, in `dtype`: values that did not
    train are the base's own again. On the CPU."""
    published = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()
    whole = {}
    for name, rounded in state.items():
        whole[name] = rounded.to("cpu", dtype, copy=True)
        if name in published:
            own = published[name]
            part = tuple(map(slice, own.shape))  # the embedding may have grown
            same = whole[name][part] == own.to(rounded.dtype)
            whole[name][part] = torch.where(same, own, whole[name][part])
    return whole


# Families that are known to leave float16's range (65,504) in a forward or backward pass.
OVERFLOW_FLOAT16 = ("gemma", "gpt_oss", "qwen3_5", "qwen3_moe", "t5")


def load_base(path: str, quantization=None, from_scratch: bool = False, dtype: torch.dtype | str | None = None):
    """A causal LM on this process's device, for training or evaluation.

    Args:
        quantization: a `BitsAndBytesConfig`; what it leaves unquantized is then in `compute_dtype`.
        from_scratch: random weights from the configuration instead of those of the checkpoint, in float32.
        dtype: of the weights that are not quantized; "auto" as they were saved, None for `compute_dtype`.
    """
    from minionerec.model import architecture, experts

    config = load_config(path)
    if getattr(config.get_text_config(), "output_router_logits", False):
        # For a loss of the routers that no training here adds, and that fails at RL's 4-D masks.
        config.get_text_config().output_router_logits = False
    transformers_logging.disable_progress_bar()
    overflows = device.compute_dtype() == torch.float16 and config.model_type.startswith(OVERFLOW_FLOAT16)
    if overflows and os.environ.get("RANK", "0") == "0":
        print(f"warning: {config.model_type} models often overflow float16, which this GPU computes in")
    if from_scratch:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device.local_device())
        architecture.freeze_beside_text(model)
        forget_sampling_defaults(model)
        return model
    if dtype is None:
        dtype = device.compute_dtype(quantization is not None)
    try:
        with experts.quantizers():
            model = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                quantization_config=quantization,
                device_map={"": device.local_device()},
            )
    except (OSError, SafetensorError) as error:
        raise InputError(f"--base_model {path}: the weights cannot be loaded: {_first_line(error)}") from None
    architecture.freeze_beside_text(model)
    if quantization is not None:
        _keep_training_layout(model)
    forget_sampling_defaults(model)
    return model


def forget_sampling_defaults(model) -> None:
    """Keeps the token ids of a model's generation_config.json alone.

    A base's temperature, top_p or repetition penalty are made for chats. They would travel into the checkpoints made of
    it, and whatever decodes those would distort the probabilities of items, or sample them.
    """
    ids = {name: value for name, value in model.generation_config.to_dict().items() if name.endswith("_token_id")}
    model.generation_config = GenerationConfig(**ids)


def _keep_training_layout(model) -> None:
    """Keeps 4-bit layers in the layout that gradients can pass through.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in place at its first forward in evaluation
    mode, into a layout whose product has no backward: after the first evaluation a run would train nothing below it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def fingerprint(path: str) -> str | None:
    """Tells the weights of bases apart, in whatever precision and shards they were saved: a digest of the shape and of
    some values, in bfloat16, of every tensor in the safetensors files of a folder or hub model. None where there are
    no such files. Raises InputError for a damaged one."""
    tensors: dict[str, str] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dictionary
                    part = opened.get_slice(name)
                    shape = part.get_shape()
                    count = shape[0] if shape else 0
                    starts = sorted({0, count // 2, max(count - 8, 0)})  # eight rows from each
                    values = b"".join(_bytes(part[row : row + 8]) for row in starts if count)
                    tensors[name] = f"{name} {shape} {hashlib.sha256(values).hexdigest()}"
        except SafetensorError as error:
            raise InputError(f"{file}: cannot be read, the file is damaged: {error}") from None
    if not tensors:
        return None
    return hashlib.sha256("".join(tensors[name] for name in sorted(tensors)).encode()).hexdigest()[:16]


def _weight_files(path: str) -> list[str]:
    def found(name: str) -> str | None:
        return cached_file(
            path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )

    index = found(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        names = [SAFE_WEIGHTS_NAME]
    else:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    return [file for file in map(found, names) if file is not None]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def add_sid_tokens(model, tokenizer, sid_tokens: list[str]) -> list[int]:
    """Adds SID tokens to the tokenizer and rows for them to the model, and returns the ids of the rows to train: those
    of the SID tokens, and any other that the model did not have before. Sorted.

    Tokens the tokenizer knows keep their ids; each new one becomes a single token. Raises InputError as
    `sid_tokens.add_sid_tokens` does.
    """
    had = model.get_input_embeddings().weight.shape[0]
    add_to_tokenizer(tokenizer, sid_tokens)
    fit_embeddings(model, tokenizer)
    return sorted({*tokenizer.convert_tokens_to_ids(sid_tokens), *range(had, len(tokenizer))})


def fit_embeddings(model, tokenizer) -> None:
    """Gives the model a row for every token. The embedding only ever grows: models are often wider than their
    tokenizer, and new tokens take the spare rows first."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        # The mean-and-covariance start that transformers offers costs two float32 copies of the embedding.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
