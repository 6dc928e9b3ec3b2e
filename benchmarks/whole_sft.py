"""Estimates how long SFT of a whole file takes, this project's way and the ordinary one, from measured stretches.

Ordinary is what MiniOneRec does: all weights train, rows in random order are padded on the left, the loss needs the
logits of every position, and an evaluation does the same without gradients. This project's way is LoRA on token trees,
with its own evaluation. Both train the same rows and evaluate after the same fractions of the training. Two processes
take a stretch each in turn, so that other load on the machine slows both: the ordinary way `plain_rows` rows, an update
and as many validation rows; this project's an optimizer step and two evaluation batches. Both are scaled to the file by
the tokens that each way computes (padding included), which are counted exactly. The model has the shape of Qwen2.5-0.5B
and random weights.

    python benchmarks/whole_sft.py --data data/Industrial_and_Scientific
"""

import glob
import os
import sys
import tempfile
from multiprocessing.connection import Connection
from statistics import median

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
from benchmarks.trees import save_base
from minionerec import cli
from minionerec.data.files import count_rows, read_catalogue, read_interactions
from minionerec.data.prompts import load_prompts
from minionerec.errors import Problems
from minionerec.flags import AdapterFlags, check_batch, check_positive


def train(
    connection: Connection,
    way: str,
    base: str,
    files: tuple[str, str, str, str],
    category: str,
    rows: int,
    micro_batch_size: int,
    plain_rows: int,
    cutoff_len: int,
) -> None:
    """Answers each request with the seconds of a stretch: forward and backward passes, the update, validation. At the
    end: peak memory in GB, tokens of the stretch and of the file, the same for validation, and rows and updates of an
    epoch."""
    quiet()
    import numpy as np
    import torch

    import lora_utils
    from minionerec.data.encoding import Encoder
    from minionerec.data.examples import IGNORE, tokenized_dataset
    from minionerec.model import loading
    from minionerec.model.device import compute_dtype, local_device, master_dtype
    from minionerec.training.sft_trainer import step_order, tree_collator, tree_losses
    from minionerec.training.tree_batches import Prefixes, Size, TreeBatches, evaluation_batches

    train_file, eval_file, sid_index_path, item_meta_path = files
    catalogue = read_catalogue(sid_index_path, item_meta_path)
    prompts = load_prompts(category, None, "all")
    torch.manual_seed(0)
    tokenizer = loading.load_tokenizer(base)
    ours = way == "LoRA, token trees"
    flags = AdapterFlags(use_lora=ours)
    model = loading.load_base(base, dtype=None if ours else master_dtype())
    ids = loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    model = lora_utils.adapt(model, flags, ids).train()
    device, dtype = local_device(), compute_dtype()

    def dataset_of(file: str, wording):
        def rows_of(kind: str):
            if kind == "item":
                return catalogue.items_with_text()
            return read_interactions(file, "data", catalogue.sids, wording.need_titles)

        return tokenized_dataset(Encoder(tokenizer, wording, cutoff_len), rows_of, [file, *files[2:]])

    training, validation = dataset_of(train_file, prompts), dataset_of(eval_file, prompts.for_validation())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    # The batches of an epoch, how many tokens each computes, and the stretches to measure.
    if ours:
        prefixes, of_validation = Prefixes(training), Prefixes(validation)
        plan = TreeBatches(prefixes, step_order(prefixes, max(rows // 32, 1), rows, 42), 1, micro_batch_size, rows)
        batches = [part.tolist() for parts in plan.steps() for part in parts if len(part)]
        most = Size(*(micro_batch_size * size for size in prefixes.longest))
        eval_batches = evaluation_batches(of_validation, most)
        sizes, eval_sizes = (
            [p.size(np.array(batch)).nodes for batch in cut]
            for p, cut in ((prefixes, batches), (of_validation, eval_batches))
        )
        stretch, eval_stretch = slice(plan.accumulation), slice(None, None, max(len(eval_batches) - 1, 1))
        collate = tree_collator(model, tokenizer.pad_token_id, device)
    else:
        generator = np.random.default_rng(42)

        def cut(length: np.ndarray, order: np.ndarray) -> tuple[list[list[int]], list[int]]:
            parts = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
            return [part.tolist() for part in parts], [int(len(part) * length[part].max()) for part in parts]

        length, eval_length = (np.array(dataset["length"][:]) for dataset in (training, validation))
        batches, sizes = cut(length, generator.permutation(len(length)))
        eval_batches, eval_sizes = cut(eval_length, np.arange(len(eval_length)))
        stretch = eval_stretch = slice(max(plain_rows // micro_batch_size, 1))

        def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
            width = max(example["length"] for example in examples)
            input_ids = torch.full((len(examples), width), tokenizer.pad_token_id)
            labels, mask = torch.full_like(input_ids, IGNORE), torch.zeros_like(input_ids)
            for row, example in enumerate(examples):
                start = width - example["length"]
                input_ids[row, start:], mask[row, start:] = torch.tensor(example["input_ids"]), 1
                labels[row, start + example["prompt_length"] :] = input_ids[row, start + example["prompt_length"] :]
            return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def loss_of(dataset, batch: list[int]) -> torch.Tensor:
        inputs = {name: tensor.to(device) for name, tensor in collate(dataset.__getitems__(batch)).items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if ours:
                return tree_losses(model, inputs, dtype=dtype)[0].sum() / len(inputs["labels"])
            return model(**inputs, use_cache=False).loss

    def passes(chosen: list[list[int]]) -> None:
        for batch in chosen:
            loss_of(training, batch).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def evaluation() -> None:
        model.eval()
        with torch.no_grad():
            for batch in eval_batches[eval_stretch]:
                loss_of(validation, batch).item()
        model.train()

    def measure() -> tuple[float, float, float]:
        return seconds_of(lambda: passes(batches[stretch])), seconds_of(update), seconds_of(evaluation)

    reset_peak_memory()
    passes(batches[:1])  # not timed: the first one also pays for fresh memory
    update()

    def end() -> dict:
        return {
            "peak_gb": peak_memory_gb(),
            "tokens": (sum(sizes[stretch]), sum(sizes)),
            "eval_tokens": (sum(eval_sizes[eval_stretch]), sum(eval_sizes)),
            "rows": len(training),
            "updates": -(-len(training) // rows),
        }

    answer(connection, measure, end)


def whole_sft(
    data: str = "",
    category: str = "Industrial_and_Scientific",
    rows: int = 256,
    micro_batch_size: int = 8,
    plain_rows: int = 32,
    num_epochs: int = 10,
    eval_step: float = 0.05,
    cutoff_len: int = 512,
    num_hidden_layers: int = 24,
    hidden_size: int = 896,
    num_attention_heads: int = 14,
    num_key_value_heads: int = 2,
    intermediate_size: int = 4864,
    vocab_size: int = 151936,
    repeats: int = 1,
) -> None:
    """Prints seconds and rows/s of SFT on a whole file, with its evaluations, this project's way and the ordinary one.

    Args:
        data: folder that holds train.csv, valid.csv, an .index.json and an .item.json file.
        category: what the items are, for the prompts.
        rows: rows of an optimizer step.
        micro_batch_size: rows of a forward pass, where they go one by one.
        plain_rows: rows, of training and of validation, that the ordinary way takes in a turn.
        num_epochs: passes over the file.
        eval_step: how often both evaluate, as a fraction of the training.
        cutoff_len: tokens of a row at most.
        num_hidden_layers: decoder layers.
        hidden_size: width of the model.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        intermediate_size: width of the feed-forward layers.
        vocab_size: rows of the embedding.
        repeats: turns; medians count.
    """
    problems = Problems()
    check_positive(problems, rows=rows, plain_rows=plain_rows, num_epochs=num_epochs, repeats=repeats)
    check_positive(problems, micro_batch_size=micro_batch_size)
    check_batch(problems, rows, micro_batch_size)
    if not 0 < eval_step <= 1:
        problems.add(f"--eval_step {eval_step}: must be above 0 and at most 1")
    names = ("train.csv", "valid.csv", "*.index.json", "*.item.json")
    found = [sorted(glob.glob(os.path.join(glob.escape(data), name))) for name in names]
    if not all(found):
        problems.add(f"--data {data}: must hold {', '.join(names)}")
    problems.check()
    files = tuple(paths[0] for paths in found)
    catalogue = problems.attempt(read_catalogue, *files[2:])
    for file in files[:2]:
        problems.attempt(count_rows, file, "data", catalogue.sids if catalogue else None)
    problems.check()

    shape = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
    }
    ways = ["full, all logits", "LoRA, token trees"]
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(save_base, folder, files[3], shape)
        settings = (folder, files, category, rows, micro_batch_size, plain_rows, cutoff_len)
        runs = in_turn(train, ways, repeats, *settings)
    table, totals = [], []
    for way, run in runs.items():
        passes, update, evaluation = (median(step[i] for step in run["steps"]) for i in range(3))
        (part, epoch), (eval_part, eval_all) = run["tokens"], run["eval_tokens"]
        training = num_epochs * (passes / part * epoch + update * run["updates"])
        evaluating = evaluation / eval_part * eval_all * round(1 / eval_step)
        totals.append(training + evaluating)
        print(
            f"{way}: {num_epochs} epochs x ({passes:.1f} s / {part:,} tokens x {epoch:,} tokens + {run['updates']:,} "
            f"updates x {update:.2f} s) = {training:,.0f} s; {round(1 / eval_step)} evaluations x {evaluation:.1f} s / "
            f"{eval_part:,} tokens x {eval_all:,} tokens = {evaluating:,.0f} s"
        )
        table.append(
            {
                "way": way,
                "tokens of an epoch": epoch,
                "tokens/s": part / passes,
                "training h": training / 3600,
                "evaluations h": evaluating / 3600,
                "rows/s": num_epochs * run["rows"] / totals[-1],
                "times as fast": totals[0] / totals[-1],
                "peak GB": run["peak_gb"],
            }
        )
    print_table(table)
    print_json("whole_sft", table=table, shape=shape, rows=rows, speedup=totals[0] / totals[1], runs=runs)


if __name__ == "__main__":
    cli.run(whole_sft)
