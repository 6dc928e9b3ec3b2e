"""Measures one SFT step (forward, backward, AdamW update, cleared gradients): rows/s and peak memory in GB.

Each way to train is compared with full fine-tuning with logits at every position, on the same model and batch: two
processes take their steps in turn, so that other load on the machine slows both. The ways are full fine-tuning with
logits at response positions only (`response_logits`), LoRA as PEFT does it (dense SID rows, logits at every position),
this project's LoRA, on a base in its own precision and in 8 bits, and its QLoRA. The model has the shape of Qwen2-0.5B
and random weights; 560 SID tokens are added. Memory is measured from before a process's first step, which is not timed.
float32 on a CPU, bfloat16 on a GPU. There this project's ways are what sft.py trains: token trees, of rows that share
nothing, in passes that are recorded as CUDA graphs. A pair of full fine-tunings takes 25 GB on a CPU, full and LoRA 18.

    python -m benchmarks.sft_step
    python -m benchmarks.sft_step --methods full_response,peft,lora,qlora --rows 16 --repeats 20
"""

import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from benchmarks.common import (
    answer,
    in_fork,
    in_turn,
    peak_memory_gb,
    print_json,
    print_table,
    quiet,
    reset_peak_memory,
    seconds_of,
)
from benchmarks.fixtures import ShapeFlags, save_base, some_of
from minionerec import cli
from minionerec.flags import AdapterFlags, above_zero, command, flag

METHODS = {
    "full": "full, all logits",
    "full_response": "full, response logits",
    "peft": "LoRA by PEFT, all logits",
    "lora": "LoRA",
    "lora8": "LoRA on an 8-bit base",
    "qlora": "QLoRA",
}


@dataclass(frozen=True, kw_only=True)
class StepFlags(ShapeFlags):
    """What a step trains on, and how."""

    sids: int = flag(560, "SID tokens that are added.", above_zero)
    rows: int = flag(4, "rows of a step.", above_zero)
    tokens: int = flag(240, "tokens of a row.", above_zero)
    response_tokens: int = flag(5, "tokens of a row that carry loss.", above_zero)
    methods: str = flag(
        "lora,qlora",
        "some of full_response, peft, lora, lora8, qlora, separated by commas.",
        some_of(*(method for method in METHODS if method != "full")),
    )
    repeats: int = flag(3, "timed steps of a process; medians are reported.", above_zero)


def train(
    connection: Connection,
    method: str,
    folder: str,
    rows: int,
    tokens: int,
    response_tokens: int,
    sids: int,
    gradient_checkpointing: bool = False,
    adapter_flags: dict[str, Any] | None = None,
    as_trained: bool = False,
) -> None:
    """Answers each request with the seconds of a step, and at the end with peak memory in GB, that while the model was
    loaded (on a GPU), and the first loss. `as_trained`: on a GPU, token trees in recorded passes, not rows."""
    quiet()
    import torch
    import torch.nn.functional as F
    from peft import get_peft_model

    import lora_utils
    from minionerec.data.examples import IGNORE
    from minionerec.model import graphs, loading
    from minionerec.model.device import compute_dtype, local_device, master_dtype
    from minionerec.model.token_trees import Shape, pad_to
    from minionerec.training.sft_trainer import recorded_tree_losses, response_logits, tree_collator

    torch.manual_seed(0)
    tokenizer = loading.load_tokenizer(folder)
    quantization = lora_utils.quantization_config(
        AdapterFlags(use_qlora=method == "qlora", load_in_8bit=method == "lora8")
    )
    full = method in ("full", "full_response")
    model = loading.load_base(folder, quantization, dtype=master_dtype() if full else None)
    ids = loading.add_sid_tokens(model, tokenizer, [f"<a_{i}>" for i in range(sids)])
    if method == "peft":
        model = get_peft_model(model, lora_utils.lora_config(model, ids))
    elif method in ("lora", "lora8", "qlora"):
        config = lora_utils.lora_config(model, ids, AdapterFlags(**(adapter_flags or {})))
        model = lora_utils.add_lora(model, config, gradient_checkpointing)
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    device, dtype = local_device(), compute_dtype(quantization is not None)
    input_ids = torch.randint(0, ids[0], (rows, tokens))
    input_ids[:, tokens // 2 :] = torch.tensor(ids)[torch.randint(0, len(ids), (rows, tokens - tokens // 2))]
    labels = input_ids.clone()
    labels[:, : tokens - response_tokens] = IGNORE
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    trees = as_trained and device.type == "cuda" and method not in ("full", "peft")
    if trees:
        graphs.record(model, True)
        examples = [{"input_ids": row, "prompt_length": tokens - response_tokens} for row in input_ids.tolist()]
        inputs = tree_collator(model, tokenizer.pad_token_id, device)(examples)
        inputs = pad_to(inputs, Shape(*inputs["input_ids"].shape, len(inputs["labels"])))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True)
    losses = []

    def step() -> None:
        with torch.autocast(device.type, dtype, dtype != torch.float32, cache_enabled=not gradient_checkpointing):
            if trees:
                loss = recorded_tree_losses(model, inputs, dtype=dtype)[0].mean()
            elif method in ("full", "peft"):
                loss = model(**inputs, use_cache=False).loss
            else:
                logits, targets = response_logits(model, inputs)
                loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    loading_gb = peak_memory_gb() if device.type == "cuda" else None
    reset_peak_memory()
    for _ in range(3 if trees else 1):  # a GPU records the second pass, and replays the third
        step()

    def end() -> dict[str, Any]:
        return {"peak_gb": peak_memory_gb(), "loading_gb": loading_gb, "loss": losses[0]}

    answer(connection, lambda: seconds_of(step), end)


@command(StepFlags)
def sft_step(flags: StepFlags) -> None:
    """Prints rows/s and peak memory of each way to train, against full fine-tuning with all logits."""
    problems = flags.problems()
    if flags.tokens <= flags.response_tokens:
        problems.add(f"--tokens {flags.tokens}: must be greater than --response_tokens")
    problems.check()
    import torch

    # A GPU holds all ways at once; on a CPU, each takes its turns with full fine-tuning only.
    chosen, rows = flags.methods.split(","), flags.rows
    groups = [chosen] if torch.cuda.is_available() else [[method] for method in chosen]
    table, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        in_fork(save_base, folder, flags.shape, True, "float32")
        for group in groups:
            sizes = (rows, flags.tokens, flags.response_tokens, flags.sids)
            runs = in_turn(train, ["full", *group], flags.repeats, folder, *sizes, False, None, True)
            full = runs["full"]
            for name, run in runs.items():
                speed_up = median(f / s for f, s in zip(full["steps"], run["steps"], strict=True))
                saved = 1 - run["peak_gb"] / full["peak_gb"]
                table.append(
                    {
                        "way": METHODS[name],
                        "s/step": median(run["steps"]),
                        "rows/s": rows / median(run["steps"]),
                        "times full": speed_up,
                        "peak GB": run["peak_gb"],
                        "memory saved": f"{saved:.0%}",
                        "first loss": run["loss"],
                    }
                )
                if name != "full":
                    results[name] = {"speed_up": speed_up, "memory_saved": saved, "full": full, name: run}
    print_table(table)
    print_json("sft_step", **flags.to_dict(), results=results)


if __name__ == "__main__":
    cli.run(sft_step)
