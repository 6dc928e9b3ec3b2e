"""Ranks the next item of every row of a test file by constrained beam search: HR@K, NDCG@K and MRR.

Takes the flags of MiniOneRec's evaluate.py. New are adapter checkpoints, a trie in tensors that decodes all beams of a
prompt against one prompt cache, data-parallel evaluation, and MRR.

    python evaluate.py --base_model out/lora/final_checkpoint --info_file info.txt --test_data_path test.csv \\
        --category Industrial_and_Scientific --result_json_data out/lora/result.json
    torchrun --nproc_per_node 2 evaluate.py --base_model ...
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minionerec import cli, world
from minionerec.checkpoint import Checkpoint, read_model
from minionerec.data.files import (
    InfoItem,
    Interaction,
    count_rows,
    read_info_items,
    read_interactions,
    read_item_ids,
    shorten,
)
from minionerec.data.items import Items
from minionerec.data.prompts import RECOMMENDATION, Prompts, Task
from minionerec.errors import InputError, Problems
from minionerec.flags import DeviceFlags, PromptFlags, above_zero, command, flag
from minionerec.locks import hold, lock_of_new
from minionerec.metrics import format_metrics, popularity, rank_of, ranking_metrics
from minionerec.output import writing
from minionerec.process_memory import importing
from minionerec.saving import write_json


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(PromptFlags, DeviceFlags):
    """The flags of evaluate.py."""

    base_model: str = flag("", "a whole checkpoint, or an adapter one, whose base is then found from the adapter.")
    adapter: str = flag("", "an adapter checkpoint to load on base_model, instead of on the base it names.")
    train_file: str = flag(
        "",
        "CSV of training interactions; given, the popularity baseline is printed too, and separately the rows whose "
        "target it does not hold.",
    )
    info_file: str = flag("", "the catalogue, one SID, title and item id a line, separated by tabs.")
    test_data_path: str = flag("", "CSV of test interactions.")
    result_json_data: str = flag(
        "",
        "file for the rankings; the metrics go beside it, as .metrics.json, or as .metrics if its name is a number, as "
        "that of a part in MiniOneRec's evaluate.sh.",
    )
    batch_size: int = flag(4, "prompts of a forward pass.", above_zero)
    K: int = flag(0, "an additional cut-off besides 1, 3, 5, 10, 20, 50; 0 for none (the original ignores the flag).")
    seed: int = flag(42, "kept for MiniOneRec's argument lists; nothing here is random.")
    length_penalty: float = flag(
        0.0, "beam scores are divided by their length to this power; without effect if all SIDs have the same length."
    )
    max_new_tokens: int = flag(256, "the most tokens a SID may have.", above_zero)
    num_beams: int = flag(50, "items ranked per row.", above_zero)
    temperature: float = flag(
        1.0, "kept for MiniOneRec's argument lists; without effect, because beams are not sampled.", above_zero
    )
    guidance_scale: float = flag(1.0, "kept for MiniOneRec's argument lists, which ignore it too.")

    @property
    def notes(self) -> list[str]:
        """A line for each flag that is only kept and was set to something else."""
        kept = (name for name in ("temperature", "guidance_scale") if getattr(self, name) != 1)
        return [f"--{name} {getattr(self, name):g} changes nothing: rankings are by beam search" for name in kept]

    @property
    def metrics_path(self) -> str:
        """The file for the metrics. Beside a numbered result, MiniOneRec's evaluate.sh takes every other file named
        *.json for one more part of the rankings."""
        path, _ = os.path.splitext(self.result_json_data)
        return f"{path}.metrics" if os.path.basename(path).isdigit() else f"{path}.metrics.json"

    def check(self, problems: Problems) -> None:
        super().check(problems)
        world.check_world(problems)
        if not 0 <= self.K <= self.num_beams:
            problems.add(f"--K {self.K}: must be between 0 and --num_beams {self.num_beams}, the length of a ranking")
        self.check_output(problems, "result_json_data", "the rankings", self.metrics_path)


@dataclass(frozen=True)
class EvaluateInput:
    """What is evaluated, checked: the checkpoint, where its base is, the wording, the SIDs and the test rows.

    Attributes:
        items, targets: where items share SIDs, the items and the number of each row's target; None for a target that is
            not among them. Both None where no items share a SID, or the test file does not tell them apart.
    """

    checkpoint: Checkpoint
    base: str
    prompts: Prompts
    sids: list[str]
    items: Items | None
    targets: list[int | None] | None
    examples: list[Interaction]
    notes: list[str]

    @property
    def task(self) -> Task:
        """What is asked of every row."""
        return self.prompts.tasks[RECOMMENDATION]


def read_input(flags: EvaluateFlags) -> EvaluateInput:
    """Checks the flags, the checkpoint and every row of the files. Raises InputError with everything that is wrong."""
    problems = Problems()
    flags.check(problems)
    checkpoint, base = read_model(problems, "base_model", flags.base_model, flags.adapter)
    prompts = None
    if checkpoint:
        prompts = problems.attempt(checkpoint.prompts, flags.category, flags.prompt_file, RECOMMENDATION)
    listed = problems.attempt(read_info_items, flags.info_file) or []
    sids = list(dict.fromkeys(item.sid for item in listed))
    titles = prompts.need_titles if prompts else False
    # A catalogue may hold fewer items than the histories and targets, but not none of them.
    examples = problems.attempt(list, read_interactions(flags.test_data_path, "test_data_path", titles=titles))
    known = set(sids)
    outside = sum(example.sid not in known for example in examples or [])
    if examples and sids and outside == len(examples):
        problems.add(
            f"--info_file {flags.info_file}: has the target of no row of --test_data_path {flags.test_data_path}, such "
            f"as {shorten(examples[0].sid)}; do the two files belong together?"
        )
    if flags.train_file:
        problems.attempt(count_rows, flags.train_file, "train_file", titles=False)
    problems.check()
    assert checkpoint and base and prompts and sids and examples  # nothing was wrong
    items, targets, notes = _told_apart(flags, listed, examples) if len(listed) > len(sids) else (None, None, [])
    notes += flags.notes
    if outside:
        notes.append(f"{outside} of {len(examples)} rows have a target that --info_file lacks; they count as misses")
    if flags.prompt_file:
        notes += checkpoint.differing_prompts(prompts)
    else:
        notes += checkpoint.differing_flags(flags.to_dict(), ("category",))
    return EvaluateInput(checkpoint, base, prompts, sids, items, targets, examples, notes)


def _told_apart(
    flags: EvaluateFlags, listed: list[InfoItem], examples: list[Interaction]
) -> tuple[Items | None, list[int | None] | None, list[str]]:
    """The items of an info file in which some share a SID, and the number of each row's target; or None for both and a
    line that says what is missing to tell them apart."""
    try:
        purchases = read_item_ids(flags.train_file, "train_file") if flags.train_file else ()
        items = Items(listed, flags.info_file, purchases)
        targets = [items.number_of.get(item) for item in read_item_ids(flags.test_data_path, "test_data_path")]
        for target, example in zip(targets, examples, strict=True):
            if target is not None and items.all[target].sid != example.sid:
                raise InputError(
                    f"item {items.all[target].id!r} is {items.all[target].sid} in {flags.info_file} and "
                    f"{example.sid} in {flags.test_data_path}"
                )
    except InputError as error:
        return None, None, [f"items share SIDs, and metrics are those of SIDs only: {error.problems[0]}"]
    return items, targets, []


@command(EvaluateFlags)
def evaluate(flags: EvaluateFlags) -> dict[str, float]:
    """Evaluates a checkpoint on a test file."""
    # Check the flags, the checkpoint and every row of the files, before anything heavy is imported.
    files = read_input(flags)
    checkpoint, sids = files.checkpoint, files.sids
    hold("result_json_data", flags.result_json_data, lock_of_new)

    with importing():
        world.watch()
        from minionerec.decoding.probe import probe
        from minionerec.model import device
        from minionerec.ranking import Ranker
        from minionerec.training import nodes

    # Make the trie: every SID must become its own tokens.
    started = time.perf_counter()
    state = device.process_state()
    nodes.check_same(flags.to_dict())
    for line in files.notes:
        state.print(line)
    outside = {sid for example in files.examples for sid in example.sid_history}.difference(sids)
    ranker = Ranker(
        checkpoint,
        files.prompts,
        sids,
        f"{'--adapter' if flags.adapter else '--base_model'} {checkpoint.path}",
        f"--info_file {flags.info_file} belongs to a different catalogue, or sft.py must make the checkpoint again",
        also=sorted(outside),
        compile=flags.compile,
        num_beams=flags.num_beams,
        batch_size=flags.batch_size,
    )
    depth = ranker.trie.depth
    if depth > flags.max_new_tokens:
        raise InputError(
            f"--max_new_tokens {flags.max_new_tokens}: the SIDs of {flags.info_file} have up to {depth} tokens"
        )

    # Load the model, with its base stored as in training.
    model = ranker.load_model(files.base).model

    # Rank.
    prompts = ranker.encode(files.examples)
    if ranker.encoder.control_note:
        state.print(ranker.encoder.control_note)
    longest, length = max(map(len, prompts)), min(flags.num_beams, len(ranker.trie))
    state.print(f"decoding: {probe(model, longest, longest + length * depth, f'--base_model {files.base}')}")
    decoding = time.perf_counter()
    rankings = ranker.rank(prompts, flags.length_penalty)
    decode_seconds = time.perf_counter() - decoding
    ranks = [rank_of(example.sid, ranking) for example, ranking in zip(files.examples, rankings, strict=True)]
    metrics = ranking_metrics(ranks, length, flags.K)

    # Where items share SIDs, the same for items: those of a SID follow each other, the popular ones first.
    by_item = None
    if files.items and files.targets:
        item_ranks = [_item_rank(files.items, *one, length) for one in zip(files.targets, rankings, strict=True)]
        by_item = ranking_metrics(item_ranks, length, flags.K)

    # Write the rankings and metrics, and print them beside popularity.
    if state.is_main_process:
        results = [
            {"input": ranker.tokenizer.decode(ids), "output": example.sid, "predict": ranking}
            for ids, example, ranking in zip(prompts, files.examples, rankings, strict=True)
        ]
        with writing(flags.result_json_data):
            os.makedirs(os.path.dirname(os.path.abspath(flags.result_json_data)), exist_ok=True)
            write_json(flags.result_json_data, results)
        seconds = {"decode_seconds": decode_seconds, "seconds": time.perf_counter() - started}
        summary = {**metrics, **({"items": by_item} if by_item else {}), "rows": len(results), **seconds}
        with writing(flags.metrics_path):
            write_json(flags.metrics_path, summary)
        print(format_metrics(metrics))
        if files.items and by_item:
            print(f"items instead of SIDs, {files.items.num_sharing} of {len(files.items)} share theirs:")
            print(format_metrics(by_item))
        if flags.train_file:
            print_beside_popularity(flags, files.examples, ranks, length)
        print(f"{len(results)} rows, {len(results) / decode_seconds:.1f} rows/s; rankings in {flags.result_json_data}")
    return metrics


def _item_rank(items: Items, target: int | None, ranking: list[str], length: int) -> int | None:
    """The place of an item, from 0, among the first `length` items of a ranking of SIDs; None if it is not there."""
    ranked = items.ranked(ranking, length)
    return ranked.index(target) if target in ranked else None


def print_beside_popularity(
    flags: EvaluateFlags, examples: Sequence[Interaction], ranks: Sequence[int | None], length: int
) -> None:
    """Prints the popularity baseline, and the metrics of the rows whose target was never trained."""
    seen: set[str] = set()

    def targets() -> Iterator[str]:
        for row in read_interactions(flags.train_file, "train_file", titles=False):
            seen.update(row.sid_history, (row.sid,))
            yield row.sid

    top = popularity(targets(), length)
    print("popularity, for comparison:")
    print(format_metrics(ranking_metrics([rank_of(example.sid, top) for example in examples], length, flags.K)))
    unseen = [rank for example, rank in zip(examples, ranks, strict=True) if example.sid not in seen]
    if unseen:
        print(f"{len(unseen)} of {len(examples)} rows have a target that does not occur in the training file:")
        print(format_metrics(ranking_metrics(unseen, length, flags.K)))


if __name__ == "__main__":
    cli.run(evaluate)
