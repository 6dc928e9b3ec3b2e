"""What a training would do, without loading a weight: rows and tokens of every task, steps, peak memory, whether it
fits the device, and about how long it takes."""

import json
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from minionerec import world
from minionerec.cards import Card, find_card
from minionerec.data.encoding import Encoder, batches
from minionerec.data.examples import BATCH_ROWS
from minionerec.decoding.probe import may_share_rows
from minionerec.decoding.search_memory import SPARE, feed_forward_width, search_gb
from minionerec.dryrun import work
from minionerec.dryrun.memory import GB, Adapt, Prediction, predict
from minionerec.dryrun.passes import Measured, Step, Work
from minionerec.errors import InputError, Problems
from minionerec.flags import OPTIMIZERS, AdapterFlags, RunFlags, TrainingFlags, memory_gb
from minionerec.flags.rl import RLFlags
from minionerec.flags.sft import SFTFlags
from minionerec.model import device
from minionerec.model.adapted import check_dora
from minionerec.model.token_trees import TreeCollator
from minionerec.training.sft_trainer import step_order
from minionerec.training.tree_batches import Prefixes, TreeBatches

SEARCH_KERNELS = 30  # of a level of a search, outside the model: benchmarks/launches.py
Flags = TypeVar("Flags", bound=TrainingFlags)


@dataclass
class Inputs:
    """The objects that the training itself would use.

    Attributes:
        config: of the base.
        tokenizer: with the SID tokens.
        sid_token_ids: the rows that an adapter would train.
        encoder, rows_of: of the training examples, as in `write_examples`.
        adapt: as in `predict`.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerFast
    sid_token_ids: list[int]
    encoder: Encoder
    rows_of: Callable[[str], Iterable]
    adapt: Adapt

    def predict(self, step: Step, flags: AdapterFlags, on_gpu: bool, reference_copy: bool = False) -> Prediction:
        """Raises InputError for what the run itself would refuse."""
        if not on_gpu:
            check_dora(flags.use_dora, flags.bits, "--use_dora True")
        vocabulary = len(self.tokenizer)
        return predict(self.config, vocabulary, self.sid_token_ids, step, flags, self.adapt, on_gpu, reference_copy)

    def count(self, step: Step, flags: AdapterFlags) -> Measured:
        """The work of a micro-batch on a GPU."""
        return work.count(self.config, len(self.tokenizer), self.sid_token_ids, step, flags, self.adapt)


class Tasks(NamedTuple):
    """How many training examples there are, the tokens of all, and the most tokens of one and of a response."""

    examples: int
    tokens: int
    longest: int
    longest_response: int


def print_tasks(encoder: Encoder, rows_of: Callable[[str], Iterable]) -> Tasks:
    """Prints a line for every task; returns what they are together."""
    examples = total = longest = longest_response = 0
    print(f"\n{'task':<32}{'rows':>10}{'weight':>8}{'tokens: median':>16}{'95%':>6}{'longest':>9}{'response':>10}")
    for task in encoder.prompts.tasks.values():
        lengths, responses = [], []
        for rows in batches(rows_of(task.rows), BATCH_ROWS):
            for prompt, response in encoder.encode(task, list(filter(task.suits, rows))):
                lengths.append(len(prompt) + len(response))
                responses.append(len(response))
        if not lengths:  # every row lacks a text that the task needs
            print(f"{task.name:<32}{0:>10}{task.weight:>8}")
            continue
        lengths.sort()
        print(
            f"{task.name:<32}{len(lengths):>10,}{task.weight:>8}{median(lengths):>16.0f}"
            f"{lengths[int(0.95 * (len(lengths) - 1))]:>6}{lengths[-1]:>9}{max(responses):>10}"
        )
        examples += len(lengths) * task.weight
        total += sum(lengths) * task.weight
        longest, longest_response = max(longest, lengths[-1]), max(longest_response, *responses)
    if encoder.control_note:
        print(encoder.control_note)
    return Tasks(examples, total, longest, longest_response)


def print_flags(flags: AdapterFlags) -> None:
    """Prints the resolved configuration."""
    print(json.dumps({name: value for name, value in flags.to_dict().items() if value not in ("", None)}, indent=2))


@dataclass(frozen=True)
class Device:
    """What a training would run on.

    Attributes:
        name: for messages.
        memory: in GB.
        on_gpu: whether it is a GPU.
        here: whether it is in this machine.
        card: its data sheet, where `--gpu` names it.
    """

    name: str
    memory: float
    on_gpu: bool
    here: bool = False
    card: Card | None = None


def detect_device(flags: RunFlags) -> Device:
    """The card of `--gpu`, one with `--gpu_memory`, or what this machine has."""
    if card := find_card(flags.gpu):
        return Device(card.name, card.memory, True, card=card)
    if flags.gpu_memory:
        return Device(f"a GPU with {flags.gpu_memory}", memory_gb(flags.gpu_memory), True)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(device.local_device())
        return Device(found.name, found.total_memory / GB, True, here=True)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    return Device("the CPU of this machine", memory, False, here=True)


def print_memory(predicted: Prediction, where: Device, suggest: Callable[[], str]) -> Prediction:
    """Prints the prediction, and where it does not fit what would; returns it."""
    print(f"\ntrainable parameters: {predicted.trainable:,}")
    print("predicted peak memory of one device, in GB:")
    for part, value in {**predicted.parts, "total": predicted.total}.items():
        print(f"  {part:<12}{value:8.2f}")
    if predicted.total <= where.memory:
        print(f"fits {where.name}: {predicted.total:.1f} of {where.memory:.1f} GB")
    else:
        print(f"does not fit {where.name}: {predicted.total:.1f} of {where.memory:.1f} GB; {suggest()}")
    return predicted


def print_time(
    of_step: Work, where: Device, positions: int, config: PreTrainedConfig, bits: int, steps: int, epochs: int
) -> None:
    """Prints about how long a step, an epoch and the run take, without evaluations.

    Args:
        of_step: on one process.
        positions: tokens of a micro-batch, the size of the matmuls that are timed on a device that is here.
        steps: of all epochs.
    """

    def said(seconds: float) -> str:
        hours = [_two_digits(seconds * count / 3600) for count in (steps / epochs, steps)]
        return f"{_two_digits(seconds)} s a step, {hours[0]} h an epoch and {hours[1]} h in all"

    work_in_words = f"{_two_digits(of_step.flops / 1e12)} TFLOP"
    if where.here:
        speed = _matmul_speed(positions, config, device.compute_dtype(bits < 16))
    if not where.on_gpu:
        print(
            f"about {said(of_step.flops / speed)}, or more: a step has {work_in_words} of matmuls, "
            f"which now reach {speed / 1e12:.2g} TFLOP/s here"
        )
        return
    card = where.card
    if card is None:
        card = Card(where.name, where.memory, _copy_speed() / work.OF_BANDWIDTH / 1e9, speed / work.OF_MATMULS / 1e12)
    found = work.on_card(of_step, card)
    print(
        f"estimated for {card.name}: {said(found.seconds)}, without evaluations. Of a step, {work_in_words} take "
        f"{_two_digits(found.arithmetic)} s, {_two_digits(of_step.moved / 1e9)} GB of memory traffic "
        f"{_two_digits(found.memory)} s, starting {of_step.kernels:,.0f} kernels {_two_digits(found.launches)} s; the "
        "longest counts"
    )


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,g}"


def _matmul_speed(positions: int, config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """FLOP/s on this device: `positions` hidden states times a feed-forward weight of the model, median of five."""
    text, where = config.get_text_config(), device.local_device()
    inner = feed_forward_width(config)
    hidden = torch.ones(positions, text.hidden_size, device=where, dtype=dtype)
    weight = torch.ones(text.hidden_size, inner, device=where, dtype=dtype)
    return 2 * hidden.numel() * weight.shape[1] / _seconds(lambda: hidden @ weight)


def _copy_speed() -> float:
    """Bytes a second that a copy reads and writes on this device, median of five."""
    values = torch.ones(2**26, device=device.local_device())
    return 2 * values.nbytes / _seconds(values.clone)


def _seconds(compute: Callable[[], torch.Tensor]) -> float:
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        compute().flatten()[0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


# --- What else would fit ----------------------------------------------------------------------------------------------


def _settings_to_try(flags: AdapterFlags) -> Iterable[dict[str, bool | str]]:
    """Settings to try, cheapest first: checkpointing, an adapter, a base in 8 and in 4 bits, an optimizer in 8 bits."""
    frozen = {"freeze_LLM": False} if flags.method == "freeze_LLM" else {}
    methods: list[dict[str, bool | str]] = [{}]
    takes_adapter = not (isinstance(flags, SFTFlags) and flags.train_from_scratch)
    if takes_adapter and not flags.adapted:
        methods.append({"use_lora": True, **frozen})
    if takes_adapter and flags.bits == 16:
        methods.append({"use_lora": True, "load_in_8bit": True, **frozen})
    if takes_adapter and not flags.use_qlora:
        methods.append({"use_qlora": True, "use_lora": False, "load_in_8bit": False, **frozen})
    methods = [method for method in methods if not method or _takes(flags, method)]
    for method in methods:
        for checkpointing in sorted({flags.gradient_checkpointing, True}):
            yield {**method, "gradient_checkpointing": checkpointing}
    if OPTIMIZERS[flags.optim] > OPTIMIZERS["adamw_8bit"]:
        yield {**methods[-1], "gradient_checkpointing": True, "optim": "adamw_8bit"}


def _takes(flags: AdapterFlags, changes: dict) -> bool:
    """Whether the other flags of an adapter go with these changes: a base in 4 bits has no orthogonal start."""
    problems = Problems()
    AdapterFlags.check(replace(flags, **changes), problems)
    return not problems


def suggestion(
    flags: Flags, batch: str, sizes: Sequence[int], memory: float, total_of: Callable[[Flags], float]
) -> str:
    """The first settings that fit `memory` GB, as flags, each with the largest of the `sizes` of the flag `batch` that
    does; they fall. `total_of(flags)` is the predicted total, in GB, which grows with the size; it may raise
    InputError."""
    for changes in _settings_to_try(flags):

        def fits(rows: int, changes: dict = changes) -> bool:
            changed: dict = {**changes, **_of_size(flags, batch, rows)}
            try:
                return total_of(replace(flags, **changed)) <= memory
            except InputError:  # the run would refuse them
                return False

        if fits(sizes[-1]):
            rows = sizes[bisect_left(sizes, True, hi=len(sizes) - 1, key=fits)]
            changed = {**changes, **_of_size(flags, batch, rows)}
            said = {name: value for name, value in changed.items() if value != getattr(flags, name)}
            return "this fits: " + " ".join(f"--{name} {value}" for name, value in said.items())
    shorter = ", or a smaller --cutoff_len" if isinstance(flags, SFTFlags) else ""
    return f"no other setting tried here fits: take a smaller model{shorter}"


def _of_size(flags: TrainingFlags, batch: str, rows: int) -> dict[str, int]:
    """The flags of a smaller batch in the same optimizer step."""
    if isinstance(flags, RLFlags):
        step = flags.train_batch_size * flags.gradient_accumulation_steps
        return {batch: rows, "gradient_accumulation_steps": step // rows}
    return {batch: rows}


def _divisors(number: int) -> list[int]:
    """From the largest on."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def smaller_micro_batches(flags: SFTFlags) -> list[int]:
    """The sizes of a micro-batch of sft.py up to its own, which divide the rows of a step on one process."""
    return [rows for rows in _divisors(flags.batch_size // world.size()) if rows <= flags.micro_rows]


def smaller_passes(flags: RLFlags) -> list[int]:
    """The completions of a pass of rl.py, a half of them and so on, as long as these are whole groups and divide the
    step."""
    most = flags.train_batch_size
    halves = (most >> times for times in range(most.bit_length()))
    step = most * flags.gradient_accumulation_steps
    return [size for size in halves if size % flags.num_generations == 0 and step % size == 0] or [most]


# --- SFT --------------------------------------------------------------------------------------------------------------


class StepSize(NamedTuple):
    """An optimizer step, over all processes: tokens, those that the output head runs on, and micro-batches."""

    positions: float
    predicting: float
    micro_batches: int


class MicroBatches:
    """The micro-batches of sft.py: token trees of the rows of a dataset, or without one separate rows.

    Args:
        tokens, response: of the longest row, and of the longest response.
    """

    def __init__(self, inputs: Inputs, tokens: int, response: int, dataset: Dataset | None, on_gpu: bool):
        self.tokens, self.response, self.dataset = tokens, response, dataset
        if dataset is not None:
            self.prefixes = Prefixes(dataset)
            self.collate = TreeCollator(0, inputs.config.get_text_config().hidden_size, 16 if on_gpu else 1)

    def trees(self, flags: SFTFlags) -> TreeBatches:
        """Those of token trees."""
        order = step_order(self.prefixes, flags.rows_together, flags.batch_size, flags.seed)
        sizes = flags.num_epochs, flags.micro_rows, flags.batch_size
        return TreeBatches(self.prefixes, order, *sizes, world.size())

    def largest(self, flags: SFTFlags) -> Step:
        """The one that needs the most memory."""
        rows = flags.micro_rows
        if self.dataset is None:
            accumulates = flags.batch_size > rows * world.size()
            return Step(rows, self.tokens, rows * self.response, accumulate=accumulates)
        trees = self.trees(flags)
        largest = self.collate(self.dataset.__getitems__(trees.survey()[2].tolist()))
        rows, width = largest["input_ids"].shape
        predicting = len(largest["predicting"])
        return Step(rows, width, predicting, shared=True, accumulate=trees.accumulation > 1, trees=True)

    def of_step(self, flags: SFTFlags, tasks: Tasks) -> StepSize:
        """A step of average rows; of token trees, the first one."""
        if self.dataset is None:
            positions = tasks.tokens / tasks.examples * flags.batch_size
            return StepSize(positions, self.response * flags.batch_size, flags.batch_size // flags.micro_rows)
        trees = self.trees(flags)
        parts = [part for part in next(trees.steps()) if len(part)]
        positions = sum(self.prefixes.size(part).nodes for part in parts)
        batches = (self.collate(self.dataset.__getitems__(part.tolist())) for part in parts)
        return StepSize(positions, sum(len(b["predicting"]) for b in batches), trees.accumulation * world.size())


def largest_micro_batch(flags: SFTFlags, inputs: Inputs, dataset: Dataset, memory: float) -> int:
    """How many rows of sft.py to compute in one forward pass: the most that divide the rows of a step on one process
    and are predicted to fit `memory` (GB) on a GPU, but 1 at least; as on a CPU where nothing can be predicted."""
    length, prompt = (np.array(dataset[name][:]) for name in ("length", "prompt_length"))
    merged = dataset if flags.rows_together > 0 and may_share_rows(inputs.config) else None
    micro_batches = MicroBatches(inputs, int(length.max()), int((length - prompt).max()), merged, on_gpu=True)
    sizes = _divisors(flags.batch_size // world.size())

    def fits(rows: int) -> bool:
        sized = replace(flags, micro_batch_size=rows)
        return inputs.predict(micro_batches.largest(sized), sized, on_gpu=True).total <= (1 - SPARE) * memory

    try:
        return sizes[bisect_left(sizes, True, hi=len(sizes) - 1, key=fits)]
    except InputError:  # of an architecture that cannot be predicted, but trained
        return flags.micro_rows


def sft(flags: SFTFlags, inputs: Inputs, training_examples: Callable[[], Dataset]) -> Prediction:
    """The dry run of sft.py, of its flags; `training_examples()` tokenizes them, or finds them in the cache."""
    print_flags(flags)
    tasks = print_tasks(inputs.encoder, inputs.rows_of)
    steps = math.ceil(tasks.examples / flags.batch_size)
    print(f"\n{tasks.examples:,} examples; {steps:,} steps an epoch, at most {steps * flags.num_epochs:,} in all")
    where = detect_device(flags)
    merges = flags.rows_together > 0 and may_share_rows(inputs.config)
    if flags.micro_batch_size == "auto" and where.on_gpu:
        rows = largest_micro_batch(flags, inputs, training_examples(), where.memory)
        flags = replace(flags, micro_batch_size=rows)
        print(f"--micro_batch_size auto: {rows} rows")
    dataset = training_examples() if merges else None
    micro_batches = MicroBatches(inputs, tasks.longest, tasks.longest_response, dataset, where.on_gpu)
    if merges:
        print(micro_batches.trees(flags).summary())
    elif flags.rows_together:
        print(f"token trees: off; every row is computed by itself, since {inputs.config.model_type} ignores 4-D masks")

    def predicted(flags: SFTFlags) -> Prediction:
        return inputs.predict(micro_batches.largest(flags), flags, where.on_gpu)

    def suggest() -> str:
        sizes = smaller_micro_batches(flags)
        return suggestion(flags, "micro_batch_size", sizes, where.memory, lambda flags: predicted(flags).total)

    found = print_memory(predicted(flags), where, suggest)
    if where.here or where.card:
        step = micro_batches.largest(flags)
        size = micro_batches.of_step(flags, tasks)
        of_step = _sft_work(found if not where.on_gpu else inputs.count(step, flags), step, size)
        of_step += work.update(found.trainable)
        steps_in_all = steps * flags.num_epochs
        bits = flags.bits
        print_time(of_step, where, step.rows * step.tokens, inputs.config, bits, steps_in_all, flags.num_epochs)
    return found


def _sft_work(found: Prediction | Measured, step: Step, size: StepSize) -> Work:
    """The work of an optimizer step on one process, of micro-batches of which `found` was the largest."""
    count = size.micro_batches / world.size()
    fill = size.positions / (step.rows * step.tokens) / size.micro_batches
    of_head = size.predicting / step.response_tokens / size.micro_batches
    return found.layers.times(count, fill) + found.head.times(count, of_head)


# --- RL ---------------------------------------------------------------------------------------------------------------


def largest_pass(flags: RLFlags, inputs: Inputs, tokens: int, depth: int, continues: bool, memory: float) -> int:
    """How many completions of a step of rl.py to compute in one pass: all of them, or the largest half, quarter and so
    on that is predicted to fit `memory` (GB), in whole groups. At least `train_batch_size`, which is the user's choice.

    Args:
        tokens: of the longest prompt.
        depth: of completions at most.
        continues: the checkpoint's own adapter trains on.
    """
    group, step = flags.num_generations, flags.train_batch_size * flags.gradient_accumulation_steps
    size = step
    while size > max(flags.train_batch_size, group):
        # All passes of a step but the first are made while the gradients of earlier ones are there.
        of_pass = replace(flags, train_batch_size=size, gradient_accumulation_steps=math.ceil(step / size))
        try:
            total = predict_rl(of_pass, inputs, tokens, depth, continues, on_gpu=True).total
        except InputError:  # of an architecture that cannot be predicted, but trained
            break
        if total <= (1 - SPARE) * memory:
            return size
        size = math.ceil(size / 2 / group) * group
    return flags.train_batch_size


def _rl_step(flags: RLFlags, config: PreTrainedConfig, tokens: int, depth: int) -> Step:
    """A pass of `train_batch_size` completions."""
    group, completions, accumulate = (
        flags.num_generations,
        flags.train_batch_size,
        flags.gradient_accumulation_steps > 1,
    )
    if may_share_rows(config):
        # A group whose completions are spread over several passes takes its prompt along into each.
        rows, in_row = math.ceil(completions / group), min(group, completions)
        # A completion's last token is predicted and predicts nothing; its first is predicted by the prompt.
        learned = 1 if flags.sft_weight else 0  # the target is one more completion of its prompt
        width = tokens + (in_row + learned) * (depth - 1)
        predicting = rows + (completions + learned * rows) * (depth - 1)
        return Step(rows, width, predicting, True, accumulate, rewarded=True)
    learned = math.ceil(completions / group) if flags.sft_weight else 0
    rows = completions + learned
    return Step(rows, tokens + depth, rows * depth, False, accumulate, rewarded=True)


def predict_rl(flags: RLFlags, inputs: Inputs, tokens: int, depth: int, continues: bool, on_gpu: bool) -> Prediction:
    """The memory of rl.py with passes of `train_batch_size` completions; the other arguments as in `largest_pass`."""
    group, config, completions = flags.num_generations, inputs.config, flags.train_batch_size
    flags = _without_dropout(flags)
    # The training step.
    step = _rl_step(flags, config, tokens, depth)
    result = inputs.predict(step, flags, on_gpu, reference_copy=flags.method == "full" and flags.beta > 0)
    parts = dict(result.parts)
    if flags.beta and (continues or flags.sync_ref_model):
        parts["adapter"] *= 2  # the reference's
    if flags.average_weights:
        parts["average"] = parts["gradients"]  # as many float32 values
    # Completions are sampled before a step, in the place of its activations.
    asked = min(completions, completions * flags.gradient_accumulation_steps // group)
    cache = search_gb(config, asked, tokens, _beams(flags), depth, on_gpu)
    if flags.test_during_training:
        asked = math.ceil(flags.eval_batch_size / flags.test_beam)
        cache = max(cache, search_gb(config, asked, tokens, flags.test_beam, depth, on_gpu))
    parts["cache"] = max(cache - parts["activations"] - parts["logits"], 0.0)
    return replace(result, parts=parts)


def _without_dropout(flags: RLFlags) -> RLFlags:
    """The flags as RL trains by them."""
    return replace(flags, lora_dropout=0.0) if flags.adapted else flags


def _beams(flags: RLFlags) -> int:
    """How many completions of a prompt are sampled."""
    return flags.num_generations * 3 // 2 if flags.dynamic_sampling else flags.num_generations


def rl(
    flags: RLFlags, inputs: Inputs, prompts: list[list[int]], steps: int, depth: int, shape: dict | None
) -> Prediction:
    """The dry run of rl.py, of its flags, for completions of at most `depth` tokens.

    Args:
        prompts: token ids of all training prompts.
        shape: flags of the checkpoint's own adapter, which an adapter run trains on; None for a whole model.
    """
    print_flags(flags)
    print_tasks(inputs.encoder, inputs.rows_of)
    lengths = sorted(map(len, prompts))
    longest = lengths[-1]
    print(f"\n{len(lengths):,} prompts of {median(lengths):.0f} tokens (median), {longest} at most; {steps:,} steps")
    where = detect_device(flags)
    if not may_share_rows(inputs.config):
        print(f"predicted for completions that each repeat their prompt: {inputs.config.model_type} ignores 4-D masks")

    def predicted(flags: RLFlags) -> Prediction:
        continues = shape is not None and flags.adapted
        flags = replace(flags, **shape) if shape and flags.adapted else flags  # of settings that are suggested
        return predict_rl(flags, inputs, longest, depth, continues, where.on_gpu)

    def suggest() -> str:
        sizes = smaller_passes(flags)
        return suggestion(flags, "train_batch_size", sizes, where.memory, lambda flags: predicted(flags).total)

    found = print_memory(predicted(flags), where, suggest)
    size = flags.train_batch_size
    if where.on_gpu and found.total <= where.memory:
        continues = shape is not None and flags.adapted
        size = largest_pass(flags, inputs, longest, depth, continues, where.memory)
        print(f"a run takes passes of up to {size} completions, as many as the memory is predicted to hold")
    if where.here or where.card:
        of_pass = replace(flags, train_batch_size=size)
        step = _rl_step(of_pass, inputs.config, longest, depth)
        counted = inputs.count(step, _without_dropout(flags)) if where.on_gpu else found
        passes = flags.train_batch_size * flags.gradient_accumulation_steps / size
        of_step = _rl_work(flags, counted, step, passes, median(lengths), depth, found.parts["weights"] * GB)
        of_step += work.update(found.trainable)
        positions, epochs = step.rows * step.tokens, flags.num_train_epochs
        print_time(of_step, where, positions, inputs.config, flags.bits, steps, epochs)
    return found


def _rl_work(
    flags: RLFlags,
    found: Prediction | Measured,
    step: Step,
    passes: float,
    tokens: float,
    depth: int,
    weights: float,
) -> Work:
    """The work of an optimizer step on one process.

    Args:
        found: of a pass, which `step` is.
        passes: of the policy; the size of the last one counts, not its kernels only.
        tokens: of a prompt.
        weights: bytes that every pass of a search reads.
    """
    whole, fill = math.ceil(passes), passes / math.ceil(passes)
    learning = (found.layers + found.head).times(whole, fill)
    reference = found.forward.times(whole, fill) if flags.beta else Work()
    # A search reads each prompt once, then a token of every beam.
    prompts = flags.train_batch_size * flags.gradient_accumulation_steps // flags.num_generations
    positions = prompts * (tokens + _beams(flags) * (depth - 1))
    read = found.forward.times(1, positions / (step.rows * step.tokens))
    search = Work(read.flops, read.moved + depth * weights, depth * (read.kernels + SEARCH_KERNELS))
    return learning + reference + search
