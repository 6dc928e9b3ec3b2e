"""Measures peak memory and speed of SFT at the shapes of Qwen2 and Qwen2.5, against the prediction of --dry_run.

Every run loads random weights of a real shape with the project's own code and trains on them: forward, backward, AdamW,
label-only loss. The micro-batch is the largest whose prediction fits the target of its size and method; if not even 1
row fits, gradient checkpointing is turned on. bfloat16 on a GPU, float32 on a CPU; memory is
`torch.cuda.max_memory_allocated` on a GPU, the resident set on a CPU.

    python -m benchmarks.memory                                           # all sizes, on a GPU with 80 GB or more
    python -m benchmarks.memory --sizes 0.5B --rows 2 --tokens 240        # on a CPU
    python -m benchmarks.memory --predict_only True                       # no weights, some minutes
    python -m benchmarks.memory --methods qlora --gradient_checkpointing True --rows 1
    python -m benchmarks.memory --lora_r 8 --lora_target_modules qkv      # the adapter of the preset low_memory
"""

import tempfile
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.common import in_fork, in_fresh_process, in_turn, print_json, print_table
from benchmarks.fixtures import SPARE_ROWS, ShapeFlags, save_base, some_of
from benchmarks.sft_step import METHODS, train
from minionerec import cli
from minionerec.flags import AdapterFlags, Flags, above_zero, command, flag, zero_or_more

# From the configurations of Qwen2-0.5B, Qwen2-1.5B, Qwen2.5-3B, Qwen2-7B and Qwen2.5-14B: hidden size, layers, heads,
# key and value heads, feed-forward size, vocabulary, whether head and embedding are tied.
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
}
NAMES = tuple(ShapeFlags.__dataclass_fields__)
# GB, from the guide that this project was built to; LoRA at 7B and 14B on an 8-bit base. QLoRA: the lowest published.
TARGETS: dict[str, dict[str, float]] = {
    "full_response": {"0.5B": 4, "1.5B": 8, "3B": 16, "7B": 32, "14B": 64},
    "lora": {"0.5B": 2, "1.5B": 4, "3B": 8, "7B": 12, "14B": 24},
    "lora8": {"0.5B": 2, "1.5B": 4, "3B": 8, "7B": 12, "14B": 24},
    "qlora": {"0.5B": 1.0, "1.5B": 1.8, "3B": 3, "7B": 5, "14B": 8.5},
}


@dataclass(frozen=True, kw_only=True)
class MemoryFlags(Flags):
    """The models, how they train, and on what."""

    sizes: str = flag(",".join(SHAPES), "some of 0.5B, 1.5B, 3B, 7B, 14B, separated by commas.", some_of(*SHAPES))
    methods: str = flag(
        ",".join(TARGETS), "some of full_response, lora, lora8, qlora, separated by commas.", some_of(*TARGETS)
    )
    rows: int = flag(0, "micro-batch; 0 for the largest of 1 to 16 whose prediction fits the target.", zero_or_more)
    tokens: int = flag(512, "tokens of a row.", above_zero)
    response_tokens: int = flag(5, "tokens of a row that carry loss.", above_zero)
    sids: int = flag(560, "SID tokens that are added.", above_zero)
    repeats: int = flag(3, "timed steps.", above_zero)
    lora_r: int = flag(16, "rank of the adapter.", above_zero)
    lora_target_modules: str = flag("all", "all linear layers, qkv, or names separated by commas.")
    gradient_checkpointing: bool = flag(False, "in all runs, not only where 1 row does not fit without it.")
    predict_only: bool = flag(False, "only print predictions, for a GPU.")

    @property
    def adapter(self) -> dict[str, Any]:
        """The shape of the adapter."""
        return {"lora_r": self.lora_r, "lora_target_modules": self.lora_target_modules}


def predicted(
    flags: MemoryFlags, folder: str, size: str, method: str, on_gpu: bool, rows: int, checkpointing: bool
) -> float:
    """The prediction in GB. On a GPU, it leaves out the driver's context, which PyTorch does not report. On a CPU, it
    includes the libraries and the tokenizer in `folder`, which the process has loaded, as in a dry run."""
    from transformers import Qwen2Config

    import lora_utils
    from minionerec.dryrun.memory import CUDA_CONTEXT, GB, predict
    from minionerec.dryrun.passes import Step
    from minionerec.model import loading

    tokenizer = None if on_gpu else loading.load_tokenizer(folder)
    *numbers, tied = SHAPES[size]
    config = Qwen2Config(**dict(zip(NAMES, numbers, strict=True)), tie_word_embeddings=tied)
    entries = numbers[-1] - SPARE_ROWS + flags.sids
    found = predict(
        config,
        entries,
        list(range(entries - flags.sids, entries)),
        Step(rows, flags.tokens, rows * flags.response_tokens, accumulate=False),
        AdapterFlags(
            use_lora=method in ("lora", "lora8"),
            use_qlora=method == "qlora",
            load_in_8bit=method == "lora8",
            gradient_checkpointing=checkpointing,
            **flags.adapter,
        ),
        lora_utils.adapt,
        on_gpu,
    )
    del tokenizer
    return found.total - (CUDA_CONTEXT / GB if on_gpu else 0)


@command(MemoryFlags)
def memory(flags: MemoryFlags) -> None:
    """Prints one row per size and method."""
    flags.problems().check()

    import torch

    on_gpu = flags.predict_only or torch.cuda.is_available()
    table = []
    for size in flags.sizes.split(","):
        *numbers, tied = SHAPES[size]
        with tempfile.TemporaryDirectory() as folder:
            if not flags.predict_only:
                shape = dict(zip(NAMES, numbers, strict=True))
                in_fork(save_base, folder, shape, tied, "bfloat16" if on_gpu else "float32")
            for method in flags.methods.split(","):
                row = _measured(flags, folder, size, method, on_gpu)
                table.append(row)
                print_table([row])
    for row in table:
        full = next((r for r in table if r["size"] == row["size"] and r["method"] == METHODS["full_response"]), None)
        if full and "rows/s" in full and "rows/s" in row:
            row["times full"] = row["rows/s"] / full["rows/s"]
    print_table(table)
    sizes = {name: getattr(flags, name) for name in ("tokens", "response_tokens", "sids")}
    print_json("memory", **sizes, **flags.adapter, table=table)


def _measured(flags: MemoryFlags, folder: str, size: str, method: str, on_gpu: bool) -> dict[str, Any]:
    """The row of a size and method: the micro-batch that fits, its prediction, and the measurement."""
    target, checkpointing = TARGETS[method][size], flags.gradient_checkpointing

    def prediction(rows: int, checkpointing: bool) -> float:
        settings = (flags, folder, size, method, on_gpu, rows, checkpointing)
        return predicted(*settings) if on_gpu else in_fresh_process(predicted, *settings)

    chosen = flags.rows or 1
    total = prediction(chosen, checkpointing)
    if not flags.rows:
        if total > target and not checkpointing:
            checkpointing, total = True, prediction(1, True)
        while total <= target and chosen < 16 and (larger := prediction(2 * chosen, checkpointing)) <= target:
            chosen, total = 2 * chosen, larger
    row = {
        "size": size,
        "method": METHODS[method],
        "rows": chosen,
        "checkpointing": "yes" if checkpointing else "",
        "target GB": target,
        "predicted GB": total,
    }
    if not flags.predict_only:
        try:
            sizes = chosen, flags.tokens, flags.response_tokens, flags.sids
            run = in_turn(train, [method], flags.repeats, folder, *sizes, checkpointing, flags.adapter)[method]
        except EOFError:  # the process was killed because it ran out of memory
            return {**row, "measured GB": "out of memory"}
        row["measured GB"] = run["peak_gb"]
        if run["loading_gb"] is not None:
            row["while loading GB"] = run["loading_gb"]
        row["off by"] = f"{total / run['peak_gb'] - 1:+.0%}"
        row["rows/s"] = chosen / median(run["steps"])
    return row


if __name__ == "__main__":
    cli.run(memory)
