"""What a training would do, without loading a weight: rows and tokens of every task, steps, peak memory, and whether it
fits the device."""

import json
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from minionerec import world
from minionerec.data.encoding import Encoder, batches
from minionerec.data.examples import BATCH_ROWS
from minionerec.decoding.probe import may_share_rows
from minionerec.dryrun.memory import GB, Adapt, Prediction, Step, cache_gb, predict
from minionerec.flags import OPTIMIZERS, AdapterFlags, memory_gb
from minionerec.model import device
from minionerec.model.token_trees import TreeCollator
from minionerec.training.sft_trainer import step_order
from minionerec.training.tree_batches import Prefixes, TreeBatches


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
        vocabulary = len(self.tokenizer)
        return predict(self.config, vocabulary, self.sid_token_ids, step, flags, self.adapt, on_gpu, reference_copy)


def say_tasks(encoder: Encoder, rows_of: Callable[[str], Iterable]) -> tuple[int, int, int, int]:
    """Prints a line for every task; returns how many examples there are, the tokens of all, and the most tokens of one
    and of a response."""
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
    return examples, total, longest, longest_response


def say_flags(flags: AdapterFlags) -> None:
    """Prints the resolved configuration."""
    print(json.dumps({name: value for name, value in flags.to_dict().items() if value not in ("", None)}, indent=2))


def detect_device(gpu_memory: str) -> tuple[bool, float, str]:
    """(whether it is a GPU, its memory in GB, its name): of `gpu_memory`, such as 12GB, or of what this machine has."""
    if gpu_memory:
        return True, memory_gb(gpu_memory), f"a GPU with {gpu_memory}"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(device.local_device())
        return True, card.total_memory / GB, card.name
    return False, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB, "the CPU of this machine"


def print_memory(predicted: Prediction, size: float, name: str, suggest: Callable[[], str]) -> Prediction:
    """Prints the prediction, and where it does not fit what would; returns it."""
    print(f"\ntrainable parameters: {predicted.trainable:,}")
    print("predicted peak memory of one device, in GB:")
    for part, value in {**predicted.parts, "total": predicted.total}.items():
        print(f"  {part:<12}{value:8.2f}")
    if predicted.total <= size:
        print(f"fits {name}: {predicted.total:.1f} of {size:.1f} GB")
    else:
        print(f"does not fit {name}: {predicted.total:.1f} of {size:.1f} GB; {suggest()}")
    return predicted


def _settings_to_try(flags: AdapterFlags) -> Iterable[dict[str, Any]]:
    """Settings to try, cheapest first: checkpointing, an adapter, a base in 8 and in 4 bits, an optimizer in 8 bits."""
    frozen = {"freeze_LLM": False} if flags.method == "freeze_LLM" else {}
    methods: list[dict] = [{}]
    if not flags.adapted:
        methods.append({"use_lora": True, **frozen})
    if flags.bits == 16:
        methods.append({"use_lora": True, "load_in_8bit": True, **frozen})
    if not flags.use_qlora:
        methods.append({"use_qlora": True, "use_lora": False, "load_in_8bit": False, **frozen})
    for method in methods:
        for checkpointing in sorted({flags.gradient_checkpointing, True}):
            yield {**method, "gradient_checkpointing": checkpointing}
    if OPTIMIZERS[flags.optim] > OPTIMIZERS["adamw_8bit"]:
        yield {**methods[-1], "gradient_checkpointing": True, "optim": "adamw_8bit"}


def suggestion(flags: Any, batch: str, size: float, total_of: Callable[[Any], float], least: int = 1) -> str:
    """The first settings that fit `size` GB, as flags, each with the largest micro-batch that does, but not below
    `least` rows. `total_of(flags)` is the predicted total, in GB, which grows with the micro-batch."""
    most = getattr(flags, batch)
    halves = [most >> times for times in range(most.bit_length())]
    sizes = [rows for rows in halves if rows >= least] or halves[:1]
    for changes in _settings_to_try(flags):

        def fits(rows: int, changes: dict = changes) -> bool:
            return total_of(replace(flags, **changes, **{batch: rows})) <= size

        if fits(sizes[-1]):
            rows = sizes[bisect_left(sizes, True, hi=len(sizes) - 1, key=fits)]
            said = {name: value for name, value in {**changes, batch: rows}.items() if value != getattr(flags, name)}
            return "this does: " + " ".join(f"--{name} {value}" for name, value in said.items())
    return "nor does anything else here: take a smaller model, or a smaller --cutoff_len"


def _sft_steps(inputs: Inputs, tokens: int, response: int, dataset: Dataset | None, on_gpu: bool) -> Callable:
    """What gives, for flags of sft.py, the largest micro-batch, a `Step`: of rows of up to `tokens` tokens, of which
    `response` are the response's, or of the token trees of a dataset."""
    if dataset is not None:
        prefixes = Prefixes(dataset)
        collate = TreeCollator(0, inputs.config.get_text_config().hidden_size, 16 if on_gpu else 1)

    def step_of(flags: Any) -> Step:
        rows = flags.micro_rows
        if dataset is None:
            return Step(rows, tokens, rows * response, accumulate=flags.batch_size > rows * world.size())
        plan = _tree_batches(flags, prefixes)
        largest = collate(dataset.__getitems__(plan.survey()[2].tolist()))
        rows, width = largest["input_ids"].shape
        predicting = len(largest["predicting"])
        return Step(rows, width, predicting, shared=True, accumulate=plan.accumulation > 1, trees=True)

    return step_of


def largest_micro_batch(
    flags: Any, inputs: Inputs, dataset: Dataset, memory: float, predicted: Callable[[Any], float] | None = None
) -> int:
    """How many rows of sft.py to compute in one forward pass: the most that divide the rows of a step on one process
    and are predicted to fit `memory` (GB) on a GPU, but 1 at least.

    Args:
        predicted: of flags, the memory in GB; None for the prediction of the dry run.
    """
    if predicted is None:
        length, prompt = (np.array(dataset[name][:]) for name in ("length", "prompt_length"))
        merged = dataset if flags.rows_together > 0 and may_share_rows(inputs.config) else None
        step_of = _sft_steps(inputs, int(length.max()), int((length - prompt).max()), merged, on_gpu=True)

        def predicted(flags: Any) -> float:
            return inputs.predict(step_of(flags), flags, on_gpu=True).total

    of_process = flags.batch_size // world.size()
    sizes = [rows for rows in range(of_process, 0, -1) if of_process % rows == 0]

    def fits(rows: int) -> bool:
        return predicted(replace(flags, micro_batch_size=rows)) <= (1 - SPARE) * memory

    return sizes[bisect_left(sizes, True, hi=len(sizes) - 1, key=fits)]


def sft(flags: Any, inputs: Inputs, training_examples: Callable[[], Dataset]) -> Prediction:
    """The dry run of sft.py, of its flags; `training_examples()` tokenizes them, or finds them in the cache."""
    say_flags(flags)
    examples, total, tokens, response = say_tasks(inputs.encoder, inputs.rows_of)
    steps = math.ceil(examples / flags.batch_size)
    print(f"\n{examples:,} examples; {steps:,} steps an epoch, at most {steps * flags.num_epochs:,} in all")
    on_gpu, size, name = detect_device(flags.gpu_memory)
    merges = flags.rows_together > 0 and may_share_rows(inputs.config)
    if flags.micro_batch_size == "auto" and on_gpu:
        flags = replace(flags, micro_batch_size=largest_micro_batch(flags, inputs, training_examples(), size))
        print(f"--micro_batch_size auto: {flags.micro_rows} rows")
    if merges:
        dataset = training_examples()
        prefixes = Prefixes(dataset)
        collate = TreeCollator(0, inputs.config.get_text_config().hidden_size, 16 if on_gpu else 1)
        print(_tree_batches(flags, prefixes).summary())
    elif flags.rows_together:
        print(f"token trees: off; every row is computed by itself, since {inputs.config.model_type} ignores 4-D masks")
    step_of = _sft_steps(inputs, tokens, response, dataset if merges else None, on_gpu)

    def predicted(flags: Any) -> Prediction:
        return inputs.predict(step_of(flags), flags, on_gpu)

    def suggest() -> str:
        numbered = replace(flags, micro_batch_size=flags.micro_rows)
        return suggestion(numbered, "micro_batch_size", size, lambda flags: predicted(flags).total)

    found, step = print_memory(predicted(flags), size, name, suggest), step_of(flags)
    if not flags.gpu_memory:  # else the card is not here
        positions, predicting = total / examples * flags.batch_size, response * flags.batch_size
        if merges:  # of one optimizer step
            parts = [part for part in next(_tree_batches(flags, prefixes).steps()) if len(part)]
            positions = sum(prefixes.size(part).nodes for part in parts)
            trees = (collate(dataset.__getitems__(part.tolist())) for part in parts)
            predicting = sum(len(batch["predicting"]) for batch in trees)
        work = (
            found.flops / (step.rows * step.tokens) * positions + found.head_flops / step.response_tokens * predicting
        )
        work /= world.size()
        speed = _matmul_speed(step.rows * step.tokens, inputs.config, device.compute_dtype(flags.bits < 16))
        print(
            f"about {_two_digits(work / speed)} s a step and {_two_digits(work / speed * steps / 3600)} h an epoch, or "
            f"more: a step has {work / 1e12:.2g} TFLOP of matmuls, which reach {speed / 1e12:.2g} TFLOP/s here now"
        )
    return found


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,g}"


def _matmul_speed(positions: int, config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """FLOP/s on this device: `positions` hidden states times a feed-forward weight of the model, median of five."""
    text, where = config.get_text_config(), {"device": device.local_device(), "dtype": dtype}
    hidden = torch.ones(positions, text.hidden_size, **where)
    weight = torch.ones(text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size, **where)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        (hidden @ weight)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2 * hidden.numel() * weight.shape[1] / median(seconds[1:])


def _tree_batches(flags: Any, prefixes: Prefixes) -> TreeBatches:
    order = step_order(prefixes, flags.rows_together, flags.batch_size, flags.seed)
    return TreeBatches(prefixes, order, flags.num_epochs, flags.micro_rows, flags.batch_size, world.size())


SPARE = 0.1  # of a GPU's memory, for what the allocator cannot use and the prediction misses


def largest_pass(flags: Any, inputs: Inputs, tokens: int, depth: int, continues: bool, memory: float) -> int:
    """How many completions of a step of rl.py to compute in one pass: all of them, or the largest half, quarter and so
    on that is predicted to fit `memory` (GB), in whole groups. At least `train_batch_size`, which is the user's choice.

    Args:
        tokens: of the longest prompt.
        depth, continues: as in `rl`.
    """
    group, size = flags.num_generations, flags.train_batch_size * flags.gradient_accumulation_steps
    while size > max(flags.train_batch_size, group):
        if (
            predict_rl(
                replace(flags, train_batch_size=size, gradient_accumulation_steps=1),
                inputs,
                tokens,
                depth,
                continues,
                on_gpu=True,
            ).total
            <= (1 - SPARE) * memory
        ):
            return size
        size = math.ceil(size / 2 / group) * group
    return flags.train_batch_size


def predict_rl(flags: Any, inputs: Inputs, tokens: int, depth: int, continues: bool, on_gpu: bool) -> Prediction:
    """The memory of rl.py with passes of `train_batch_size` completions; the other arguments as in `largest_pass`."""
    group, config = flags.num_generations, inputs.config
    # The training step.
    completions, accumulate = flags.train_batch_size, flags.gradient_accumulation_steps > 1
    if may_share_rows(config):
        # A group whose completions are spread over several passes takes its prompt along into each.
        rows, in_row = math.ceil(completions / group), min(group, completions)
        # A completion's last token is predicted and predicts nothing; its first is predicted by the prompt.
        learnt = 1 if flags.sft_weight else 0  # the target is one more completion of its prompt
        width = tokens + (in_row + learnt) * (depth - 1)
        predicting = rows + (completions + learnt * rows) * (depth - 1)
        step = Step(rows, width, predicting, True, accumulate, rewarded=True)
    else:
        learnt = math.ceil(completions / group) if flags.sft_weight else 0
        rows = completions + learnt
        step = Step(rows, tokens + depth, rows * depth, False, accumulate, rewarded=True)
    result = inputs.predict(step, flags, on_gpu, reference_copy=flags.method == "full" and flags.beta > 0)
    parts = dict(result.parts)
    if continues and flags.beta:
        parts["adapter"] *= 2  # the reference's
    if flags.average_weights:
        parts["average"] = parts["gradients"]  # as many float32 values
    # Completions are drawn before a step, in the place of its activations.
    drawn = group * 3 // 2 if flags.dynamic_sampling else group
    asked = min(completions, completions * flags.gradient_accumulation_steps // group)
    cache = cache_gb(config, asked, tokens, drawn, depth, on_gpu)
    if flags.test_during_training:
        asked = math.ceil(flags.eval_batch_size / flags.test_beam)
        cache = max(cache, cache_gb(config, asked, tokens, flags.test_beam, depth, on_gpu))
    parts["cache"] = max(cache - parts["activations"] - parts["logits"], 0.0)
    return replace(result, parts=parts)


def rl(flags: Any, inputs: Inputs, prompts: list[list[int]], steps: int, depth: int, continues: bool) -> Prediction:
    """The dry run of rl.py, of its flags, for completions of at most `depth` tokens.

    Args:
        prompts: token ids of all training prompts.
        continues: the checkpoint's own adapter trains on.
    """
    say_flags(flags)
    say_tasks(inputs.encoder, inputs.rows_of)
    lengths = sorted(map(len, prompts))
    print(
        f"\n{len(lengths):,} prompts of {median(lengths):.0f} tokens (median), {lengths[-1]} at most; {steps:,} steps"
    )
    on_gpu, size, name = detect_device(flags.gpu_memory)
    if not may_share_rows(inputs.config):
        print(f"predicted for completions that each repeat their prompt: {inputs.config.model_type} ignores 4-D masks")

    def predicted(flags: Any) -> Prediction:
        return predict_rl(flags, inputs, lengths[-1], depth, continues, on_gpu)

    def suggest() -> str:
        least = flags.num_generations
        return suggestion(flags, "train_batch_size", size, lambda flags: predicted(flags).total, least)

    found = print_memory(predicted(flags), size, name, suggest)
    if on_gpu and found.total <= size:
        passes = largest_pass(flags, inputs, lengths[-1], depth, continues, size)
        print(f"a run takes passes of up to {passes} completions, as many as the memory is predicted to hold")
    return found
