"""LoRA and QLoRA for any causal LM: find the layers, configure, wrap, load, report.

The functions are called by `sft.py` before training and by `rl.py` before it builds its trainer:

    from minionerec.data.files import read_catalogue
    from minionerec.flags import AdapterFlags
    from minionerec.model.loading import add_sid_tokens, load_base, load_tokenizer

    flags = AdapterFlags(use_qlora=True, lora_r=16)
    tokenizer = load_tokenizer("out/base")
    model = load_base("out/base", quantization_config(flags))
    sid_token_ids = add_sid_tokens(model, tokenizer, read_catalogue("index.json").sid_tokens)
    model = adapt(model, flags, sid_token_ids)
    print(trainable_report(model))
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from peft import LoraConfig, PeftConfig, PeftModel, TaskType, TrainableTokensConfig, get_peft_model
from peft.tuners import lora
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from minionerec.errors import InputError
from minionerec.flags import AdapterFlags, RunFlags
from minionerec.model import architecture, experts, int8_rows, loading
from minionerec.model.adapted import check_dora, load_adapted, load_checkpoint, quantization_config  # noqa: F401
from minionerec.model.adapters import does_not_fit, join_layers, prepare_quantized, set_up_adapter

DEFAULTS = AdapterFlags()

# --- Which layers -----------------------------------------------------------------------------------------------------


def _in_attention(model: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    return any(
        type(model.get_submodule(".".join(parents[:depth]))).__name__.endswith("Attention")
        for depth in range(1, len(parents) + 1)
    )


def _suffixes(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest dotted endings that match all of `wanted` and none of `others` as PEFT matches them."""
    taken = {ending for name in others for ending in _endings(name)}
    return sorted({next((ending for ending in _endings(name) if ending not in taken), name) for name in wanted})


def _endings(name: str) -> Iterator[str]:
    """For a.b.c: c, b.c, a.b.c."""
    parts = name.split(".")
    return (".".join(parts[-length:]) for length in range(1, len(parts) + 1))


def _chosen(model: nn.Module, spec: str) -> tuple[list[str], list[str]]:
    """The full names of the linear layers and of the expert weights that `spec` means."""
    found = architecture.matrices(model)
    every = [*found.layers, *found.experts]
    if spec == "all":
        return list(found.layers), list(found.experts)
    if spec == "qkv":
        attention = [name for name in found.layers if _in_attention(model, name)]
        if not attention:
            raise InputError(
                f"--lora_target_modules qkv: {type(model).__name__} has no attention layers that can be recognized; "
                f"name them: {', '.join(_suffixes(every, []))}"
            )
        return attention, []
    names = [name.strip() for name in spec.split(",") if name.strip()]
    unmatched = [name for name in names if not any(_matches(name, full) for full in every)]
    if unmatched or not names:
        raise InputError(
            f"--lora_target_modules {spec!r}: {', '.join(unmatched) or 'nothing'} matches no linear layer of "
            f"{type(model).__name__}; choose from all, qkv, {', '.join(_suffixes(every, []))}"
        )
    layers, stacks = (
        [n for n in group if any(_matches(name, n) for name in names)] for group in (found.layers, found.experts)
    )
    return layers, stacks


def _matches(target: str, name: str) -> bool:
    """Whether PEFT matches a target to the full name of a module or parameter."""
    return f".{name}".endswith(f".{target}")


def _taken_for_experts(model: nn.Module, layers: list[str]) -> set[str]:
    """The linear layers that PEFT would treat as experts if they were target modules: it maps the names that experts
    had in transformers 4 to today's parameters, and shared experts and dense layers have the same names."""
    taken = set()
    for leaf in {name.rpartition(".")[2] for name in layers}:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it insists on all the layers that are one parameter today
            taken.add(leaf)
        if config.target_parameters:
            taken.add(leaf)
    return {name for name in layers if name.rpartition(".")[2] in taken}


def find_target_modules(model: nn.Module, spec: str = "all") -> list[str]:
    """The names to give LoRA as target modules.

    Args:
        model: a causal LM, with its weights or on the meta device.
        spec: "all" for every linear layer of the text decoder and its experts, "qkv" for the attention projections q,
            k, v and o (under any name, fused or not), or names separated by commas. Routers are left out, and so are
            layers whose weight the model reads directly.

    Returns:
        names as PEFT matches them: the end of a module's dotted path, sorted.

    Raises InputError for a name that matches nothing; the message lists the names there are.
    """
    layers, _ = _chosen(model, spec)
    wanted = set(layers) - _taken_for_experts(model, layers)
    others = tuple(f"{name}." for name in architecture.non_text_modules(model))  # `lora_config` excludes all of it
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return _suffixes(wanted, (name for name in names if name not in wanted and not f"{name}.".startswith(others)))


def find_target_parameters(model: nn.Module, spec: str = "all") -> list[str]:
    """The names to give LoRA as target parameters, like `find_target_modules`: weights [E, ...] that hold one matrix
    for each of E experts, and the weights of linear layers that PEFT would treat as experts."""
    layers, stacks = _chosen(model, spec)
    wanted = {*stacks, *(f"{name}.weight" for name in _taken_for_experts(model, layers))}
    return _suffixes(wanted, (name for name, _ in model.named_parameters() if name not in wanted))


# --- Configurations ---------------------------------------------------------------------------------------------------


def _embedding_names(model: nn.Module) -> list[str]:
    """The module names of the input embedding and, where its weight is its own, of the output head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return [next(name for name, module in model.named_modules() if module is wanted) for wanted in modules]


def lora_config(model: nn.Module, sid_token_ids: list[int], flags: AdapterFlags = DEFAULTS) -> LoraConfig:
    """The adapter of a model: low-rank updates of the target modules, and the SID rows of the embedding matrices.

    Args:
        model: the base the adapter is for, resized, with its weights or on the meta device.
        sid_token_ids: the rows to train, in the input embedding and, where it is not tied, in the output head.

    Raises InputError for targets that match nothing, or that cannot have what the flags ask for.
    Source: Hu et al., LoRA (2021); Kalajdzievski, rsLoRA (2023); Liu et al., DoRA (2024).
    """
    modules = find_target_modules(model, flags.lora_target_modules)
    parameters = find_target_parameters(model, flags.lora_target_modules)
    layers, stacks = _chosen(model, flags.lora_target_modules)
    if parameters and (flags.use_dora or flags.init_lora_weights == "orthogonal"):
        beyond = "--use_dora True" if flags.use_dora else "--init_lora_weights orthogonal"
        raise InputError(
            f"{beyond}: PEFT cannot do this for {', '.join(parameters)} of {type(model).__name__}, which it adapts as "
            "parameters; drop it, or leave them out with --lora_target_modules qkv"
        )
    settings = flags.lora_settings()
    # A token passes through several experts: together they have the rank of one layer. The update's scale is the same.
    r, alpha = flags.lora_r, flags.lora_alpha
    rank = max(1, r // architecture.experts_per_token(model.config)) if stacks else r
    if rank != r:
        settings |= {"r": rank, "lora_alpha": alpha * (rank / r) ** (0.5 if flags.use_rslora else 1)}
    other = "|".join(re.escape(n) for n in (*modules, *parameters) if not any(_matches(n, stack) for stack in stacks))
    others = "|".join(rf"{re.escape(name)}(\..*)?" for name in architecture.non_text_modules(model))
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        **settings,
        rank_pattern={other: r} if other and rank != r else {},
        alpha_pattern={other: alpha} if other and rank != r else {},
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=others or None,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in layers),  # GPT-2 stores [in, out]
        trainable_token_indices=dict.fromkeys(_embedding_names(model), sid_token_ids) if sid_token_ids else None,
    )


# --- Wrapping ---------------------------------------------------------------------------------------------------------


def _wrapped_by_peft(model: nn.Module, config: PeftConfig, gradient_checkpointing: bool) -> PeftModel:
    if getattr(model, "is_quantized", False):
        prepare_quantized(model)
    dropout = getattr(config, "lora_dropout", 0.0)
    on_parameters = bool(getattr(config, "target_parameters", None))
    if on_parameters:
        config.lora_dropout = 0.0  # PEFT accepts no other for parameters, not even when it loads the adapter
    try:
        with experts.shapes_shown(model):
            wrapped = set_up_adapter(get_peft_model(model, config))
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--use_lora True: PEFT refuses {type(model).__name__}: {reason}") from None
    if on_parameters and dropout:
        for module in wrapped.modules():
            if isinstance(module, lora.LoraLayer):
                module.lora_dropout["default"] = nn.Dropout(dropout)  # our forward applies it
    join_layers(wrapped)
    if gradient_checkpointing:
        wrapped.enable_input_require_grads()
    return wrapped


def add_lora(model: nn.Module, config: LoraConfig, gradient_checkpointing: bool = False) -> PeftModel:
    """The model with a new adapter. The base is frozen, only the adapter trains.

    With `gradient_checkpointing` the output of the embedding requires gradients; otherwise no checkpointed layer would
    receive any.
    """
    return _wrapped_by_peft(model, config, gradient_checkpointing)


def train_sid_rows_only(model: nn.Module, sid_token_ids: list[int], gradient_checkpointing: bool = False) -> PeftModel:
    """The model with only its SID rows trainable, in the embedding and in the output head (`freeze_LLM`)."""
    config = TrainableTokensConfig(
        task_type=TaskType.CAUSAL_LM, token_indices=sid_token_ids, target_modules=_embedding_names(model)
    )
    return _wrapped_by_peft(model, config, gradient_checkpointing)


def adapt(model: nn.Module, flags: AdapterFlags, sid_token_ids: list[int], adapter_path: str = "") -> nn.Module:
    """The model with what `flags.method` trains: a new adapter (lora, qlora), its SID rows only (freeze_LLM), or as it
    is (full). With `adapter_path` the new adapter has the form of the one in that folder, without its values."""
    if flags.adapted:
        if adapter_path:
            return _add_alike(model, flags, adapter_path)
        return add_lora(model, lora_config(model, sid_token_ids, flags), flags.gradient_checkpointing)
    if flags.method == "freeze_LLM":
        return train_sid_rows_only(model, sid_token_ids, flags.gradient_checkpointing)
    return model


def _add_alike(model: nn.Module, flags: AdapterFlags, adapter_path: str) -> PeftModel:
    """The model with a new adapter of the form of the one in a folder. Raises InputError where they do not fit."""
    config = LoraConfig.from_pretrained(adapter_path)
    config.inference_mode, config.lora_dropout = False, flags.lora_dropout
    config.init_lora_weights = True  # other starts read the values of the base
    try:
        return add_lora(model, config, flags.gradient_checkpointing)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        raise does_not_fit(adapter_path, model, config, error) from None


# --- Reporting --------------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. Tied parameters count once, those in 4 or 8 bits as the values they store."""
    packed = {id(layer.packed): layer.weight.shape.numel() for layer in int8_rows.int8_layers(model)}
    trainable, total = 0, sum(packed.values())
    for parameter in model.parameters():
        if id(parameter) in packed:
            continue
        count = parameter.numel()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            count = state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def trainable_report(model: nn.Module) -> str:
    """One line: how many parameters train, of how many, in percent; and what is frozen because text does not use it."""
    trainable, total = count_parameters(model)
    others = architecture.non_text_modules(model.get_base_model() if isinstance(model, PeftModel) else model)
    frozen = f"; frozen, not used for text: {', '.join(others)}" if others else ""
    return f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.3f}%){frozen}"


def check_stored(config: PreTrainedConfig, flags: AdapterFlags, flag: str = "base_model") -> None:
    """Raises InputError where the weights of a base, which `flag` named, are stored in other bits than `flags.method`
    trains on."""
    stored = getattr(config, "quantization_config", None) or {}
    stored_in = stored.get("quant_method", "bitsandbytes")
    if stored_in != "bitsandbytes":
        why = "takes no adapter" if flags.adapted else "does not train"
        raise InputError(f"--{flag}: its weights are stored in {stored_in}, which {why}; take a bfloat16 copy")
    bits = loading.stored_bits(config)
    if bits not in (16, flags.bits):
        method = "--use_qlora True" if bits == 4 else "--use_lora True --load_in_8bit True"
        raise InputError(f"--{flag}: its weights are stored in {bits} bits; train it with {method}")


def check_adapter(config: PreTrainedConfig, flags: AdapterFlags, adapter_path: str | None = None) -> str:
    """`adapter_report` for the configuration of a base, before any weight is loaded: of the adapter in a folder, or of
    a new one.

    Raises InputError where the architecture cannot have the adapter.
    """
    if not (isinstance(flags, RunFlags) and (flags.gpu_memory or flags.gpu)):  # a dry run for a card that is not here
        where = f"adapter {adapter_path}" if adapter_path else "--use_dora True"
        check_dora(flags.use_dora, flags.bits, where)
    model = architecture.meta_model(config)
    chosen = LoraConfig.from_pretrained(adapter_path) if adapter_path else lora_config(model, [], flags)
    report = adapter_report(model, chosen, flags.bits)
    if flags.bits < 16:
        architecture.check_quantized(model, flags.bits)
    return report


def adapter_report(model: nn.Module, config: LoraConfig, bits: int = 16) -> str:
    """One line: which layers get an adapter, which are left out and why, and which are not stored in `bits`.

    Args:
        model: the bare base, with its weights or on the meta device.
        config: of the adapter.
        bits: of the base: 4, 8, or 16 where it is not quantized.
    """
    found = architecture.matrices(model)
    modules, parameters = config.target_modules or (), config.target_parameters or ()
    if isinstance(modules, str):  # an expression for whole names
        chosen = {name for name in found.layers if re.fullmatch(modules, name)}
    else:
        chosen = {name for name in found.layers if any(_matches(t, name) for t in modules)}
    layers = [name for name in found.layers if name in chosen or any(_matches(t, f"{name}.weight") for t in parameters)]
    stacks = [name for name in found.experts if any(_matches(t, name) for t in parameters)]
    report = f"adapters on {len(layers)} of {len(found.layers)} linear layers"
    if found.experts:
        rank = f", rank {config.r} for each expert" if stacks else ""
        report += f" and {len(stacks)} of {len(found.experts)} weights of experts{rank}"
    if found.left_out:
        report += f"; left out: {_counted(found.left_out)}"
    if bits < 16:
        stored = architecture.quantized_weights(model, bits)
        every = {n.removesuffix(".weight"): p for n, p in model.named_parameters(remove_duplicate=False)}
        names = (*found.layers, *found.experts, *found.left_out)
        kept = [name for name in names if not {name, f"{name}.weight"} & set(stored)]
        size, total = (sum(every[name].numel() for name in group) for group in (kept, names))
        unfit = {name: f"bitsandbytes has no {bits} bits for it" for name in kept if name not in found.left_out}
        if kept:
            what = " and ".join(["what is left out"] * bool(found.left_out) + [_counted(unfit)] * bool(unfit))
            report += (
                f"; not in {bits} bits: {what}, {2 * size / 1e9:.2f} GB, {100 * size / total:.1f}% of the matrices"
            )
    return report


def _counted(reasons: dict[str, str]) -> str:
    """Names and their reasons as `2 x mlp.gate (a router), ...`, without the path up to a layer's number."""
    kinds = Counter((re.sub(r"^.*\.\d+\.", "", name), reason) for name, reason in reasons.items())
    return ", ".join(f"{count} x {name} ({reason})" for (name, reason), count in kinds.items())
