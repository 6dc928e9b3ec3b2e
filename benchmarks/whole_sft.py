"""Estimates how long SFT of a whole file takes, this project's way and the ordinary one, from measured stretches.

Ordinary is what MiniOneRec does: all weights train, rows in random order are padded on the left, the loss needs the
logits of every position, and an evaluation does the same without gradients. This project's way is LoRA on token trees,
with its own evaluation. Both train the same rows and evaluate after the same fractions of the training. Two processes
take a stretch each in turn, so that other load on the machine slows both: the ordinary way `plain_rows` rows, an update
and as many validation rows; this project's an optimizer step and two evaluation batches. Both are scaled to the file by
the tokens that each way computes (padding included), which are counted exactly. The model has the shape of Qwen2.5-0.5B
and random weights.

    python -m benchmarks.whole_sft --data data/Industrial_and_Scientific
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

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
from benchmarks.fixtures import ShapeFlags, find_files, save_base, set_up
from minionerec import cli
from minionerec.data.prompts import load_prompts
from minionerec.flags import above_zero, check_batch, command, flag

FILES = ("train.csv", "valid.csv", "*.index.json", "*.item.json")


@dataclass(frozen=True, kw_only=True)
class WholeFlags(ShapeFlags):
    """Which rows train, how long, and the shape of the model."""

    data: str = flag("", "folder that holds train.csv, valid.csv, an .index.json and an .item.json file.")
    category: str = flag("Industrial_and_Scientific", "what the items are, for the prompts.")
    rows: int = flag(256, "rows of an optimizer step.", above_zero)
    micro_batch_size: int = flag(8, "rows of a forward pass, where they go one by one.", above_zero)
    plain_rows: int = flag(
        32, "rows, of training and of validation, that the ordinary way takes in a turn.", above_zero
    )
    num_epochs: int = flag(10, "passes over the file.", above_zero)
    eval_step: float = flag(
        0.05,
        "how often both evaluate, as a fraction of the training.",
        lambda step: None if 0 < step <= 1 else "must be above 0 and at most 1",
    )
    cutoff_len: int = flag(512, "tokens of a row at most.")
    repeats: int = flag(1, "turns; medians count.", above_zero)


def train(connection: Connection, way: str, base: str, files: list[str], flags: WholeFlags) -> None:
    """Answers each request with the seconds of a stretch: forward and backward passes, the update, validation. At the
    end: peak memory in GB, tokens of the stretch and of the file, the same for validation, and rows and updates of an
    epoch."""
    quiet()
    import numpy as np
    import torch

    from minionerec.data.examples import IGNORE
    from minionerec.training.sft_trainer import step_order, tree_collator, tree_losses
    from minionerec.training.tree_batches import Prefixes, Size, TreeBatches, evaluation_batches

    train_file, eval_file, *index_files = files
    rows, micro_batch_size, plain_rows = flags.rows, flags.micro_batch_size, flags.plain_rows
    prompts = load_prompts(flags.category, None, "all")
    ours = way == "LoRA, token trees"
    trained = set_up(base, index_files, "lora" if ours else "full", flags.cutoff_len)
    model, tokenizer = trained.model, trained.tokenizer
    training = trained.dataset(train_file, prompts)
    validation = trained.dataset(eval_file, prompts.for_validation())
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
        losses_of = trained.tree_losses_of(plan)
        collate = tree_collator(model, tokenizer.pad_token_id, trained.device)
        eval_losses_of = trained.losses_of(collate, partial(tree_losses, dtype=trained.dtype))
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

        losses_of = eval_losses_of = trained.losses_of(
            collate, lambda model, batch: (model(**batch, use_cache=False).loss,)
        )

    def passes(chosen: list[list[int]]) -> None:
        for batch in chosen:
            losses, count = losses_of(training.__getitems__(batch))
            (losses.sum() / count if ours else losses).backward()
            del losses  # its graph, which no recording may meet

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def evaluation() -> None:
        model.eval()
        with torch.no_grad():
            for batch in eval_batches[eval_stretch]:
                losses, _ = eval_losses_of(validation.__getitems__(batch))
                losses.sum().item()
        model.train()

    def measure() -> tuple[float, float, float]:
        return seconds_of(lambda: passes(batches[stretch])), seconds_of(update), seconds_of(evaluation)

    reset_peak_memory()
    # Not timed: the first pass also pays for fresh memory, and a GPU records a shape when it comes for the second time.
    for _ in range(3 if trained.device.type == "cuda" else 1):
        passes(batches[stretch if trained.device.type == "cuda" else slice(1)])
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


@command(WholeFlags)
def whole_sft(flags: WholeFlags) -> None:
    """Prints seconds and rows/s of SFT on a file with its evaluations, this project's way and the ordinary one."""
    problems = flags.problems()
    check_batch(problems, flags.rows, flags.micro_batch_size)
    files = find_files(problems, flags.data, *FILES)
    ways = ["full, all logits", "LoRA, token trees"]
    with tempfile.TemporaryDirectory() as folder:
        in_fork(save_base, folder, flags.shape, True, None, files[3])
        runs = in_turn(train, ways, flags.repeats, folder, files, flags)
    table, totals, num_epochs, evaluations = [], [], flags.num_epochs, round(1 / flags.eval_step)
    for way, run in runs.items():
        passes, update, evaluation = (median(step[i] for step in run["steps"]) for i in range(3))
        (part, epoch), (eval_part, eval_all) = run["tokens"], run["eval_tokens"]
        training = num_epochs * (passes / part * epoch + update * run["updates"])
        evaluating = evaluation / eval_part * eval_all * evaluations
        totals.append(training + evaluating)
        print(
            f"{way}: {num_epochs} epochs x ({passes:.1f} s / {part:,} tokens x {epoch:,} tokens + {run['updates']:,} "
            f"updates x {update:.2f} s) = {training:,.0f} s; {evaluations} evaluations x {evaluation:.1f} s / "
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
    print_json("whole_sft", table=table, shape=flags.shape, rows=flags.rows, speedup=totals[0] / totals[1], runs=runs)


if __name__ == "__main__":
    cli.run(whole_sft)
