"""Measures the pipeline from an interactions file to token ids: rows/s against a plain loop, and peak memory by rows.

1. The project's pipeline (a checking pass, then `read_interactions` and `write_examples`: every row gives four prompts)
   against a loop over the same file that parses the cells with `ast.literal_eval` and calls the tokenizer for each
   instruction, input and response. The texts must be equal.
2. The peak resident memory (GB) of the pipeline for files of 10,000, 100,000 and `--rows` rows: it must not grow.

    python -m benchmarks.data
    python -m benchmarks.data --rows 1000000 --tasks sid_history_to_sid
"""

import ast
import csv
import json
import os
import random
import re
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.common import in_fresh_process, interleaved_medians, print_json, print_table, quiet
from benchmarks.fixtures import make_base
from minionerec import cli
from minionerec.data.files import Catalogue, count_rows, read_catalogue, read_interactions
from minionerec.data.prompts import SEPARATOR, Prompts, load_prompts
from minionerec.flags import Flags, above_zero, command, flag
from minionerec.process_memory import peak_rss_gb, reset_peak_rss, rss_gb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIZES = (10_000, 100_000)
SYLLABLES = re.findall("..", "badecofugahijokelumenioprasiteunvewixaro")


@dataclass(frozen=True, kw_only=True)
class DataFlags(Flags):
    """The files, and what is read from them."""

    rows: int = flag(100000, "rows of the largest file whose memory is measured.", above_zero)
    compared_rows: int = flag(5000, "rows of the comparison with the loop.", above_zero)
    items: int = flag(3686, "items of the catalogue.", above_zero)
    vocab_size: int = flag(4096, "entries of the BPE tokenizer, which is trained on the titles.")
    cutoff_len: int = flag(512, "the most tokens of an example; the loop does not shorten.")
    tasks: str = flag("all", "all, or task names separated by commas; those on interactions are measured.")
    repeats: int = flag(3, "timed rounds; the median is reported.", above_zero)


def write_catalogue(folder: str, items: int) -> None:
    """Writes an index, and metadata with titles of 60 to 80 characters from 3,000 made-up words."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))).capitalize() for _ in range(3000)]
    index, metadata = {}, {}
    for item in range(items):
        title, length = "", rng.randint(60, 80)
        while len(title) < length:
            title += rng.choice(words) + rng.choice((" ", " ", " ", ", ", "'s ", " - "))
        code = rng.randrange(256)
        index[str(item)] = [f"<a_{item // 256}>", f"<b_{item % 256}>", f"<c_{code}>"]
        metadata[str(item)] = {"title": title[:length].strip(), "description": ""}
    for name, data in (("index.json", index), ("item.json", metadata)):
        with open(os.path.join(folder, name), "w") as file:
            json.dump(data, file)


def write_interactions(folder: str, rows: int) -> str:
    """Writes a file of random interactions with 1 to 10 past items per row; returns its path."""
    catalogue = read_catalogue(os.path.join(folder, "index.json"), os.path.join(folder, "item.json"))
    items, rng = list(catalogue.items.values()), random.Random(1)
    path = os.path.join(folder, f"{rows}.csv")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "history_item_title", "item_title", "history_item_sid", "item_sid"])
        for row in range(rows):
            *history, target = rng.choices(items, k=rng.randint(2, 11))
            titles, sids = [item.title for item in history], [item.sid for item in history]
            writer.writerow([f"A{row}", str(titles), target.title, str(sids), target.sid])
    return path


def load(folder: str, tasks: str) -> "tuple[PreTrainedTokenizerFast, Catalogue, Prompts]":
    """The tokenizer with SID tokens, the catalogue, and the prompts of the tasks on interactions."""
    from dataclasses import replace

    from minionerec.model import loading

    catalogue = read_catalogue(os.path.join(folder, "index.json"), os.path.join(folder, "item.json"))
    tokenizer = loading.load_tokenizer(os.path.join(folder, "base"))
    tokenizer.add_tokens(catalogue.sid_tokens)
    prompts = load_prompts("Industrial_and_Scientific", tasks=tasks)
    on_rows = {name: task for name, task in prompts.tasks.items() if task.rows == "interaction"}
    return tokenizer, catalogue, replace(prompts, tasks=on_rows)


def pipeline(
    path: str,
    output: str,
    tokenizer: "PreTrainedTokenizerFast",
    catalogue: Catalogue,
    prompts: Prompts,
    cutoff_len: int,
) -> int:
    """What sft.py does before training: checks the file, then writes the examples. Returns their number."""
    from minionerec.data.encoding import Encoder
    from minionerec.data.examples import write_examples

    sids = catalogue.sids
    count_rows(path, "train_file", sids, prompts.need_titles)
    encoder = Encoder(tokenizer, prompts, cutoff_len)
    return write_examples(
        output, encoder, lambda kind: read_interactions(path, "train_file", sids, prompts.need_titles)
    )


def plain_loop(path: str, tokenizer: "PreTrainedTokenizerFast", prompts: Prompts) -> list[list[int]]:
    """The examples row by row, with one tokenizer call for each part of a prompt."""
    examples = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            fields = {
                "sid_history": SEPARATOR.join(ast.literal_eval(row["history_item_sid"])),
                "title_history": SEPARATOR.join(ast.literal_eval(row["history_item_title"])),
                "sid": row["item_sid"],
                "title": row["item_title"],
            }
            for task in prompts.tasks.values():
                instruction = task.instruction.replace("{category}", prompts.category)
                parts = (
                    f"{instruction}\n",
                    f"{task.input.format(**fields)}\nAnswer:\n",
                    task.response.format(**fields),
                )
                ids = [token for part in parts for token in tokenizer(part).input_ids]
                examples.append([*ids, tokenizer.eos_token_id])
    return examples


def compare(folder: str, flags: DataFlags) -> dict[str, float]:
    """Rows per second of both ways."""
    import datasets

    tokenizer, catalogue, prompts = load(folder, flags.tasks)
    path, output = write_interactions(folder, flags.compared_rows), os.path.join(folder, "examples.arrow")
    seconds = interleaved_medians(
        {
            "loop": lambda: plain_loop(path, tokenizer, prompts),
            "pipeline": lambda: pipeline(path, output, tokenizer, catalogue, prompts, flags.cutoff_len),
        },
        flags.repeats,
    )
    written = datasets.Dataset.from_file(output)
    expected = plain_loop(path, tokenizer, prompts)
    assert len(written) == len(expected)
    decoded = {tokenizer.decode(ids) for ids in expected}  # a set: the pipeline goes by task, the loop by row
    shortened = sum(tokenizer.decode(ids) not in decoded for ids in written["input_ids"])
    assert shortened <= sum(len(ids) > flags.cutoff_len for ids in expected)
    return {**{name: flags.compared_rows / value for name, value in seconds.items()}, "shortened": shortened}


def memory(folder: str, tasks: str, rows: int, cutoff_len: int) -> dict[str, float]:
    """Rows per second and peak resident memory for a file of `rows`."""
    tokenizer, catalogue, prompts = load(folder, tasks)
    path, output = os.path.join(folder, f"{rows}.csv"), os.path.join(folder, "examples.arrow")
    reset_peak_rss()
    before, started = rss_gb(), time.perf_counter()
    examples = pipeline(path, output, tokenizer, catalogue, prompts, cutoff_len)
    seconds = time.perf_counter() - started
    return {
        "rows": rows,
        "examples": examples,
        "s": seconds,
        "rows/s": rows / seconds,
        "peak GB": peak_rss_gb(),
        "above start, GB": peak_rss_gb() - before,
    }


def prepare(folder: str, items: int, vocab_size: int) -> None:
    """Writes the catalogue and a base whose tokenizer is trained on it."""
    write_catalogue(folder, items)
    smallest = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    base = os.path.join(folder, "base")
    make_base(os.path.join(folder, "item.json"), base, vocab_size=vocab_size, intermediate_size=8, **smallest)


@command(DataFlags)
def data(flags: DataFlags) -> None:
    """Prints rows/s of the pipeline and of a plain loop, and the pipeline's peak memory by rows."""
    problems = flags.problems()
    rows, tasks = flags.rows, flags.tasks
    prompts = problems.attempt(load_prompts, "", None, tasks)
    if prompts and not any(task.rows == "interaction" for task in prompts.tasks.values()):
        problems.add(f"--tasks {tasks}: none of them works on interactions")
    problems.check()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(prepare, folder, flags.items, flags.vocab_size)
        speed = in_fresh_process(compare, folder, flags)
        peaks = []
        for size in [*(size for size in SIZES if size < rows), rows]:
            in_fresh_process(write_interactions, folder, size)
            peaks.append(in_fresh_process(memory, folder, tasks, size, flags.cutoff_len))
            os.remove(os.path.join(folder, f"{size}.csv"))
    ratio = speed["pipeline"] / speed["loop"]
    names = {"loop": "plain loop", "pipeline": "pipeline"}
    print_table([{"way": names[way], "rows/s": speed[way], "times": speed[way] / speed["loop"]} for way in names])
    print()
    print_table(peaks)
    print()
    print_json("data", tasks=tasks, compared_rows=flags.compared_rows, speed=speed, speed_up=ratio, memory=peaks)


if __name__ == "__main__":
    cli.run(data)
