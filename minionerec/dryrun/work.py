"""How long a step takes on a GPU, as an estimate: its arithmetic, the bytes that it moves, or the host that starts its
kernels, whichever takes longest; a GPU does all three at the same time.

The work is counted in passes on fake tensors that take the paths of a GPU: layers with one input together, a norm as
one kernel (`minionerec.model.groups`, `minionerec.model.fewer_kernels`).
"""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig

from minionerec.cards import Card
from minionerec.dryrun.depth import on_few_layers
from minionerec.dryrun.memory import Adapt, plan, run
from minionerec.dryrun.passes import Measured, Step, Work
from minionerec.flags import AdapterFlags
from minionerec.model import device, fewer_kernels, groups

# Seconds that the host needs for a kernel, with the Python around it: what an H100's SFT and RL steps took at 0.5B,
# divided by the kernels that they started, was 29 to 41 us (benchmarks/LOG.md, section 8).
LAUNCH = 35e-6
# What a training reaches of the rates on a data sheet: large matmuls reach 0.7 to 0.8 of theirs, and not all are large.
OF_MATMULS, OF_BANDWIDTH = 0.6, 0.8
OPTIMIZER_KERNELS = 100  # clipping and a fused step, roughly
# Bytes that a fused AdamW reads for a weight (it, its gradient, two moments) and writes (all but the gradient).
OPTIMIZER_BYTES = 7 * 4
# Of a weight in 4 bits, both passes: kernels that dequantize it, and bytes a value that they read and write. Of one in
# 8 bits: those that quantize what it is multiplied with, multiply and scale.
DEQUANTIZE = {4: (2, 2 * 2.5), 8: (8, 2.0)}


@dataclass(frozen=True)
class Estimate:
    """Seconds that parts of a work take, each by itself."""

    arithmetic: float
    memory: float
    launches: float

    @property
    def seconds(self) -> float:
        """What the whole takes, if the parts overlap."""
        return max(self.arithmetic, self.memory, self.launches)


def on_card(work: Work, card: Card) -> Estimate:
    """How long a card takes, by its data sheet."""
    return Estimate(
        work.flops / (OF_MATMULS * card.tflops * 1e12),
        work.moved / (OF_BANDWIDTH * card.bandwidth * 1e9),
        work.kernels * LAUNCH,
    )


def update(trainable: int) -> Work:
    """An optimizer step on so many parameters."""
    return Work(0, OPTIMIZER_BYTES * trainable, OPTIMIZER_KERNELS)


def count(
    config: PreTrainedConfig, vocabulary: int, sid_token_ids: list[int], step: Step, flags: AdapterFlags, adapt: Adapt
) -> Measured:
    """The work of a micro-batch on a GPU; arguments as in `memory.predict`. Where the paths of a GPU cannot be counted
    without values, those of a CPU are, which start more kernels."""

    def counted(shortens: bool, as_on_gpu: bool) -> Measured:
        settings = config, vocabulary, sid_token_ids, flags, adapt, True, shortens
        planned = plan(*settings, _with_fewer_kernels if as_on_gpu else None)
        measured = run(planned, step, step.rewarded or not flags.gradient_checkpointing, joined=as_on_gpu)
        if not planned.quantized[0]:
            return measured
        (weights, values), (kernels, width) = planned.quantized, DEQUANTIZE[flags.bits]
        both = Work(0, width * values, kernels * weights)
        recomputed = 1.5 if flags.gradient_checkpointing else 1.0
        layers, forward = measured.layers + both.times(recomputed), measured.forward + both.times(0.5)
        return replace(measured, layers=layers, forward=forward)

    try:
        with device.counting_for_gpu(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # to see whether it has moved
            _try_sums()
            return on_few_layers(lambda shortens: counted(shortens, True))
    except Exception:  # whatever an architecture asks of a value
        return on_few_layers(lambda shortens: counted(shortens, False))


def _with_fewer_kernels(model: nn.Module) -> None:
    """Replaces the norms of a model on the meta device as a GPU does; to be tried, they need values."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.to_empty(device="cpu")
            for parameter in module.parameters():
                nn.init.ones_(parameter)
    fewer_kernels.use_fewer_kernels(model)


def _try_sums() -> None:
    """Has `groups` try on real tensors which sums this device has a kernel for."""
    one = torch.ones(16, 16, dtype=torch.bfloat16)
    groups.add_product(torch.ones(16, 16), one, one)
