"""Measures SFT steps on real rows whose common beginnings are computed once (minionerec/model/token_trees.py), against
the same steps with every row by itself: seconds, peak memory in GB, losses.

The model has the shape of Qwen2.5-0.5B with fewer layers, random weights, and a tokenizer that is trained on the data's
own text. Processes take the same steps in turn, so that whatever else the machine does slows all, after a micro-batch
that is not timed. `trees` cuts the steps into the micro-batches of sft.py, which a GPU records as CUDA graphs, `rows`
into those of `--pack_rows 0`: sorted by length. `random` pads rows in random order. Dropout is 0, so that all have the
same losses. Memory counts from before what is not timed.

    python -m benchmarks.trees --data data/Industrial_and_Scientific
    python -m benchmarks.trees --data data/Industrial_and_Scientific --rows 512 --num_hidden_layers 4 --repeats 2
    python -m benchmarks.trees --data data/Industrial_and_Scientific --ways random,rows --methods lora --rows 512
"""

import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
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
from benchmarks.fixtures import ShapeFlags, find_files, save_base, set_up, some_of
from minionerec import cli
from minionerec.data.prompts import load_prompts
from minionerec.flags import above_zero, check_batch, command, flag

WAYS = ("random", "rows", "trees")


@dataclass(frozen=True, kw_only=True)
class TreesFlags(ShapeFlags):
    """Which rows train, how they are cut, and the shape of the model."""

    data: str = flag("", "folder that holds train.csv, an .index.json and an .item.json file.")
    category: str = flag("Industrial_and_Scientific", "what the items are, for the prompts.")
    tasks: str = flag("all", "all, or task names separated by commas.")
    methods: str = flag("lora,full", "some of lora, full, qlora, with commas.", some_of("lora", "full", "qlora"))
    ways: str = flag("rows,trees", "some of random, rows, trees; ratios are against the first.", some_of(*WAYS))
    rows: int = flag(256, "rows of an optimizer step.", above_zero)
    micro_batch_size: int = flag(8, "rows of a forward pass, where they go one by one.", above_zero)
    pack_rows: int = flag(
        -1,
        "rows that share much, such as a user's, in one step at most; -1 for a 32nd of rows, as in sft.py.",
        lambda rows: None if rows > 0 or rows == -1 else "must be above 0, or -1",
    )
    cutoff_len: int = flag(512, "tokens of a row at most.")
    num_hidden_layers: int = flag(6, "decoder layers; Qwen2.5-0.5B has 24.")
    repeats: int = flag(1, "timed steps of a process; medians count.", above_zero)


def train(connection: Connection, way: str, method: str, base: str, files: list[str], flags: TreesFlags) -> None:
    """Takes a step whenever asked, answers with its seconds, at the end with peak memory in GB, the losses, and tokens
    of the timed steps: of the rows, and computed."""
    quiet()
    import numpy as np
    import torch

    from minionerec.data.examples import Collator
    from minionerec.training.sft_trainer import row_losses, step_order
    from minionerec.training.tree_batches import Prefixes, TreeBatches

    train_file, *index_files = files
    trained = set_up(base, index_files, method, flags.cutoff_len, dropout=0.0)
    model, tokenizer = trained.model, trained.tokenizer
    dataset = trained.dataset(train_file, load_prompts(flags.category, None, flags.tasks))
    prefixes, rows, micro_rows = Prefixes(dataset), flags.rows, flags.micro_batch_size
    pack_rows = max(rows // 32, 1) if flags.pack_rows == -1 else flags.pack_rows
    plan = TreeBatches(prefixes, step_order(prefixes, pack_rows, rows, 42), 1, micro_rows, rows)
    if way == "trees":
        losses_of = trained.tree_losses_of(plan)
    else:
        losses_of = trained.losses_of(Collator(tokenizer.pad_token_id), row_losses)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    responses = np.array(dataset["length"][:]) - np.array(dataset["prompt_length"][:])
    generator = np.random.default_rng(42)
    steps, step_losses, counts = plan.steps(), [], []

    def micro_batches() -> list[np.ndarray]:
        parts = next(steps)
        of_step = np.concatenate(parts)
        computed = sum(prefixes.size(part).nodes for part in parts)
        if way != "trees":
            longest_first = np.argsort(-prefixes.length[of_step], kind="stable")
            order = longest_first if way == "rows" else generator.permutation(len(of_step))
            parts = np.split(of_step[order], range(micro_rows, len(of_step), micro_rows))
            computed = sum(len(part) * int(prefixes.length[part].max()) for part in parts)
        counts.append((int(prefixes.length[of_step].sum()), computed))
        return parts

    def step() -> None:
        found, parts = 0, micro_batches()
        labels = int(responses[np.concatenate(parts)].sum())
        total = torch.zeros((), device=trained.device)
        for part in parts:
            losses, count = losses_of(dataset.__getitems__(part.tolist()))
            loss = losses.sum() / labels
            loss.backward()
            total, found = total + loss.detach(), found + count
            del losses, loss  # their graph, which no recording may meet
        if found != labels:
            raise RuntimeError(f"{found} of {labels} response tokens were learned from")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(total.item())

    def warm_up() -> None:
        """One micro-batch, whose gradients are dropped. A GPU records a shape of token trees when it comes for the
        second time, so it gets all micro-batches of two steps, three times."""
        parts = [part for parts in islice(plan.steps(), 2) for part in parts] * 3
        if way != "trees" or trained.device.type != "cuda":
            parts = [parts[0][:micro_rows]]
        for part in parts:
            losses, _ = losses_of(dataset.__getitems__(part.tolist()))
            losses.sum().backward()
            del losses  # its graph, which no recording may meet
        optimizer.zero_grad()

    reset_peak_memory()
    warm_up()

    def end() -> dict:
        tokens, computed = (sum(count[i] for count in counts) / len(counts) for i in (0, 1))
        return {"peak_gb": peak_memory_gb(), "losses": step_losses, "tokens": tokens, "computed": computed}

    answer(connection, lambda: seconds_of(step), end)


@command(TreesFlags)
def trees(flags: TreesFlags) -> None:
    """Prints seconds, peak memory and losses of SFT steps with shared beginnings against rows one by one."""
    problems = flags.problems()
    check_batch(problems, flags.rows, flags.micro_batch_size)
    files = find_files(problems, flags.data, "train.csv", "*.index.json", "*.item.json")
    ways, table, record = flags.ways.split(","), [], {}
    with tempfile.TemporaryDirectory() as folder:
        in_fork(save_base, folder, flags.shape, True, None, files[2])
        for method in flags.methods.split(","):
            runs = in_turn(train, ways, flags.repeats, method, folder, files, flags)
            first = runs[ways[0]]
            for way, run in runs.items():
                ratios = [a / b for a, b in zip(first["steps"], run["steps"], strict=True)]
                differences = [abs(a - b) / b for a, b in zip(run["losses"], first["losses"], strict=True)]
                table.append(
                    {
                        "method": method,
                        "way": way,
                        "s/step": median(run["steps"]),
                        f"times {ways[0]}": median(ratios),
                        "tokens a step": round(run["tokens"]),
                        "computed": round(run["computed"]),
                        "peak GB": run["peak_gb"],
                        "first loss": run["losses"][0],
                        "losses differ by": f"{max(differences):.0e}",
                    }
                )
            last = table[-1]
            print(f"{method}: {last[f'times {ways[0]}']:.2f} times as fast", file=sys.stderr)
            record[f"speedup_{method}"] = last[f"times {ways[0]}"]
            record |= {"tokens": last["tokens a step"], "computed": last["computed"]}
    print_table(table)
    sizes = {"rows": flags.rows, "micro_batch_size": flags.micro_batch_size, "repeats": flags.repeats}
    print_json("trees", table=table, shape=flags.shape, **sizes, **record)


if __name__ == "__main__":
    cli.run(trees)
