"""LoRA and QLoRA for any causal LM: find the layers, configure, wrap, train the SID rows, report, load.

The functions are called by `sft.py` before training and by `rl.py` before it builds its trainer:

    quantization = quantization_config(use_qlora=True)
    model = load_base(base_model, quantization)
    ids = add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    model = add_lora(model, lora_config(model, ids, lora_r=16, ...), gradient_checkpointing=False)
    print(trainable_report(model))
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import methodcaller

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, TrainableTokensConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from minionerec import modeling
from minionerec.checkpoint import read_run
from minionerec.cli import InputError

# --- Which layers -----------------------------------------------------------------------------------------------------


def meta_model(config, dtype: torch.dtype | None = None):
    """The architecture of a configuration on the meta device: every module, no weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the decoder by full name; the output head is none of them."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def _in_attention(model: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    return any(
        type(model.get_submodule(".".join(parents[:depth]))).__name__.endswith("Attention")
        for depth in range(1, len(parents) + 1)
    )


def _suffixes(wanted: list[str], others: list[str]) -> list[str]:
    """The shortest dotted endings that match all of `wanted` and none of `others` as PEFT matches them."""
    endings = set()
    for name in wanted:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if not any(other == ending or other.endswith(f".{ending}") for other in others):
                endings.add(ending)
                break
    return sorted(endings)


def find_target_modules(model: nn.Module, spec: str = "all") -> list[str]:
    """The names to give LoRA as target modules.

    Args:
        model: a causal LM; one on the meta device will do.
        spec: "all" for every linear layer of the decoder, "qkv" for the attention projections q, k, v and o (whatever
            the architecture calls them, fused or not), or layer names separated by commas.

    Returns:
        names as PEFT matches them: the end of a module's dotted path, sorted.

    Raises InputError for a name that matches no linear layer, listing those there are.
    """
    linear = list(_linear_layers(model))
    if spec == "all":
        return _suffixes(linear, [])
    attention = [name for name in linear if _in_attention(model, name)]
    if spec == "qkv":
        if not attention:
            raise InputError(
                f"--lora_target_modules qkv: {type(model).__name__} has no attention layers that can be recognized; "
                f"name them: {', '.join(_suffixes(linear, []))}"
            )
        return _suffixes(attention, [name for name in linear if name not in attention])
    names = [name.strip() for name in spec.split(",") if name.strip()]
    unmatched = [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in linear)]
    if unmatched or not names:
        raise InputError(
            f"--lora_target_modules {spec!r}: {', '.join(unmatched) or 'nothing'} matches no linear layer of "
            f"{type(model).__name__}; there are all, qkv, {', '.join(_suffixes(linear, []))}"
        )
    return sorted(set(names))


# --- Configurations ---------------------------------------------------------------------------------------------------


def quantization_config(use_qlora: bool = False, load_in_8bit: bool = False) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the frozen base: NF4 with double quantization and bfloat16 products for QLoRA, LLM.int8
    for `load_in_8bit`, None for neither. Source: Dettmers et al., QLoRA (2023) and LLM.int8 (2022)."""
    if use_qlora:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            # FSDP and ZeRO-3 share out what has a floating type; the bits are the same.
            bnb_4bit_quant_storage=torch.bfloat16 if modeling.shares_weights_out() else torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if load_in_8bit else None


def _embedding_names(model: nn.Module) -> list[str]:
    """The module names of the input embedding and, where its weight is its own, of the output head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return [next(name for name, module in model.named_modules() if module is wanted) for wanted in modules]


def lora_config(
    model: nn.Module,
    sid_token_ids: list[int],
    lora_r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    lora_target_modules: str = "all",
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: str = "True",
) -> LoraConfig:
    """The adapter of a model: low-rank updates of the target modules, and the SID rows of the embedding matrices.

    Args:
        model: the base the adapter is for, resized, with its weights or on the meta device.
        sid_token_ids: the rows to train, in the input embedding and, where it is not tied, in the output head.
        init_lora_weights: "True" (B starts at zero), "gaussian" or "orthogonal".

    Source: Hu et al., LoRA (2021); Kalajdzievski, rsLoRA (2023); Liu et al., DoRA (2024).
    """
    targets = find_target_modules(model, lora_target_modules)
    endings = tuple(f".{target}" for target in targets)
    targeted = [module for name, module in _linear_layers(model).items() if f".{name}".endswith(endings)]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=True if init_lora_weights == "True" else init_lora_weights,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targeted),  # GPT-2 stores [in, out]
        trainable_token_indices=dict.fromkeys(_embedding_names(model), sid_token_ids) if sid_token_ids else None,
    )


# --- SID rows ---------------------------------------------------------------------------------------------------------


class SidRows(TrainableTokensLayer):
    """PEFT's trainable token rows with a forward that touches the rows alone.

    PEFT writes the trained rows into a copy of the whole [V, H] matrix on every forward, and its gradient is as large.
    Here the base matrix is used as it is; embeddings of SID tokens are then overwritten by their rows, and so are the
    logits of SID columns. Parameters, names and files stay PEFT's.
    """

    def forward_adapters(self, x: torch.Tensor, active_adapters, *args, **kwargs) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        self._check_overlapping_tokens(active_adapters)
        for adapter in active_adapters:
            # Turned off, the layer overwrites with the base's own rows: the same arithmetic, so that an adapter that
            # has not learnt anything gives the very logits of its base.
            rows = (self.trainable_tokens_original if self.disable_adapters else self.trainable_tokens_delta)[adapter]
            if isinstance(self.base_layer, nn.Embedding):
                result = self._overwrite_embeddings(result, x, rows, adapter)
            else:
                result = self._overwrite_logits(result, x, rows, adapter)
        return result

    def _ids(self, adapter: str, device: torch.device) -> torch.Tensor:
        """The token ids of the rows, [n], kept on the device."""
        cache = self.__dict__.setdefault("_ids_cache", {})
        if (adapter, device) not in cache:
            cache[adapter, device] = torch.tensor(self.token_indices[adapter], device=device)
        return cache[adapter, device]

    def _row_of(self, adapter: str, device: torch.device) -> torch.Tensor:
        """[V], the row of every token id, -1 for those that have none."""
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
        columns = F.linear(hidden, rows.to(hidden.dtype), None if bias is None else bias[ids])
        return result.index_copy(-1, ids, columns.to(result.dtype))


# --- The low-rank update ----------------------------------------------------------------------------------------------


class _LowRankUpdate(torch.autograd.Function):
    """dropout(x) A^T B^T * scale for x [..., in], A [r, in], B [out, r], saving x itself and [..., r].

    Autograd would save a converted and a dropped copy of x beside the dropout's mask. Here the mask is drawn again in
    the backward pass from `seed`, and x is what the neighbouring projections save too.
    """

    @staticmethod
    def forward(ctx, x, a, b, scale: float, dropout: float, seed: int, dtype: torch.dtype):
        ctx.dropout, ctx.seed, ctx.dtype = dropout, seed, dtype
        ctx.scale = scale / _kept_share(dropout)
        dropped = x.to(dtype)
        if dropout:
            dropped = dropped * _kept(x.shape, dropout, seed, x.device)
        low = F.linear(dropped, a.to(dtype))
        ctx.save_for_backward(x, a, b, low)
        return F.linear(low, b.to(dtype)).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        x, a, b, low = ctx.saved_tensors
        dropped = x.to(ctx.dtype)
        if ctx.dropout:
            kept = _kept(x.shape, ctx.dropout, ctx.seed, x.device)
            dropped = dropped * kept
        gradient = gradient.to(ctx.dtype).flatten(0, -2) * ctx.scale
        of_b = gradient.T @ low.flatten(0, -2)
        of_low = gradient @ b.to(ctx.dtype)
        of_a = of_low.T @ dropped.flatten(0, -2)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (of_low @ a.to(ctx.dtype)).view(x.shape)
            of_x = (of_x.mul_(kept) if ctx.dropout else of_x).to(x.dtype)
        return of_x, of_a.to(a.dtype), of_b.to(b.dtype), None, None, None, None


def _kept_share(dropout: float) -> float:
    """1 - dropout as `_kept` has it, in 65,536ths."""
    return 1 - round(dropout * 65536) / 65536


def _draw_seed() -> int:
    """A number of torch's own random state, which gradient checkpointing restores."""
    return int(torch.randint(2**62, ()))


def _kept(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> torch.Tensor:
    """A dropout mask (bool), the same for the same seed. Each random number decides four elements by 16 bits each,
    which a CPU draws several times as fast as one by one."""
    generator = torch.Generator(device).manual_seed(seed)
    count = shape.numel()
    numbers = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    bits = numbers.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    return (bits >= round(dropout * 65536) - 32768).view(shape)


class _LeanForward:
    """PEFT's LoRA layer over a linear layer, whatever stores its weight, with the update above. What PEFT does in other
    ways (DoRA, mixed batches, merged adapters) stays PEFT's."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.lora_variant or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            dropout = getattr(self.lora_dropout[adapter], "p", 0.0) if self.training else 0.0
            seed = _draw_seed() if dropout else 0
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
            update = _LowRankUpdate.apply(x, a, b, self.scaling[adapter], dropout, seed, dtype)
            result = result + update.to(result.dtype)
        return result


def _lean(kind: type) -> type:
    return type(kind.__name__, (_LeanForward, kind), {})


LEAN_LAYERS = {kind: _lean(kind) for kind in (lora.Linear, lora.Linear4bit, lora.Linear8bitLt)}


def use_lean_layers(model: nn.Module) -> None:
    """Gives the layers of a PEFT model their lean forwards, in place: the SID rows' and the low-rank update's.

    Parameters, names and files stay PEFT's.
    """
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = SidRows
        elif type(module) in LEAN_LAYERS and not any(layer.bias is not None for layer in module.lora_B.values()):
            module.__class__ = LEAN_LAYERS[type(module)]


# --- Wrapping ---------------------------------------------------------------------------------------------------------


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
        rows = wrapper.token_adapter
        if rows.tied_adapter is not None:
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
        if "norm" in type(module).__name__.lower():
            dtype = next(module.parameters()).dtype
            module.float().register_forward_hook(partial(_to, dtype))


def _to(dtype: torch.dtype, _module, _args, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


def _wrap(model: nn.Module, config, gradient_checkpointing: bool) -> PeftModel:
    if getattr(model, "is_quantized", False):
        prepare_quantized(model)
    wrapped = _finish(get_peft_model(model, config))
    if gradient_checkpointing:
        wrapped.enable_input_require_grads()
    return wrapped


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


def add_lora(model: nn.Module, config: LoraConfig, gradient_checkpointing: bool = False) -> PeftModel:
    """The model with a new adapter; the base is frozen, and nothing but the adapter trains.

    With `gradient_checkpointing` the embedding output requires gradients, without which no checkpointed layer would
    receive any.
    """
    return _wrap(model, config, gradient_checkpointing)


def train_sid_rows_only(model: nn.Module, sid_token_ids: list[int], gradient_checkpointing: bool = False) -> PeftModel:
    """The model with everything frozen but the SID rows, input and output side (`freeze_LLM`)."""
    config = TrainableTokensConfig(
        task_type=TaskType.CAUSAL_LM, token_indices=sid_token_ids, target_modules=_embedding_names(model)
    )
    return _wrap(model, config, gradient_checkpointing)


def load_adapter(model: nn.Module, path: str, trainable: bool = False) -> PeftModel:
    """The model with the adapter of a checkpoint. Raises InputError where their shapes do not fit."""
    if not os.path.isfile(os.path.join(path, SAFETENSORS_WEIGHTS_NAME)):
        raise InputError(f"adapter {path}: holds no {SAFETENSORS_WEIGHTS_NAME}")
    if getattr(model, "is_quantized", False) and trainable:
        prepare_quantized(model)
    try:
        wrapped = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    except SafetensorError as error:
        raise InputError(f"adapter {path}: its weights cannot be read, the file is damaged: {error}") from None
    except (RuntimeError, ValueError, IndexError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise InputError(
            f"adapter {path} does not fit the base {model.config._name_or_path}: {reason.strip()[:300]}"
        ) from None
    _check_names(wrapped, path)
    return _finish(wrapped)


def load_adapted(
    base_model: str,
    adapter: str,
    tokenizer,
    quantization: BitsAndBytesConfig | None = None,
    trainable: bool = False,
    merge_in: torch.dtype | None = None,
    merge: Callable[[PeftModel], object] = methodcaller("merge_and_unload"),
) -> PeftModel | object:
    """The model of an adapter checkpoint on its base, or, with `merge_in`, what `merge` makes of it on a base of that
    precision: one whole model.

    What was trained on a quantized base is merged into the values that its 4 or 8 bits stand for.
    Raises InputError where the base cannot be loaded, is another one than the adapter was trained on, or has other
    shapes.
    """
    recorded = read_run(adapter).get("base_fingerprint")
    if recorded and recorded != modeling.fingerprint(base_model):
        raise InputError(
            f"adapter {adapter} does not fit the base {base_model}: these are not the weights it was trained on; name "
            "the base it was trained on"
        )
    model = modeling.load_base(base_model, quantization, dtype=None if quantization else merge_in)
    if merge_in is not None and quantization:
        model = model.dequantize(merge_in).to(merge_in)
    modeling.fit_embeddings(model, tokenizer)
    wrapped = load_adapter(model, adapter, trainable)
    return wrapped if merge_in is None else merge(wrapped)


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


# --- Reporting --------------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once, 4-bit ones as the values they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            count = state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def trainable_report(model: nn.Module) -> str:
    """One line: how many parameters train, of how many, in percent."""
    trainable, total = count_parameters(model)
    return f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.3f}%)"
