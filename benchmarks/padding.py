"""Measures an SFT step whose examples are sorted by length before they are split into micro-batches.

`minionerec.training.row_batches.StepSampler` sorts them so. It is compared with the same step in random order.

    python benchmarks/padding.py --base_model out/base --train_file train.csv \\
        --sid_index_path Industrial_and_Scientific.index.json --item_meta_path Industrial_and_Scientific.item.json
"""

import os
import sys
from collections.abc import Iterable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.common import print_json, print_table, quiet, seconds_of
from minionerec import cli
from minionerec.checkpoint import check_base
from minionerec.data.files import Interaction, Item, count_rows, read_catalogue, read_interactions
from minionerec.data.prompts import load_prompts
from minionerec.errors import InputError, Problems
from minionerec.flags import AdapterFlags, check_batch, check_positive


def padding(
    base_model: str = "",
    train_file: str = "",
    sid_index_path: str = "",
    item_meta_path: str = "",
    category: str = "Industrial_and_Scientific",
    tasks: str = "all",
    batch_size: int = 512,
    micro_batch_size: int = 8,
    cutoff_len: int = 512,
    use_qlora: bool = False,
    steps: int = 3,
) -> None:
    """Prints padding, seconds and the largest difference in gradients of LoRA steps in both orders, on equal examples.

    Args:
        base_model: folder or hub name of the model to start from.
        train_file: CSV of training interactions.
        sid_index_path: JSON of item id to SID tokens.
        item_meta_path: JSON of item id to title and description.
        category: what the items are, for the prompts.
        tasks: all, or task names separated by commas.
        batch_size: rows of an optimizer step.
        micro_batch_size: rows of a forward pass.
        cutoff_len: the most tokens of a row.
        use_qlora: on a base in 4 bits.
        steps: timed steps of each order.
    """
    problems = Problems()
    check_base(problems, base_model)
    check_positive(problems, batch_size=batch_size, micro_batch_size=micro_batch_size, steps=steps)
    check_batch(problems, batch_size, micro_batch_size)
    prompts = problems.attempt(load_prompts, category, None, tasks)
    catalogue = problems.attempt(read_catalogue, sid_index_path, item_meta_path)
    sids = catalogue.sids if catalogue else None
    problems.attempt(count_rows, train_file, "train_file", sids, titles=bool(prompts) and prompts.need_titles)
    problems.check()

    import torch
    import torch.nn.functional as F

    import lora_utils
    from minionerec.data.encoding import Encoder
    from minionerec.data.examples import Collator, tokenized_dataset
    from minionerec.model import loading
    from minionerec.model.device import compute_dtype, local_device
    from minionerec.training.row_batches import StepSampler
    from minionerec.training.sft_trainer import response_logits

    quiet()

    def rows_of(kind: str) -> Iterable[Interaction | Item]:
        if kind == "item":
            return catalogue.items_with_text()
        return read_interactions(train_file, "train_file", sids, prompts.need_titles)

    torch.manual_seed(0)
    tokenizer = loading.load_tokenizer(base_model)
    model = loading.load_base(base_model, lora_utils.quantization_config(AdapterFlags(use_qlora=use_qlora)))
    ids = loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    # Without dropout both orders have the same gradients; dropout masks depend on the shape of a micro-batch.
    model = lora_utils.add_lora(model, lora_utils.lora_config(model, ids, AdapterFlags(lora_dropout=0.0))).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    examples = tokenized_dataset(
        Encoder(tokenizer, prompts, cutoff_len), rows_of, [train_file, sid_index_path, item_meta_path]
    )
    needed = (steps + 1) * batch_size  # the first step is a warm-up
    if len(examples) < needed:
        raise InputError(f"--steps {steps}: needs {needed:,} examples, but there are {len(examples):,}")
    collate, device = Collator(tokenizer.pad_token_id), local_device()
    dtype = compute_dtype(use_qlora)
    sorted_order = list(StepSampler(examples["length"][:], batch_size, seed=0))

    def micro_batches(order: list[int]) -> list[dict[str, torch.Tensor]]:
        starts = range(0, len(order), micro_batch_size)
        return [collate([examples[i] for i in order[start : start + micro_batch_size]]) for start in starts]

    def gradients(batches: list[dict[str, torch.Tensor]]) -> None:
        model.zero_grad()
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits, targets = response_logits(model, batch)
            F.cross_entropy(logits.float(), targets, reduction="sum").backward()

    seconds, padded, tokens = {"random": 0.0, "sorted": 0.0}, {"random": 0, "sorted": 0}, 0
    difference = largest = 0.0
    for step in range(steps + 1):
        longest_first = sorted_order[step * batch_size : (step + 1) * batch_size]
        shuffled = [longest_first[i] for i in torch.randperm(len(longest_first))]
        found = {}
        for name, order in (("random", shuffled), ("sorted", longest_first)):
            batches = micro_batches(order)
            took = seconds_of(lambda batches=batches: gradients(batches))
            found[name] = [parameter.grad.clone() for parameter in trained]
            if step:
                seconds[name] += took
                padded[name] += sum(batch["input_ids"].numel() for batch in batches)
        tokens += sum(examples[i]["length"] for i in longest_first) if step else 0
        for one, other in zip(found["random"], found["sorted"], strict=True):
            difference = max(difference, (one - other).abs().max().item())
            largest = max(largest, one.abs().max().item())
    table = [
        {
            "order in a step": name,
            "s/step": seconds[name] / steps,
            "times as fast": seconds["random"] / seconds[name],
            "padding": f"{1 - tokens / padded[name]:.0%}",
        }
        for name in seconds
    ]
    print_table(table)
    difference /= largest
    print(f"largest difference in gradients: {difference:.1e} of the largest gradient")
    print_json("padding", table=table, rows=batch_size, micro_batch_size=micro_batch_size, difference=difference)


if __name__ == "__main__":
    cli.run(padding)
