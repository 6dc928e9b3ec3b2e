"""Ranks the next item of every row of a test file by constrained beam search: HR@K, NDCG@K and MRR.

Takes the flags of MiniOneRec's evaluate.py. New are adapter checkpoints, a trie in tensors that decodes all beams of a
prompt against one prompt cache, data-parallel evaluation, and MRR.

    python evaluate.py --base_model out/lora/final_checkpoint --info_file info.txt --test_data_path test.csv \\
        --category Industrial_and_Scientific --result_json_data out/lora/result.json
    torchrun --nproc_per_node 2 evaluate.py --base_model ...
"""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Literal

from minionerec import blending, cli, world
from minionerec.checkpoint import Checkpoint, read_model
from minionerec.data.files import (
    Interaction,
    count_rows,
    read_info_items,
    read_interactions,
    read_item_histories,
    read_item_ids,
    sample_rows,
    shorten,
)
from minionerec.data.items import ExcludeSeen, Items, read_targets, seen_sids, share_sids
from minionerec.data.prompts import Prompts
from minionerec.errors import InputError, Problems
from minionerec.flags import (
    DeviceFlags,
    PromptFlags,
    ScoreFlags,
    above_zero,
    command,
    flag,
    not_writable,
    number_or_auto,
)
from minionerec.locks import hold, lock_of_new
from minionerec.metrics import (
    HISTORIES,
    OF_ITEMS,
    TARGETS,
    bought_group,
    format_groups,
    format_metrics,
    history_group,
    metrics_of_groups,
    metrics_path,
    popularity,
    rank_of,
    rank_without,
    ranking_metrics,
    watched_cutoff,
)
from minionerec.output import writing
from minionerec.process_memory import importing
from minionerec.saving import write_json

if TYPE_CHECKING:
    from minionerec.ranking import Ranker


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(PromptFlags, ScoreFlags, DeviceFlags):
    """The flags of evaluate.py."""

    base_model: str = flag("", "a whole checkpoint, or an adapter, which names its base.")
    adapter: str = flag("", "an adapter to load on base_model, instead of on the base that it names.")
    train_file: str = flag(
        "",
        "CSV of training interactions; with it, the popularity baseline is printed too, and metrics by how often a "
        "target was bought there.",
    )
    eval_file: str = flag(
        "",
        "CSV of validation interactions on which the weight of blend and seen_penalty are chosen, where they are auto. "
        "Without it the recorded ones are used; what is not recorded is chosen on the validation file of the "
        "checkpoint's run.",
    )
    info_file: str = flag("", "the catalogue: a line per item with SID, title and item id, separated by tabs.")
    test_data_path: str = flag("", "CSV of test interactions.")
    result_json_data: str = flag(
        "",
        "file for the rankings; the metrics go next to it, as .metrics.json, or as .metrics if its name is a number, "
        "like the parts of MiniOneRec's evaluate.sh.",
    )
    batch_size: int | Literal["auto"] = flag(
        4,
        "prompts per forward pass; auto for as many as the memory of the GPU is predicted to hold (8 on a CPU). It is "
        "halved when memory runs out.",
        number_or_auto,
    )
    K: int = flag(0, "an additional cut-off next to 1, 3, 5, 10, 20, 50; 0 for none (the original ignores the flag).")
    seed: int = flag(42, "seed of the choice of rows of eval_file; nothing else is random.")
    length_penalty: float = flag(
        0.0,
        "beam scores are divided by their length to this power; no effect if all SIDs have the same length, unless "
        "blend or seen_penalty add to them. recommend.py has no such flag.",
        lambda value: None if abs(value) <= 10 else "must be from -10 to 10",
    )
    max_new_tokens: int = flag(256, "the most tokens a SID may have.", above_zero)
    num_beams: int = flag(50, "items ranked per row.", above_zero)
    exclude_seen: bool | Literal["earlier"] = flag(
        False,
        "do not rank the SIDs of the history; earlier: all but the last one. For metrics of what recommend.py gives "
        "with this flag; there, others that share the SID of an item in the history stay.",
    )
    temperature: float = flag(
        1.0, "accepted for MiniOneRec's argument lists; no effect, because beams are not sampled.", above_zero
    )
    guidance_scale: float = flag(1.0, "accepted for MiniOneRec's argument lists; no effect, as in MiniOneRec.")

    @property
    def notes(self) -> list[str]:
        """A line for each flag that is only kept and was set to something else."""
        kept = (name for name in ("temperature", "guidance_scale") if getattr(self, name) != 1)
        return [f"--{name} {getattr(self, name):g} changes nothing: rankings are by beam search" for name in kept]

    @property
    def metrics_path(self) -> str:
        """The file for the metrics."""
        return metrics_path(self.result_json_data)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        world.check_world(problems)
        if not 0 <= self.K <= self.num_beams:
            problems.add(f"--K {self.K}: must be between 0 and --num_beams {self.num_beams}, the length of a ranking")
        if self.eval_file and not self.automatic:
            problems.add("--eval_file has no effect without --blend and --blend_weight auto, or --seen_penalty auto")
        if self.seen_penalty == "auto" and self.exclude_seen is True:
            problems.add("--seen_penalty auto: --exclude_seen True leaves out all that it lowers; give one of them")
        self.check_output(problems, "result_json_data", "the rankings", self.metrics_path)


@dataclass(frozen=True)
class EvaluateInput:
    """What is evaluated, checked: the checkpoint, where its base is, the wording, the SIDs and the test rows.

    Attributes:
        items, targets: where items share SIDs, the items and the number of each row's target; None for a target that is
            not among them. Both None where no items share a SID, or the test file does not tell them apart.
        scoring: what changes the model's scores.
        eval_file, weighed: the validation file and its rows that numbers of `scoring` are chosen on; none where they
            are known.
        recordable: whether the numbers that are chosen on these rows may be recorded for other commands: not where a
            model has learned the rows.
    """

    checkpoint: Checkpoint
    base: str
    prompts: Prompts
    sids: list[str]
    items: Items | None
    targets: list[int | None] | None
    examples: list[Interaction]
    scoring: blending.Scoring
    eval_file: str
    weighed: list[Interaction]
    recordable: bool
    notes: list[str]


def read_input(flags: EvaluateFlags) -> EvaluateInput:
    """Checks the flags, the checkpoint and every row of the files. Raises InputError with everything that is wrong."""
    problems = flags.problems()
    checkpoint, base, prompts = read_model(problems, "base_model", flags.base_model, flags.adapter, flags)
    listed = problems.attempt(read_info_items, flags.info_file) or []
    sids = list(dict.fromkeys(item.sid for item in listed))
    titles = prompts.need_titles if prompts else False
    # A catalogue may hold fewer items than the histories and targets, but not none of them.
    examples = problems.attempt(list, read_interactions(flags.test_data_path, "test_data_path", titles=titles))
    _check_targets(problems, examples or [], f"--test_data_path {flags.test_data_path}", sids, flags.info_file)
    if flags.train_file:
        problems.attempt(count_rows, flags.train_file, "train_file", titles=False)
    scoring, eval_file, weighed = None, "", list[Interaction]()
    if checkpoint and listed:
        scoring = problems.attempt(blending.Scoring.read, flags, checkpoint, listed, flags.info_file)
        if scoring and flags.automatic and (flags.eval_file or None in scoring.numbers):
            eval_file, weighed = _validation_rows(problems, flags, checkpoint, titles)
            _check_targets(problems, weighed, f"--eval_file {eval_file}", sids, flags.info_file)
    problems.check()
    assert checkpoint and base and prompts and sids and examples and scoring  # nothing was wrong
    items, targets, notes = None, None, flags.notes
    if share_sids(listed):
        try:
            items, targets = read_targets(listed, flags.info_file, flags.train_file, flags.test_data_path)
        except InputError as error:
            notes.append(f"items share SIDs, and metrics are those of SIDs only: {error.problems[0]}")
    learned = _notes_on_learned(flags, checkpoint, scoring, eval_file, weighed)
    notes += learned
    if not weighed:
        of_record = f", as recorded in {scoring.path}"
        if scoring.blend:
            weight = f"weight of {flags.blend}: {scoring.blend.weight:g}"
            notes.append(weight + (of_record if flags.blend_weight == "auto" else ""))
        if flags.seen_penalty == "auto":
            notes.append(f"seen_penalty: {scoring.seen_penalty:g}{of_record}")
        notes += scoring.notes(flags.num_beams, flags.exclude_seen, flags.length_penalty)
    if len(sids) < flags.K:
        notes.append(f"--K {flags.K} has no metrics: {flags.info_file} has {len(sids)} SIDs to rank")
    known = set(sids)
    if outside := sum(example.sid not in known for example in examples):
        notes.append(f"{outside} of {len(examples)} rows have a target that --info_file lacks; they count as misses")
    if lost := [row.sid for row in examples if row.sid in seen_sids(row, flags.exclude_seen)]:
        items_of = Counter(item.sid for item in set(listed))
        shared = sum(items_of[sid] > 1 for sid in lost)
        more = f"; {shared} have a SID of several items, of which recommend.py leaves out only those of the history"
        notes.append(
            f"{len(lost)} of {len(examples)} rows have a target that --exclude_seen leaves out{more if shared else ''}"
        )
    pairs = ((item.id, item.sid) for item in listed)
    notes += checkpoint.notes_on_catalogue(pairs, f"--info_file {flags.info_file}")
    notes += checkpoint.notes_on_wording(prompts, flags.category, flags.prompt_file)
    return EvaluateInput(
        *(checkpoint, base, prompts, sids, items, targets, examples, scoring, eval_file, weighed, not learned, notes)
    )


def _check_targets(
    problems: Problems, rows: Sequence[Interaction], file: str, sids: Sequence[str], info_file: str
) -> None:
    """Adds a problem if the catalogue has the target of no row of a file."""
    if rows and sids and {row.sid for row in rows}.isdisjoint(sids):
        problems.add(
            f"--info_file {info_file}: has the target of no row of {file}, such as {shorten(rows[0].sid)}; do the two "
            "files belong together?"
        )


def _validation_rows(
    problems: Problems, flags: EvaluateFlags, checkpoint: Checkpoint, titles: bool
) -> tuple[str, list[Interaction]]:
    """The validation file that the numbers of --blend_weight and --seen_penalty are chosen on, and a sample of its
    rows."""
    path = flags.eval_file or str(checkpoint.flags.get("eval_file", ""))
    examples = {"blend_weight": "--blend_weight 0.5", "seen_penalty": "--seen_penalty 1"}
    numbers = " ".join(examples[name] for name in flags.automatic)
    what = "weight" if "blend_weight" in flags.automatic else "penalty"
    flag_of_model = "--adapter" if flags.adapter else "--base_model"
    folder = flags.blend or checkpoint.path  # the name of a model of the hub is none
    if not os.path.isfile(path):
        auto = " and ".join(f"--{name} auto" for name in flags.automatic)
        where = f"--eval_file {path}: no such file" if path else f"{checkpoint.path} recorded no validation file"
        problems.add(f"{auto}: {where}; give --eval_file, or numbers such as {numbers}")
    elif os.path.isfile(flags.test_data_path) and os.path.samefile(path, flags.test_data_path):
        problems.add(f"--eval_file {path}: is --test_data_path; a {what} that is chosen on the test rows says nothing")
    elif wrong := not_writable(folder) if os.path.isdir(folder) else "is no folder":
        named = f"{'--blend' if flags.blend else flag_of_model} {folder}"
        problems.add(f"{named}: {wrong}, where the {what} is to be recorded; or give {numbers}")
    else:
        rows = problems.attempt(list, read_interactions(path, "eval_file", titles=titles)) or []
        return path, list(sample_rows(rows, len(rows), blending.ROWS, flags.seed))
    return path, []


def _notes_on_learned(
    flags: EvaluateFlags,
    checkpoint: Checkpoint,
    scoring: blending.Scoring,
    eval_file: str,
    rows: Sequence[Interaction],
) -> list[str]:
    """A warning for each model that was trained on most of the rows that numbers are to be chosen on. It finds their
    targets so likely that nothing else counts, and nothing in the history comes before them."""
    trained = [(checkpoint.path, checkpoint.flags.get("train_file", ""), "little")]
    trained += [(flags.blend, scoring.blend.train_file, "much")] if scoring.blend else []
    notes = []
    for name, train_file, wrong in trained:
        if rows and (learned := _num_learned(rows, train_file)) > len(rows) / 2:
            effects = {"blend_weight": f"SASRec counts for too {wrong}", "seen_penalty": "the penalty is too small"}
            effect = " and ".join(effects[number] for number in flags.automatic)
            give = " and ".join(f"--{number}" for number in flags.automatic)
            notes.append(
                f"warning: {name} was trained on {learned} of {len(rows)} rows of --eval_file {eval_file}, so {effect}"
                f", and nothing is recorded; give {give} as chosen for a run that has not learned them"
            )
    return notes


def _num_learned(rows: Sequence[Interaction], path: str) -> int:
    """How many rows are in a training file that a model recorded, if that file is still there."""
    wanted = Counter((tuple(row.sid_history), row.sid) for row in rows)
    found = set[tuple[tuple[str, ...], str]]()
    if os.path.isfile(path):
        with suppress(InputError):  # it has changed since
            trained = read_interactions(path, "train_file", titles=False)
            found.update(key for row in trained if (key := (tuple(row.sid_history), row.sid)) in wanted)
    return sum(wanted[row] for row in found)


@command(EvaluateFlags)
def evaluate(flags: EvaluateFlags) -> dict[str, float]:
    """Prints HR@K, NDCG@K and MRR of a checkpoint on a test file, and writes its rankings."""
    # Check the flags, the checkpoint and every row of the files, before anything heavy is imported.
    inputs = read_input(flags)
    checkpoint, sids = inputs.checkpoint, inputs.sids
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
    # Another evaluation may have recorded what the first process looked for, since then.
    found = inputs.scoring.numbers, inputs.weighed
    numbers, weighed = nodes.first_decides(lambda: found)
    inputs = replace(inputs, scoring=inputs.scoring.with_numbers(*numbers), weighed=weighed)
    for line in inputs.notes:
        state.print(line)
    rows_of = {
        "--test_data_path " + flags.test_data_path: inputs.examples,
        "--eval_file " + inputs.eval_file: inputs.weighed,
    }
    outside = {
        file: {sid for row in rows for sid in row.sid_history}.difference(sids) for file, rows in rows_of.items()
    }
    named = " or ".join([f"--info_file {flags.info_file}", *(file for file, others in outside.items() if others)])
    ranker = Ranker(
        checkpoint,
        inputs.prompts,
        sids,
        f"{'--adapter' if flags.adapter else '--base_model'} {checkpoint.path}",
        f"{named} belongs to a different catalogue, or sft.py must make the checkpoint again",
        also=sorted(set[str]().union(*outside.values())),
        compile=flags.compile,
        num_beams=flags.num_beams,
        batch_size=flags.batch_size,
        blend=inputs.scoring.blend,
        seen_penalty=inputs.scoring.seen_penalty or 0.0,
    )
    depth = ranker.trie.depth
    if depth > flags.max_new_tokens:
        raise InputError(
            f"--max_new_tokens {flags.max_new_tokens}: the SIDs of {flags.info_file} have up to {depth} tokens"
        )

    # Load the model, with its base stored as in training.
    model = ranker.load_model(inputs.base).model

    # Rank.
    prompts = ranker.encode(inputs.examples)
    if ranker.encoder.control_note:
        state.print(ranker.encoder.control_note)
    longest, length = max(map(len, prompts)), ranker.length
    if flags.batch_size == "auto":
        state.print(f"--batch_size auto: {ranker.batch_size} prompts")
    state.print(f"decoding: {probe(model, longest, longest + length * depth, f'--base_model {inputs.base}')}")
    if inputs.weighed:
        choose(flags, inputs, ranker, state.is_main_process)
    decoding = time.perf_counter()
    rankings = ranker.rank(prompts, flags.length_penalty, inputs.examples, flags.exclude_seen)
    decode_seconds = time.perf_counter() - decoding
    # A target that --exclude_seen leaves out is a miss, also where the catalogue is so small that it fills a ranking.
    ranked = [
        [] if row.sid in seen_sids(row, flags.exclude_seen) else ranking
        for row, ranking in zip(inputs.examples, rankings, strict=True)
    ]
    ranks = [rank_of(row.sid, ranking) for row, ranking in zip(inputs.examples, ranked, strict=True)]
    metrics = ranking_metrics(ranks, length, flags.K)

    # Where items share SIDs, the same for items.
    of_items: list[int | None] | None = None
    by_item: dict[str, float] | None = None
    if inputs.items and inputs.targets:
        pairs = zip(inputs.targets, ranked, strict=True)
        of_items = [inputs.items.rank_of(target, ranking, length) for target, ranking in pairs]
        by_item = ranking_metrics(of_items, length, flags.K)

    # Write the rankings and metrics, and print them next to popularity.
    if state.is_main_process:
        results = [
            {"input": ranker.tokenizer.decode(ids), "output": example.sid, "predict": ranking}
            for ids, example, ranking in zip(prompts, inputs.examples, rankings, strict=True)
        ]
        with writing(flags.result_json_data):
            os.makedirs(os.path.dirname(os.path.abspath(flags.result_json_data)), exist_ok=True)
            write_json(flags.result_json_data, results)
        seconds = {"decode_seconds": decode_seconds, "seconds": time.perf_counter() - started}
        blend = {"blend": {"folder": flags.blend, "weight": ranker.blend.weight}} if ranker.blend else {}
        purchases = read_purchases(flags.train_file, inputs.items) if flags.train_file else None
        groups = groups_of(inputs, ranks, of_items, purchases, length)
        of_seen = {"exclude_seen": flags.exclude_seen, "seen_penalty": ranker.seen_penalty}
        seen = {name: value for name, value in of_seen.items() if value}
        summary = {**metrics, **({"items": by_item} if by_item else {}), **groups, **blend, **seen}
        with writing(flags.metrics_path):
            write_json(flags.metrics_path, {**summary, "rows": len(results), **seconds})
        print(format_metrics(metrics))
        if inputs.items and by_item:
            order = "the most bought first" if flags.train_file else "in the order of --info_file"
            sharing = f"{inputs.items.num_sharing} of {len(inputs.items)} share theirs and follow each other, {order}:"
            print(f"items instead of SIDs, {sharing}")
            print(format_metrics(by_item))
        if purchases:
            of_popularity = ranks_of_popularity(inputs, purchases, flags.exclude_seen, length)
            print("popularity, for comparison:")
            print(format_metrics(ranking_metrics(of_popularity, length, flags.K)))
        for name, of_groups in groups.items():
            print(format_groups({"targets": "targets, bought", "histories": "histories"}[name], of_groups))
        print(f"{len(results)} rows, {len(results) / decode_seconds:.1f} rows/s; rankings in {flags.result_json_data}")
    return metrics


def choose(flags: EvaluateFlags, inputs: EvaluateInput, ranker: "Ranker", is_main: bool) -> None:
    """Lets the ranker use the best weight of SASRec and penalty by the validation rows, as far as they are auto; prints
    them and, unless these rows are learned, records them."""
    from minionerec.training import nodes

    weights = blending.WEIGHTS if "blend_weight" in flags.automatic else (inputs.scoring.numbers[0] or 0.0,)
    penalties = blending.PENALTIES if flags.seen_penalty == "auto" else (flags.seen_penalty,)
    pairs = [*product(weights, penalties)]
    weighed = ranker.weigh(inputs.weighed, pairs, flags.length_penalty, flags.exclude_seen)
    tried = nodes.first_decides(lambda: weighed)  # their devices may round differently
    weight, penalty = blending.best_pair(tried)
    scoring = inputs.scoring.with_numbers(weight, penalty)
    ranker.blend, ranker.seen_penalty = scoring.blend, penalty
    if is_main:
        metric, rows = f"NDCG@{watched_cutoff(ranker.length)}", len(inputs.weighed)
        both = len(flags.automatic) == 2
        if "blend_weight" in flags.automatic:
            with_other = f" with seen_penalty {penalty:g}" if both else ""
            print(f"weight of {flags.blend}{with_other}, {metric} on {rows} rows of {inputs.eval_file}:")
            print_tried("weight", weight, {other: tried[other, penalty] for other in weights})
        if "seen_penalty" in flags.automatic:
            with_other = f" with weight {weight:g}" if both else ""
            print(f"seen_penalty{with_other}, {metric} on {rows} rows of {inputs.eval_file}:")
            print_tried("seen_penalty", penalty, {other: tried[weight, other] for other in penalties})
        if inputs.recordable:
            by = {"checkpoint": inputs.checkpoint.path, "eval_file": inputs.eval_file, "rows": rows, "metric": metric}
            how = {"exclude_seen": flags.exclude_seen, "length_penalty": flags.length_penalty}
            scoring.record(flags.automatic, flags.num_beams, tried, **how, **by)


def print_tried(name: str, used: float, tried: dict[float, float]) -> None:
    """The metric of each number that was tried, and which is used."""
    print("  ".join(f"{number:g}: {value:.4f}" for number, value in tried.items()))
    alike = ": all give the same ranking of these rows" if len(set(tried.values())) == 1 else ""
    print(f"{name} {used:g} is used{alike}")


@dataclass(frozen=True)
class Purchases:
    """What was bought in a training file.

    Attributes:
        sids: how often each SID is the target of a row, in order of first appearance.
        seen: the SIDs of histories.
        items, seen_items: the same of item ids, where items share SIDs.
    """

    sids: Counter[str]
    seen: set[str]
    items: Counter[str]
    seen_items: set[str]

    def of_sid(self, sid: str) -> int:
        """How often a SID was bought: at least once where it is in a history."""
        return self.sids[sid] or int(sid in self.seen)

    def of_item(self, item: str) -> int:
        """As `of_sid`."""
        return self.items[item] or int(item in self.seen_items)


def read_purchases(train_file: str, items: Items | None) -> Purchases:
    """The purchases of a training file, those of `items` too. Where it does not say which item of a SID a history
    means (no column history_item_id), each of them counts as seen."""
    found = Purchases(Counter(), set(), Counter(), set())
    for row in read_interactions(train_file, "train_file", titles=False):
        found.sids[row.sid] += 1
        found.seen.update(row.sid_history)
    if items:
        found.items.update(read_item_ids(train_file, "train_file"))
        try:
            for history in read_item_histories(train_file, "train_file"):
                found.seen_items.update(history)
        except InputError:
            shared = (number for sid in found.seen for number in items.of_sid.get(sid, ()))
            found.seen_items.update(items.all[number].id for number in shared)
    return found


def ranks_of_popularity(
    inputs: EvaluateInput, purchases: Purchases, exclude_seen: ExcludeSeen, length: int
) -> list[int | None]:
    """As the ranks of the model, those of a ranking of SIDs by purchases, which leaves out the same of histories."""
    known = set(inputs.sids)
    top = popularity((sid for sid in purchases.sids.elements() if sid in known), len(known))
    places = {sid: place for place, sid in enumerate(top)}
    return [rank_without(row.sid, places, seen_sids(row, exclude_seen), length) for row in inputs.examples]


def groups_of(
    inputs: EvaluateInput,
    ranks: Sequence[int | None],
    of_items: Sequence[int | None] | None,
    purchases: Purchases | None,
    length: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Where a model is weak: metrics by the length of the history, and where the training file is known by how often
    the target was bought there. Those of items go by the purchases of the item, not of its SID. Arguments as in
    `metrics_of_groups`."""
    histories = [history_group(len(row.sid_history)) for row in inputs.examples]
    by = {"histories": (HISTORIES, histories, histories)}
    if purchases:
        times = [purchases.of_sid(row.sid) for row in inputs.examples]
        times_of_items = times  # a target that is not in the catalogue is known by its SID
        if inputs.items and inputs.targets:
            pairs = zip(inputs.targets, times, strict=True)
            times_of_items = [t if n is None else purchases.of_item(inputs.items.all[n].id) for n, t in pairs]
        by = {"targets": (TARGETS, [*map(bought_group, times)], [*map(bought_group, times_of_items)]), **by}
    return {name: _metrics_of_both(*groups, ranks, of_items, length) for name, groups in by.items()}


def _metrics_of_both(
    order: Sequence[str],
    groups: Sequence[str],
    groups_of_items: Sequence[str],
    ranks: Sequence[int | None],
    of_items: Sequence[int | None] | None,
    length: int,
) -> dict[str, dict[str, float]]:
    """The metrics of SIDs by `groups`, and those of items, where there are any, by groups of their own."""
    found = metrics_of_groups(groups, order, ranks, length)
    if of_items is None:
        return found
    more = metrics_of_groups(groups_of_items, order, of_items, length, OF_ITEMS)
    lacking = {"rows": 0}, {f"{OF_ITEMS}rows": 0}
    both = (group for group in order if group in found or group in more)
    return {group: {**found.get(group, lacking[0]), **more.get(group, lacking[1])} for group in both}


if __name__ == "__main__":
    cli.run(evaluate)
