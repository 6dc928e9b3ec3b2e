"""Measures one SFT step (forward, backward, AdamW update, cleared gradients): rows/s and peak memory in GB.

Each way to train is compared with full fine-tuning with logits at every position, on the same model and batch: two
processes take their steps in turn, so that other load on the machine slows both. The ways are full fine-tuning with
logits at response positions only (`response_logits`), LoRA as PEFT does it (dense SID rows, logits at every position),
this project's LoRA, on a base in its own precision and in 8 bits, and its QLoRA. The model has the shape of Qwen2-0.5B
and random weights; 560 SID tokens are added. Memory is measured from before a process's first step, which is not timed.
float32 on a CPU, bfloat16 on a GPU. A pair of full fine-tunings takes 25 GB on a CPU, full and LoRA 18 GB.

    python benchmarks/sft_step.py
    python benchmarks/sft_step.py --methods full_response,peft,lora,qlora --rows 16 --repeats 20
"""

import os
import sys
import tempfile
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.common import (
    answer,
    in_fresh_process,
    in_turn,
    peak_memory_gb,
    print_json,
    print_table,
    quiet,
    reset_peak_memory,
    seconds_of,
)
from minionerec import cli
from minionerec.errors import Problems
from minionerec.flags import AdapterFlags, check_positive

METHODS = {
    "full": "full, all logits",
    "full_response": "full, response logits",
    "peft": "LoRA by PEFT, all logits",
    "lora": "LoRA",
    "lora8": "LoRA on an 8-bit base",
    "qlora": "QLoRA",
}

SPARE_ROWS = 271  # how many more rows than tokens Qwen2-0.5B has


def save_base(folder: str, shape: dict[str, int], tied: bool = True, dtype: str = "float32") -> None:
    """Writes a Qwen2 model with random weights, and a tokenizer that leaves as many spare rows as Qwen2-0.5B has."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, set_seed

    from minionerec.model.device import local_device

    set_seed(42)
    config = Qwen2Config(**shape, tie_word_embeddings=tied)
    with local_device():  # a CPU needs minutes for the random weights of a large model
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    entries = {f"t{i}": i for i in range(max(shape["vocab_size"] - SPARE_ROWS, 2))}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="t1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t0").save_pretrained(folder)


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
) -> None:
    """Answers each request with the seconds of a step, and at the end with peak memory in GB, that while the model was
    loaded (on a GPU), and the first loss."""
    quiet()
    import torch
    import torch.nn.functional as F
    from peft import get_peft_model

    import lora_utils
    from minionerec.data.examples import IGNORE
    from minionerec.model import loading
    from minionerec.model.device import compute_dtype, local_device, master_dtype
    from minionerec.training.sft_trainer import response_logits

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
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True)
    losses = []

    def step() -> None:
        with torch.autocast(device.type, dtype, dtype != torch.float32, cache_enabled=not gradient_checkpointing):
            if method in ("full", "peft"):
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
    step()

    def end() -> dict[str, Any]:
        return {"peak_gb": peak_memory_gb(), "loading_gb": loading_gb, "loss": losses[0]}

    answer(connection, lambda: seconds_of(step), end)


def sft_step(
    hidden_size: int = 896,
    num_hidden_layers: int = 24,
    num_attention_heads: int = 14,
    num_key_value_heads: int = 2,
    intermediate_size: int = 4864,
    vocab_size: int = 151936,
    sids: int = 560,
    rows: int = 4,
    tokens: int = 240,
    response_tokens: int = 5,
    methods: str = "lora,qlora",
    repeats: int = 3,
) -> None:
    """Prints rows/s and peak memory of each way to train, against full fine-tuning with all logits.

    Args:
        hidden_size: width of the model.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        intermediate_size: width of the feed-forward layers.
        vocab_size: rows of the embedding before the SID tokens are added.
        sids: SID tokens that are added.
        rows: rows of a step.
        tokens: tokens of a row.
        response_tokens: tokens of a row that carry loss.
        methods: some of full_response, peft, lora, lora8, qlora, separated by commas.
        repeats: timed steps of a process; medians are reported.
    """
    problems = Problems()
    check_positive(problems, rows=rows, tokens=tokens, response_tokens=response_tokens, repeats=repeats)
    check_positive(problems, sids=sids, vocab_size=vocab_size)
    chosen = [name.strip() for name in methods.split(",")]
    known = [method for method in METHODS if method != "full"]
    problems += [f"--methods {name!r}: choose from {', '.join(known)}" for name in chosen if name not in known]
    if tokens <= response_tokens:
        problems.add(f"--tokens {tokens}: must be greater than --response_tokens")
    problems.check()
    shape = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
    }
    import torch

    # A GPU holds all ways at once; on a CPU, each takes its turns with full fine-tuning only.
    groups = [chosen] if torch.cuda.is_available() else [[method] for method in chosen]
    table, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(save_base, folder, shape)
        for group in groups:
            runs = in_turn(train, ["full", *group], repeats, folder, rows, tokens, response_tokens, sids)
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
    print_json("sft_step", shape=shape, sids=sids, rows=rows, tokens=tokens, repeats=repeats, results=results)


if __name__ == "__main__":
    cli.run(sft_step)
