"""Predicts the peak memory of a training step, and the work of its matmuls, without its weights.

Forward and backward passes of the model that would train (its adapter, its checkpointing, its label-only loss) run on
fake tensors, which have shapes but no storage, and every storage that would be alive is counted. So what an
architecture keeps for the backward pass is measured, on a few layers of each kind (`minionerec.dryrun.depth`). What a
quantized base takes is arithmetic.
"""

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig, masking_utils
from transformers.integrations import moe

from minionerec.dryrun.depth import BEFORE, HEAD, Depth, Piece, whole_where_needed
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, architecture, int8_rows, low_rank
from minionerec.model.token_trees import edge_losses
from minionerec.process_memory import rss_gb
from minionerec.training.logprobs import token_logps

GB = 1e9
CUDA_CONTEXT = 0.6e9  # the driver and its libraries, roughly; torch.cuda.max_memory_allocated does not count it
# What PyTorch reserves for cuBLAS, which that function does count: 32 MiB for each of two interfaces on Hopper cards,
# less on others. Predictions for an H100 were 0.07 to 0.13 GB too low without it.
CUBLAS_WORKSPACES = 2 * 2**25
# The fraction of freed activations that the C library keeps, as measured: benchmarks/memory.py.
HELD_BACK_ON_CPU = 0.65
# What it keeps for a layer of a quantized base that is computed again, with gradient checkpointing, as measured.
HELD_BACK_PER_LAYER = 12e6
# The compiled bfloat16 matmuls that `cli.KERNEL_CACHE_LIMITS` keeps on a CPU, as measured.
COMPILED_ON_CPU = 0.1e9


@dataclass
class Step:
    """What a training step is made of.

    Attributes:
        rows, tokens: shape of the largest micro-batch, padding included.
        response_tokens: its positions that the output head runs on.
        shared: the rows hold token trees, such as several completions after one prompt, under a mask of [tokens,
            tokens] for each.
        accumulate: whether gradients of an earlier micro-batch are there already.
        rewarded: the loss is RL's, on log-probabilities.
        trees: the loss is SFT's on token trees.
    """

    rows: int
    tokens: int
    response_tokens: int
    shared: bool = False
    accumulate: bool = True
    rewarded: bool = False
    trees: bool = False


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as anything holds them, and the work of
    matmuls. Storages of `before` do not count, since their views take no new memory."""

    def __init__(self, before: list[torch.Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.pieces = [Piece(BEFORE)]
        self.before = [tensor.untyped_storage() for tensor in before]
        self.known: dict[int, object] = {id(storage): None for storage in self.before}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.pieces[-1].flops += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.known:
            return
        # Allocators hand out blocks of 512 bytes.
        size = math.ceil(storage.nbytes() / 512) * 512
        made_in = self.pieces[-1]

        def gone(_: object) -> None:
            del self.known[key]
            self.bytes -= size
            self.pieces[-1].free(size, made_in)

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        made_in.add(size)

    def start(self, phase: str, place: int = -1) -> None:
        """Starts another piece of the step: a layer, or what runs around the layers."""
        self.pieces.append(Piece(phase, place))


def _without_storage(model: nn.Module) -> None:
    """Gives a model on the meta device fake parameters and buffers, in place; call it under FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                module._parameters[name] = made[id(tensor)]
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _quantized_bytes(weight: torch.Tensor, bits: int) -> int:
    """NF4: half a byte a value, a byte for every 64 and 4 more for every 16,384 (double quantization); LLM.int8: a byte
    a value and 4 for every row."""
    count = weight.numel()
    return count // 2 + count // 64 + 4 * (count // 16384) if bits == 4 else count + 4 * weight.shape[0]


@dataclass
class Prediction:
    """The peak memory of a training on one device by part, in GB (1e9 bytes), how many parameters train, and the
    floating-point operations of the matmuls of a micro-batch, both passes: of the layers, and of the output head."""

    parts: dict[str, float]
    trainable: int
    flops: int
    head_flops: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())


Adapt = Callable[[nn.Module, AdapterFlags, list[int]], nn.Module]


@whole_where_needed
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
    method, bits = flags.method, flags.bits
    dtype = torch.bfloat16 if on_gpu or bits < 16 else torch.float32
    model = architecture.meta_model(copy.deepcopy(config), torch.float32 if method == "full" else dtype)
    depth = Depth(model)
    config_rows, hidden = model.get_input_embeddings().weight.shape
    if vocabulary > model.get_input_embeddings().weight.shape[0]:
        with torch.device("meta"):
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
    rounded = {id(layer.weight) for layer in architecture.matrices(model).layers.values()}
    quantized = architecture.quantized_weights(model, bits).values() if bits < 16 else ()
    stored = {id(weight) for weight in quantized}
    elsewhere = None
    if bits < 16:
        int8_rows.quantize_embeddings(model, torch.device("meta"))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if on_gpu and isinstance(embedding, int8_rows.Int8Layer) and embedding.packed is not head.packed:
            elsewhere = embedding.packed  # it stays on the CPU
    base_weights = {id(p): p for p in model.parameters()}
    times = depth.times(model)
    reference = sum(
        times[key] * p.numel() * (dtype.itemsize if key in rounded else p.element_size())
        for key, p in base_weights.items()
    )
    weights = sum(
        times[key] * (_quantized_bytes(p, bits) if key in stored else p.numel() * p.element_size())
        for key, p in base_weights.items()
        if p is not elsewhere
    )
    # A matmul dequantizes its weight first; an 8-bit one on a CPU to float32.
    width = 4 if bits == 8 and not on_gpu else 2
    dequantized = max((weight.numel() * width for weight in quantized), default=0)
    if bits < 16:
        adapters.prepare_quantized(model)
    with torch.device("meta"):
        model = adapt(model, flags, sid_token_ids)
    if flags.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    times = depth.times(model)
    sizes = {id(p): times[id(p)] * p.numel() * p.element_size() for p in model.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_bytes = sum(sizes[id(p)] for p in trained)
    adapter = sum(size for key, size in sizes.items() if key not in base_weights)
    try:
        # As in the trainers: SFT with recomputed activations keeps none of autocast's copies of weights.
        peak, kept, loss, flops, head_flops = _run(
            model, step, dtype, depth, cache_enabled=step.rewarded or not flags.gradient_checkpointing
        )
    except (DynamicOutputShapeException, DataDependentOutputException):
        raise InputError(
            f"--dry_run True: the memory of {config.model_type} cannot be predicted without its weights: its shapes "
            "depend on values"
        ) from None
    if on_gpu:
        runtime = CUDA_CONTEXT + CUBLAS_WORKSPACES
    else:
        # A resized embedding is a copy; the other weights are views of the mapped file.
        resized = config_rows < vocabulary and bits == 16
        runtime = rss_gb() * GB + HELD_BACK_ON_CPU * kept + resized * config_rows * hidden * dtype.itemsize
        runtime += COMPILED_ON_CPU * (dtype == torch.bfloat16)
        if flags.gradient_checkpointing:
            runtime += len(depth.order) * min(HELD_BACK_PER_LAYER, 2 * dequantized)
    if reference_copy:
        weights += reference
    parts = {
        "weights": weights,
        "adapter": adapter,
        "gradients": trained_bytes,
        "optimizer": sum(times[id(p)] * flags.optimizer_bytes(p.numel()) for p in trained),
        "logits": loss,
        "activations": max(peak - trained_bytes - loss, 0) + dequantized,
        "runtime": runtime,
    }
    trainable = sum(times[id(p)] * p.numel() for p in trained)
    return Prediction({name: size / GB for name, size in parts.items()}, trainable, flops, head_flops)


def cache_gb(
    config: PreTrainedConfig, rows: int, tokens: int, beams: int, completion_tokens: int, on_gpu: bool
) -> float:
    """What constrained beam search holds besides the weights, in GB: keys and values of the prompts and of the beams,
    and the widest activations of the prefill."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = 2 if on_gpu else 4
    cached = 2 * text.num_hidden_layers * heads * width * rows * (tokens + beams * completion_tokens)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return (cached + rows * tokens * (3 * inner + 4 * text.hidden_size)) * size / GB


def _run(
    model: nn.Module, step: Step, dtype: torch.dtype, depth: Depth, cache_enabled: bool
) -> tuple[int, int, int, int, int]:
    """(peak bytes of forward and backward passes, gradients included; bytes that the first forward pass keeps up to the
    output head; bytes that the head and the loss add; FLOPs of a micro-batch in the layers, and in the head), all for
    the full depth that `model` was cut from."""
    model.train()
    # Replaces what depends on values, which fake tensors lack: the seed of a dropout mask, the search for packed rows.
    with (
        mock.patch.object(low_rank, "_draw_seed", lambda: 0),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None),
        mock.patch.object(moe, "_grouped_mm", _of_one_expert),  # fake tensors support it only in bfloat16
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        _without_storage(model)
        ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
        inputs = {"input_ids": ids}
        if step.shared:
            inputs["attention_mask"] = torch.zeros(step.rows, 1, step.tokens, step.tokens, dtype=dtype)
            inputs["position_ids"] = ids
        alive = _Alive([*model.parameters(), *model.buffers(), *inputs.values()])
        watch = model.get_output_embeddings().register_forward_pre_hook(lambda *_: alive.start(HEAD))
        with alive, depth.watch(alive):
            for micro_batch in range(2 if step.accumulate else 1):
                if micro_batch:
                    alive.start(BEFORE)
                with torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16, cache_enabled):
                    logits = _logits(model, inputs, step.response_tokens)
                    first = ids.new_zeros(len(logits))
                    if step.rewarded:
                        loss = token_logps(logits.float() / 1.0, first, first, first.bool())[0].sum()
                    elif step.trees:
                        loss = edge_losses(logits, first, first).sum()
                    else:
                        loss = F.cross_entropy(logits.float(), first)
                    of_loss = alive.pieces[-1].growth
                alive.start(HEAD)  # autocast's copies of all layers are gone, and what follows starts from there
                loss.backward()
                del logits, loss
        watch.remove()
    peak = kept = at = 0
    flops = {True: 0, False: 0}
    for piece in depth.full(alive.pieces):
        flops[piece.phase == HEAD] += piece.flops
        kept = kept or at * (piece.phase == HEAD)
        peak = max(peak, at + piece.peak)
        at += piece.growth
    micro_batches = 2 if step.accumulate else 1
    return peak, kept, of_loss, flops[False] // micro_batches, flops[True] // micro_batches


def _of_one_expert(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """All rows [S, I] times the first of the weights [E, I, O]: costs what each row times its own expert costs."""
    with torch.autocast("cpu", enabled=False):
        return x.to(weight.dtype) @ weight[0]


def _logits(model: nn.Module, inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """The logits of `count` positions. How many a mask picks depends on its values."""

    def first(_module: nn.Module, args: tuple) -> tuple:
        return (args[0].flatten(0, -2)[:count], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(first)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
