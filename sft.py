"""Supervised fine-tuning of a generative recommender: all weights, the SID rows only, LoRA or QLoRA.

Takes the flags and files of MiniOneRec's sft.py. New are the adapter flags, a loss that runs the output head on
response tokens only, exact resuming, and input that is checked before anything is loaded.

    python sft.py --base_model Qwen/Qwen2.5-0.5B --train_file train.csv --eval_file valid.csv --output_dir output/lora \
        --use_lora True --category Industrial_and_Scientific --sid_index_path index.json --item_meta_path item.json
    python sft.py ... --output_dir out/qlora --use_qlora True --micro_batch_size 16
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from minionerec import cli, world
from minionerec.checkpoint import check_base, run_record
from minionerec.data.files import Catalogue, Interaction, Item, read_catalogue, read_interactions, sample_rows
from minionerec.data.prompts import Prompts, load_prompts
from minionerec.data.texts import check_interactions, items_left_out
from minionerec.errors import Problems
from minionerec.flags import (
    TrainingFlags,
    above_zero,
    check_batch,
    check_cache,
    command,
    engine,
    flag,
    fraction_of_training,
    one_of,
    zero_or_more,
)
from minionerec.process_memory import importing

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainingArguments

    from minionerec.dryrun.memory import Prediction
    from minionerec.dryrun.report import Inputs
    from minionerec.training.tree_batches import TreeBatches


@dataclass(frozen=True, kw_only=True)
class SFTFlags(TrainingFlags):
    """The flags of sft.py beside those of all trainings."""

    base_model: str = flag("", "folder or hub name of the model to start from.")
    sample: int = flag(
        -1,
        "how many rows of each source to train on, chosen at random; -1 for all. Validation always uses all rows (the "
        "original samples those too).",
        lambda value: "must be above 0, or -1 for all rows" if value == 0 or value < -1 else None,
    )
    batch_size: int = flag(128, "rows of an optimizer step, over all processes.", above_zero)
    micro_batch_size: int | Literal["auto"] = flag(
        4,
        "rows of a forward pass on one process; auto for as many as the memory of the GPU is predicted to hold (4 at "
        "most on a CPU). The gradient does not depend on it.",
        lambda value: None if value == "auto" else above_zero(value),
    )
    num_epochs: int = flag(
        10, "passes over the training rows at most; three evaluations without a gain end the run.", above_zero
    )
    learning_rate: float = flag(
        3e-4,
        "peak of the schedule, which rises over 20 steps, or a tenth of a short run, and falls linearly.",
        above_zero,
    )
    sid_learning_rate: float = flag(
        0.0,
        "learning rate of the rows of SID tokens, which know nothing at the start; 0 for learning_rate. Full "
        "fine-tuning of a pre-trained model needs it: what suits its weights is too slow for new rows.",
        zero_or_more,
    )
    cutoff_len: int = flag(
        512,
        "tokens of a row at most; the oldest items of a history go first (the original cuts the beginning of the "
        "prompt).",
        lambda value: "must be 32 or more to hold a prompt" if value < 32 else None,
    )
    group_by_length: bool = flag(
        False, "put rows of similar length into the same optimizer step; those of a step always go by length."
    )
    pack_rows: int = flag(
        -1,
        "compute the common beginnings of the rows of an optimizer step once (token trees), and put up to this many "
        "rows that share much, such as a user's, into the same step. -1: a 32nd of batch_size. 1: steps stay random. 0 "
        "computes every row by itself, as is done for models whose attention takes no tree mask, and only then "
        "group_by_length has an effect.",
        lambda value: "must be 0 or more, or -1 for a 32nd of --batch_size" if value < -1 else None,
    )
    freeze_LLM: bool = flag(
        False,
        "train only the SID rows of the embedding matrices (the original leaves an output head of its own frozen).",
    )
    train_from_scratch: bool = flag(False, "random weights from base_model's configuration.")
    sid_init: str = flag(
        "text",
        "what the rows of new SID tokens start with: text (the mean of the title tokens of their items), mean (of all "
        "tokens of the base), or random, as in the original.",
        one_of("text", "mean", "random"),
    )
    eval_step: float = flag(
        0.05, "how often to evaluate and save, as a fraction of the training.", fraction_of_training
    )

    @property
    def method(self) -> str:
        """full, freeze_LLM, lora or qlora."""
        return "freeze_LLM" if self.freeze_LLM else super().method

    @property
    def micro_rows(self) -> int:
        """`micro_batch_size` as a number; of auto, the largest up to 4 that divides the rows of a process."""
        if self.micro_batch_size != "auto":
            return self.micro_batch_size
        return max(rows for rows in (1, 2, 3, 4) if self.batch_size % (rows * world.size()) == 0 or rows == 1)

    @property
    def rows_together(self) -> int:
        """`pack_rows` as a number of rows."""
        return max(self.batch_size // 32, 1) if self.pack_rows == -1 else self.pack_rows

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.adapted and (self.freeze_LLM or self.train_from_scratch):
            problems.add(
                "--freeze_LLM and --train_from_scratch train without an adapter; drop --use_lora / --use_qlora"
            )
        if self.freeze_LLM and self.train_from_scratch:
            problems.add(
                "--freeze_LLM and --train_from_scratch exclude each other: a frozen random model learns nothing"
            )
        if not self.category.strip():
            problems.add("--category is missing; say what the items are, such as Industrial_and_Scientific")
        check_batch(problems, self.batch_size, self.micro_rows)
        check_cache(problems)


@dataclass(frozen=True)
class SFTInput:
    """The files of a run, checked: wording of training and validation, catalogue, how many rows there are to train on,
    and lines about rows that are left out."""

    flags: SFTFlags
    prompts: Prompts
    eval_prompts: Prompts
    catalogue: Catalogue
    num_rows: int
    notes: list[str]

    def train_rows(self, kind: str) -> Iterable[Interaction | Item]:
        """Starts a pass over the interactions or items to train on."""
        flags = self.flags
        if kind == "item":
            items = self.catalogue.items_with_text()
            return sample_rows(items, len(items), flags.sample, flags.seed)
        rows = read_interactions(flags.train_file, "train_file", self.catalogue.sids, self.prompts.need_titles)
        return sample_rows(rows, self.num_rows, flags.sample, flags.seed)

    def eval_rows(self, _kind: str) -> Iterable[Interaction]:
        """Starts a pass over the validation interactions."""
        return read_interactions(self.flags.eval_file, "eval_file", self.catalogue.sids, self.eval_prompts.need_titles)


def read_input(flags: SFTFlags) -> SFTInput:
    """Checks the flags and every row of the files. Raises InputError with everything that is wrong."""
    problems = Problems()
    check_base(problems, flags.base_model)
    flags.check(problems)
    prompts = problems.attempt(load_prompts, flags.category, flags.prompt_file, flags.tasks)
    if prompts and all(task.rows == "item" for task in prompts.tasks.values()):
        problems.add(f"--tasks {flags.tasks!r}: needs a task on interactions to validate on")
    catalogue = problems.attempt(read_catalogue, flags.sid_index_path, flags.item_meta_path)
    sids = catalogue.sids if catalogue else None
    eval_prompts = prompts and prompts.for_validation()
    num_rows, notes = check_interactions(problems, "train_file", flags.train_file, sids, prompts)
    notes += check_interactions(problems, "eval_file", flags.eval_file, sids, eval_prompts)[1]
    notes += items_left_out(catalogue, prompts, flags.item_meta_path) + flags.notes
    problems.check()
    assert prompts and eval_prompts and catalogue  # nothing was wrong
    return SFTInput(flags, prompts, eval_prompts, catalogue, num_rows, notes)


def next_smaller(rows: int, batch_size: int) -> int:
    """The largest number of rows up to half of `rows` that divides `batch_size`."""
    return next(size for size in range(rows // 2, 0, -1) if batch_size % size == 0)


@command(SFTFlags)
def train(flags: SFTFlags) -> "dict | Prediction":
    """Fine-tunes a causal LM to write the semantic ID (SID) of the next item.

    The checkpoint with the lowest validation loss on the task sid_history_to_sid is kept.
    """
    # Check the flags and every row of the files, before anything heavy is imported.
    files = read_input(flags)
    flags.hold_output_dir()

    with importing():
        if not flags.dry_run:
            world.watch()
        from datasets import Dataset
        from transformers import EarlyStoppingCallback, set_seed

        import lora_utils
        from minionerec.data.encoding import Encoder
        from minionerec.data.examples import Collator, tokenized_dataset
        from minionerec.data.sid_tokens import add_sid_tokens, check_sids
        from minionerec.decoding.probe import probe
        from minionerec.dryrun import report
        from minionerec.model import device, graphs, loading
        from minionerec.model.sid_start import start_sid_rows
        from minionerec.plots import SFT_PANELS
        from minionerec.training import nodes
        from minionerec.training.finish import finish
        from minionerec.training.resume import resume_point
        from minionerec.training.sft_trainer import SFTTrainer
        from minionerec.training.sid_learning_rate import sid_weights

    # Prove that the base can have the adapter, and that every SID becomes its own tokens.
    config = loading.load_config(flags.base_model)
    reach = [lora_utils.check_adapter(config, flags)] if flags.adapted else []
    tokenizer = loading.load_tokenizer(flags.base_model)
    sid_tokens = files.catalogue.sid_tokens
    new_tokens = [token for token in sid_tokens if tokenizer.backend_tokenizer.token_to_id(token) is None]
    add_sid_tokens(tokenizer, sid_tokens)
    encoder = Encoder(tokenizer, files.prompts, flags.cutoff_len)
    remedy = f"rename the SID tokens in --sid_index_path {flags.sid_index_path}, or take another base"
    check_sids(encoder, files.catalogue, f"--base_model {flags.base_model}", remedy)
    sources = [flags.train_file, flags.sid_index_path, flags.item_meta_path]

    def training_examples() -> Dataset:
        return tokenized_dataset(encoder, files.train_rows, sources, sample=flags.sample, seed=flags.seed)

    ids = sorted(tokenizer.convert_tokens_to_ids(sid_tokens))
    inputs = report.Inputs(config, tokenizer, ids, encoder, files.train_rows, lora_utils.adapt)
    if flags.dry_run:
        for line in [*files.notes, *reach]:
            print(line)
        return report.sft(flags, inputs, training_examples)

    # Find the checkpoint to resume from.
    set_seed(flags.seed)
    state = device.process_state(flags.ddp_timeout)
    memory = device.free_memory_gb()
    fingerprint = loading.fingerprint(flags.base_model)
    run = run_record("sft", flags.method, flags.to_dict(), files.prompts, fingerprint)
    nodes.check_same(flags.to_dict(), base=fingerprint)
    nodes.check_output_shared(flags.output_dir)
    resume = resume_point(flags, run, state.print)

    # Load the base and add what trains. What cannot be decoded is not worth training.
    for line in files.notes:
        state.print(line)
    model = loading.load_base(
        flags.base_model,
        lora_utils.quantization_config(flags),
        from_scratch=flags.train_from_scratch,
        dtype=device.master_dtype() if flags.method == "full" else None,
    )
    sid_token_ids = loading.add_sid_tokens(model, tokenizer, sid_tokens)
    if not flags.train_from_scratch:
        start_sid_rows(model, tokenizer, new_tokens, files.catalogue, flags.sid_init)
    support = probe(model, name=f"--base_model {flags.base_model}")
    if support.why:
        state.print(f"decoding: {support}")
    model = lora_utils.adapt(model, flags, sid_token_ids)
    model.config.use_cache = False
    trainable, total = lora_utils.count_parameters(model)
    for line in [lora_utils.trainable_report(model), *reach]:
        state.print(line)

    # Tokenize the rows, or find them in the cache.
    eval_encoder = Encoder(tokenizer, files.eval_prompts, flags.cutoff_len)
    with state.local_main_process_first():
        train_dataset = training_examples()
        eval_dataset = tokenized_dataset(eval_encoder, files.eval_rows, [flags.eval_file])
    for note in filter(None, dict.fromkeys([encoder.control_note, eval_encoder.control_note])):
        state.print(note)
    state.print(f"training examples: {len(train_dataset):,}; validation examples: {len(eval_dataset):,}")

    # Size the micro-batches where that is left to us, and plan them: as token trees, where the model takes them.
    flags, trees = planned(flags, inputs, model, train_dataset, eval_dataset, memory, state)
    if trees and flags.group_by_length:
        state.print("--group_by_length changes nothing for token trees; with --pack_rows 0 it sorts steps by length")
    accumulation = trees.accumulation if trees else flags.batch_size // (flags.micro_rows * state.num_processes)
    graphs.record(model, flags.compile and bool(trees), state.print)

    # Train.
    steps = math.ceil(len(train_dataset) / flags.batch_size) * flags.num_epochs
    trainer = SFTTrainer(
        model=model,
        run=run,
        train_batches=trees,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        sid_weights=sid_weights(model, sid_token_ids) if flags.sid_learning_rate else (),
        sid_learning_rate=flags.sid_learning_rate,
        args=training_arguments(flags, steps, accumulation),
    )
    trainer.train(resume)

    # Save the best checkpoint as final_checkpoint, with what the run cost.
    metrics = {
        "method": flags.method,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "train_examples": len(train_dataset),
        "steps": trainer.state.global_step,
        "seconds": trainer.seconds,
        "best_eval_loss": trainer.best_metric,
        "best_checkpoint": trainer.best_checkpoint,
    }
    saved_dtype = None if flags.adapted else loading.saved_dtype(flags.base_model)
    return finish(trainer, metrics, SFT_PANELS, merge=flags.freeze_LLM, dtype=saved_dtype)


def planned(
    flags: SFTFlags,
    inputs: "Inputs",
    model: "PreTrainedModel",
    train_dataset: "Dataset",
    eval_dataset: "Dataset",
    memory: float,
    state: "PartialState",
) -> "tuple[SFTFlags, TreeBatches | None]":
    """The flags with the size of a micro-batch, and the token trees of the training; None where rows stay separate.

    With `--micro_batch_size auto` a GPU takes what the dry run predicts to fit `memory`, which was free before the base
    was loaded (GB), and tries the largest micro-batch once.
    """
    from accelerate.utils import broadcast_object_list

    from minionerec.dryrun import report
    from minionerec.model import device
    from minionerec.training.sft_trainer import fits, plan_trees

    sized = flags.micro_batch_size == "auto" and device.starts_kernels(state.device) and not engine()
    if flags.micro_batch_size == "auto":
        if sized:
            rows = report.largest_micro_batch(flags, inputs, train_dataset, memory)
            flags = replace(flags, micro_batch_size=broadcast_object_list([rows])[0])
        state.print(f"--micro_batch_size auto: {flags.micro_rows} rows")
    while True:
        sizes = flags.batch_size, flags.micro_rows, flags.num_epochs
        trees = plan_trees(model, train_dataset, eval_dataset, flags.rows_together, *sizes, flags.seed, state)
        # The Trainer turns checkpointing on, so a trial before it would need more.
        checked = not sized or flags.micro_rows == 1 or state.num_processes > 1 or flags.gradient_checkpointing
        if checked or fits(model, train_dataset, trees, flags.micro_rows, inputs.tokenizer.pad_token_id):
            return flags, trees
        flags = replace(flags, micro_batch_size=next_smaller(flags.micro_rows, flags.batch_size))
        state.print(f"out of memory in a trial: {flags.micro_rows} rows in a micro-batch")


def training_arguments(flags: SFTFlags, steps: int, accumulation: int) -> "TrainingArguments":
    """The trainer's settings: `steps` in all, each of `accumulation` micro-batches on every process."""
    from transformers import TrainingArguments

    from minionerec.training.arguments import shared_arguments

    return TrainingArguments(
        **shared_arguments(flags),
        per_device_train_batch_size=flags.micro_rows,
        per_device_eval_batch_size=flags.micro_rows,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=flags.num_epochs,
        learning_rate=flags.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(20, steps // 10),
        train_sampling_strategy="group_by_length" if flags.group_by_length else "random",
        eval_strategy="steps",
        eval_steps=flags.eval_step,
        save_steps=flags.eval_step,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        restore_callback_states_from_checkpoint=True,
    )


if __name__ == "__main__":
    cli.run(train)
