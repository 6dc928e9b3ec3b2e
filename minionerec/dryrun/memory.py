"""Predicts the peak memory of a training step, and the work of a micro-batch, without its weights.

Forward and backward passes of the model that would train (its adapter, its checkpointing, its label-only loss) run on
fake tensors (`minionerec.dryrun.passes`), and every storage that would be alive is counted. So what an architecture
keeps for the backward pass is measured, on a few layers of each kind (`minionerec.dryrun.depth`). What a quantized base
takes is arithmetic.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import PreTrainedConfig

from minionerec.dryrun.depth import Depth, on_few_layers
from minionerec.dryrun.passes import Measured, Step, Work, measure
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, architecture, int8_rows
from minionerec.process_memory import rss_gb

GB = 1e9
CUDA_CONTEXT = 0.6e9  # the driver and its libraries, roughly; torch.cuda.max_memory_allocated does not count it
# What PyTorch reserves for cuBLAS, which that function does count: 32 MiB for each of two interfaces on Hopper cards,
# less on others. Predictions for an H100 were 0.07 to 0.13 GB too low without it.
CUBLAS_WORKSPACES = 2 * 2**25
# The fraction of freed activations that the C library keeps, as measured: benchmarks/memory.py.
HELD_BACK_ON_CPU = 0.65
# What it keeps for a layer of a quantized base that is recomputed, with gradient checkpointing, as measured.
HELD_BACK_PER_LAYER = 12e6
# The compiled bfloat16 matmuls that `cli.KERNEL_CACHE_LIMITS` keeps on a CPU, as measured.
COMPILED_ON_CPU = 0.1e9


@dataclass
class Prediction:
    """The peak memory of a training on one device by part, in GB (1e9 bytes), how many parameters train, and the work
    of a micro-batch, both passes: of the layers, and of the output head; `forward` is the layers' forward pass."""

    parts: dict[str, float]
    trainable: int
    layers: Work
    head: Work
    forward: Work

    @property
    def total(self) -> float:
        return sum(self.parts.values())


Adapt = Callable[[nn.Module, AdapterFlags, list[int]], nn.Module]


@dataclass
class Planned:
    """A model as it would train, on the meta device.

    Attributes:
        model: with what trains.
        depth: the layers of it that were kept.
        dtype: what matmuls compute in.
        weights, reference: bytes of the base, as it is stored, and with its linear layers in 16 bits.
        dequantized: bytes of the largest weight that a matmul dequantizes.
        quantized: how many weights, and values, of the base are.
        copied: bytes of an embedding that is resized, which makes it a copy on a CPU.
        adapter, gradients, optimizer: bytes of what is added to the base, and for what trains.
        trainable: how many parameters train.
    """

    model: nn.Module
    depth: Depth
    dtype: torch.dtype
    weights: float
    reference: float
    dequantized: int
    quantized: tuple[int, int]
    copied: int
    adapter: int
    gradients: int
    optimizer: float
    trainable: int


def predict(
    config: PreTrainedConfig,
    vocabulary: int,
    sid_token_ids: list[int],
    step: Step,
    flags: AdapterFlags,
    adapt: Adapt,
    on_gpu: bool,
    reference_copy: bool = False,
) -> Prediction:
    """Predicts the memory of a training from the configuration of its base.

    Args:
        vocabulary: entries of the tokenizer with the SID tokens.
        sid_token_ids: the trained rows of an adapter.
        flags: what trains, on how many bits, with which checkpointing.
        adapt: gives the model what trains, as in the run itself: `lora_utils.adapt`.
        on_gpu: 16-bit matmuls, as on a GPU; else float32, as on a CPU. What trains is float32 in both, so full
            fine-tuning on a GPU takes 16 bytes per parameter (weight, gradient, two moments), and autocast's 16-bit
            copy of the weights counts as activations.
        reference_copy: a second, frozen model is held too, with its linear layers in 16 bits.

    Returns:
        the parts weights, adapter, gradients, optimizer, logits, activations and runtime.
    """

    def predicted(shortens: bool) -> Prediction:
        planned = plan(config, vocabulary, sid_token_ids, flags, adapt, on_gpu, shortens)
        # As in the trainers: SFT with recomputed activations keeps none of autocast's copies of weights.
        cached = step.rewarded or not flags.gradient_checkpointing
        measured = run(planned, step, cached)
        runtime = CUDA_CONTEXT + CUBLAS_WORKSPACES if on_gpu else _runtime_on_cpu(planned, measured, flags)
        return _prediction(planned, measured, runtime, reference_copy)

    return on_few_layers(predicted)


def plan(
    config: PreTrainedConfig,
    vocabulary: int,
    sid_token_ids: list[int],
    flags: AdapterFlags,
    adapt: Adapt,
    on_gpu: bool,
    shortens: bool,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Planned:
    """The model that would train, and what its weights take; arguments as in `predict`. `prepare` changes the base
    before the adapter comes. Raises InputError for a base that cannot have the bits."""
    bits, full = flags.bits, flags.method == "full"
    dtype = torch.bfloat16 if on_gpu or bits < 16 else torch.float32
    model = architecture.meta_model(copy.deepcopy(config), torch.float32 if full else dtype)
    depth = Depth(model, shortens)
    config_rows, hidden = model.get_input_embeddings().weight.shape
    if vocabulary > config_rows:
        with torch.device("meta"):
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
    rounded = {id(layer.weight) for layer in architecture.matrices(model).layers.values()}
    quantized = list(architecture.check_quantized(model, bits).values()) if bits < 16 else []
    elsewhere = _quantize_embeddings(model, on_gpu) if bits < 16 else None

    # What the base takes, for all layers.
    base = {id(p): p for p in model.parameters()}
    times, stored = depth.times(model), {id(weight) for weight in quantized}
    reference = sum(
        times[key] * p.numel() * (dtype.itemsize if key in rounded else p.element_size()) for key, p in base.items()
    )
    weights = sum(
        times[key] * (_quantized_bytes(p, bits) if key in stored else p.numel() * p.element_size())
        for key, p in base.items()
        if p is not elsewhere
    )
    # A matmul dequantizes its weight first; an 8-bit one on a CPU to float32.
    width = 4 if bits == 8 and not on_gpu else 2
    dequantized = max((weight.numel() * width for weight in quantized), default=0)
    # A resized embedding is a copy; the other weights are views of the mapped file.
    copied = config_rows * hidden * dtype.itemsize if config_rows < vocabulary and bits == 16 else 0

    # What trains.
    if prepare is not None:
        prepare(model)
    if bits < 16:
        adapters.prepare_quantized(model)
    with torch.device("meta"):
        model = adapt(model, flags, sid_token_ids)
    if flags.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    count = sum(times[key] for key in stored), sum(times[key] * base[key].numel() for key in stored)
    return Planned(
        model, depth, dtype, weights, reference, dequantized, count, copied, *_trained(model, depth, base, flags)
    )


def _trained(
    model: nn.Module, depth: Depth, base: dict[int, nn.Parameter], flags: AdapterFlags
) -> tuple[int, int, float, int]:
    """Bytes of what is not among the parameters of the `base`, of gradients and of the optimizer's states, and how many
    parameters train; for all layers."""
    times = depth.times(model)
    sizes = {id(p): times[id(p)] * p.numel() * p.element_size() for p in model.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return (
        sum(size for key, size in sizes.items() if key not in base),
        sum(sizes[id(p)] for p in trained),
        sum(times[id(p)] * flags.optimizer_bytes(p.numel()) for p in trained),
        sum(times[id(p)] * p.numel() for p in trained),
    )


def _quantize_embeddings(model: nn.Module, on_gpu: bool) -> nn.Parameter | None:
    """Stores the rows of embedding and output head in 8 bits, in place; returns the one that stays on the CPU."""
    int8_rows.quantize_embeddings(model, torch.device("meta"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if on_gpu and isinstance(embedding, int8_rows.Int8Layer) and embedding.packed is not head.packed:
        return embedding.packed
    return None


def _quantized_bytes(weight: torch.Tensor, bits: int) -> int:
    """NF4: half a byte a value, a byte for every 64 and 4 more for every 16,384 (double quantization); LLM.int8: a byte
    a value and 4 for every row."""
    count = weight.numel()
    return count // 2 + count // 64 + 4 * (count // 16384) if bits == 4 else count + 4 * weight.shape[0]


def run(planned: Planned, step: Step, cache_enabled: bool, joined: bool = False) -> Measured:
    """Runs the passes of a step. Raises InputError for an architecture whose shapes depend on values."""
    try:
        return measure(planned.model, step, planned.dtype, planned.depth, cache_enabled, joined)
    except (DynamicOutputShapeException, DataDependentOutputException):
        raise InputError(
            f"--dry_run True: the memory of {planned.model.config.model_type} cannot be predicted without its weights: "
            "its shapes depend on values"
        ) from None


def _runtime_on_cpu(planned: Planned, measured: Measured, flags: AdapterFlags) -> float:
    """What the process holds next to tensors, in bytes."""
    runtime = rss_gb() * GB + HELD_BACK_ON_CPU * measured.kept + planned.copied
    runtime += COMPILED_ON_CPU * (planned.dtype == torch.bfloat16)
    if flags.gradient_checkpointing:
        runtime += len(planned.depth.order) * min(HELD_BACK_PER_LAYER, 2 * planned.dequantized)
    return runtime


def _prediction(planned: Planned, measured: Measured, runtime: float, reference_copy: bool) -> Prediction:
    parts = {
        "weights": planned.weights + (planned.reference if reference_copy else 0),
        "adapter": planned.adapter,
        "gradients": planned.gradients,
        "optimizer": planned.optimizer,
        "logits": measured.of_loss,
        "activations": max(measured.peak - planned.gradients - measured.of_loss, 0) + planned.dequantized,
        "runtime": runtime,
    }
    sizes = {name: size / GB for name, size in parts.items()}
    return Prediction(sizes, planned.trainable, measured.layers, measured.head, measured.forward)
