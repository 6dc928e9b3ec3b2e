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
from typing import TYPE_CHECKING

from minionerec import cli, sasrec_files, soft_targets, world
from minionerec.checkpoint import LEARNED_OTHERS, Checkpoint, check_base, run_record
from minionerec.data.files import Catalogue, Interaction, Item, read_catalogue, read_interactions, sample_rows
from minionerec.data.prompts import Prompts, load_prompts
from minionerec.data.texts import ValidationRows, check_interactions, items_left_out, usable
from minionerec.errors import Problems
from minionerec.flags import command, engine
from minionerec.flags.sft import SFTFlags
from minionerec.process_memory import importing

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

    from minionerec.dryrun.memory import Prediction
    from minionerec.dryrun.report import Inputs
    from minionerec.training.tree_batches import TreeBatches


@dataclass(frozen=True)
class SFTInput:
    """The files of a run, checked: wording of training and validation, catalogue, how many rows of the training file
    have the texts of a task, and lines about rows that are left out."""

    flags: SFTFlags
    prompts: Prompts
    eval_prompts: Prompts
    catalogue: Catalogue
    num_rows: int
    validation: ValidationRows
    notes: list[str]

    def train_rows(self, kind: str) -> Iterable[Interaction | Item]:
        """Starts a pass over the interactions or items to train on."""
        flags = self.flags
        if kind == "item":
            items = list(usable(self.catalogue.items_with_text(), self.prompts, kind))
            return sample_rows(items, len(items), flags.sample, flags.seed)
        read = read_interactions(flags.train_file, "train_file", self.catalogue.sids, self.prompts.need_titles)
        rows = sample_rows(usable(read, self.prompts, kind), self.num_rows, flags.sample, flags.seed)
        return soft_targets.with_sampled(rows, flags.cf_path, flags.seed) if flags.cf_path else rows

    def eval_rows(self, _kind: str) -> Iterable[Interaction]:
        """Starts a pass over the validation interactions."""
        return self.validation


def read_input(flags: SFTFlags) -> SFTInput:
    """Checks the flags and every row of the files. Raises InputError with everything that is wrong."""
    problems = Problems()
    check_base(problems, flags.base_model)
    base = problems.attempt(Checkpoint.read, flags.base_model)
    flags.check(problems)
    prompts = problems.attempt(load_prompts, flags.category, flags.prompt_file, flags.tasks)
    if prompts and all(task.rows == "item" for task in prompts.tasks.values()):
        problems.add(f"--tasks {flags.tasks!r}: needs a task on interactions to validate on")
    catalogue = problems.attempt(read_catalogue, flags.sid_index_path, flags.item_meta_path)
    sids = catalogue.sids if catalogue else None
    if flags.cf_path and catalogue:
        pairs = [(name, item.sid) for name, item in catalogue.items.items()]
        index = f"--sid_index_path {flags.sid_index_path}"
        problems.attempt(sasrec_files.check_within, flags.cf_path, "cf_path", pairs, index)
    eval_prompts = prompts and prompts.for_validation()
    checked = check_interactions(problems, "train_file", flags.train_file, sids, prompts)
    eval_checked = check_interactions(problems, "eval_file", flags.eval_file, sids, eval_prompts)
    notes = [*checked.notes, *eval_checked.notes]
    notes += items_left_out(catalogue, prompts, flags.item_meta_path) + flags.notes
    problems.check()
    assert base and prompts and eval_prompts and catalogue  # nothing was wrong
    # A merged model that is updated knows SIDs already. Of random weights only the configuration is taken.
    if not flags.train_from_scratch:
        pairs = [(name, item.sid) for name, item in catalogue.items.items()]
        notes += base.notes_on_catalogue(pairs, f"--sid_index_path {flags.sid_index_path}", LEARNED_OTHERS)
    validation = ValidationRows(
        flags.eval_file, catalogue.sids, eval_prompts, eval_checked.num_usable, flags.eval_sample, flags.seed
    )
    notes += validation.notes
    return SFTInput(flags, prompts, eval_prompts, catalogue, checked.num_usable, validation, notes)


def next_smaller(rows: int, batch_size: int) -> int:
    """The largest number of rows up to half of `rows` that divides `batch_size`."""
    return next(size for size in range(rows // 2, 0, -1) if batch_size % size == 0)


@command(SFTFlags)
def train(flags: SFTFlags) -> "dict | Prediction":
    """Fine-tunes a causal LM to write the semantic ID (SID) of the next item.

    The checkpoint with the lowest validation loss on the task sid_history_to_sid is kept.
    """
    # Check the flags and every row of the files, before anything heavy is imported.
    inputs = read_input(flags)
    flags.hold_output_dir()

    with importing():
        if not flags.dry_run:
            world.watch()
        from datasets import Dataset
        from transformers import EarlyStoppingCallback, set_seed

        import lora_utils
        from minionerec import sasrec
        from minionerec.data.encoding import Encoder
        from minionerec.data.examples import Collator, tokenized_dataset
        from minionerec.data.sid_tokens import add_sid_tokens, check_sids
        from minionerec.decoding.probe import probe
        from minionerec.dryrun import report
        from minionerec.model import device, graphs, loading
        from minionerec.plots import SFT_PANELS
        from minionerec.training.finish import finish
        from minionerec.training.resume import resume_point
        from minionerec.training.sft_trainer import SFTTrainer
        from minionerec.training.sid_learning_rate import sid_weights

    # Check that the teacher loads, that the base can have the adapter, and that every SID becomes its own tokens.
    if flags.cf_path:
        sasrec.load(flags.cf_path)
    config = loading.load_config(flags.base_model)
    lora_utils.check_stored(config, flags)
    adapter_summary = [lora_utils.check_adapter(config, flags)] if flags.adapted else []
    tokenizer = loading.load_tokenizer(flags.base_model)
    sid_tokens = inputs.catalogue.sid_tokens
    new_tokens = [token for token in sid_tokens if tokenizer.backend_tokenizer.token_to_id(token) is None]
    add_sid_tokens(tokenizer, sid_tokens)
    encoder = Encoder(tokenizer, inputs.prompts, flags.cutoff_len)
    remedy = f"rename the SID tokens in --sid_index_path {flags.sid_index_path}, or take another base"
    check_sids(encoder, inputs.catalogue, f"--base_model {flags.base_model}", remedy)
    sources = [flags.train_file, flags.sid_index_path, flags.item_meta_path]
    sources += sasrec_files.files(flags.cf_path) if flags.cf_path else []

    def training_examples() -> Dataset:
        return tokenized_dataset(encoder, inputs.train_rows, sources, sample=flags.sample, seed=flags.seed)

    ids = sorted(tokenizer.convert_tokens_to_ids(sid_tokens))
    predictor = report.Inputs(config, tokenizer, ids, encoder, inputs.train_rows, lora_utils.adapt)
    if flags.dry_run:
        for line in [*inputs.notes, *adapter_summary]:
            print(line)
        return report.sft(flags, predictor, training_examples)

    # Find the checkpoint to resume from.
    set_seed(flags.seed)
    state = device.process_state(flags.ddp_timeout)
    memory = device.free_memory_gb()
    base = loading.fingerprint(flags.base_model)
    run = run_record("sft", flags.method, flags.to_dict(), inputs.prompts, base, inputs.catalogue)
    resume = resume_point(flags, run, state.print)

    # Load the base and add what trains. What cannot be decoded is not worth training.
    for line in inputs.notes:
        state.print(line)
    model, sid_token_ids = load_model(flags, inputs.catalogue, tokenizer, new_tokens)
    saved_dtype = None if flags.adapted else loading.saved_dtype(flags.base_model)  # the base may be removed meanwhile
    support = probe(model, name=f"--base_model {flags.base_model}")
    if support.why:
        state.print(f"decoding: {support}")
    model = lora_utils.adapt(model, flags, sid_token_ids)
    model.config.use_cache = False
    trainable, total = lora_utils.count_parameters(model)
    for line in [lora_utils.trainable_report(model), *adapter_summary]:
        state.print(line)

    # Tokenize the rows, or find them in the cache.
    eval_encoder = Encoder(tokenizer, inputs.eval_prompts, flags.cutoff_len)
    with state.local_main_process_first():
        train_dataset = training_examples()
        eval_dataset = tokenized_dataset(eval_encoder, inputs.eval_rows, [flags.eval_file], **inputs.validation.choice)
    for note in filter(None, dict.fromkeys([encoder.control_note, eval_encoder.control_note])):
        state.print(note)
    state.print(f"training examples: {len(train_dataset):,}; validation examples: {len(eval_dataset):,}")

    # Size the micro-batches where that is left to us, and plan them: as token trees, where the model takes them.
    sizes_itself = flags.micro_batch_size == "auto"
    flags, trees = planned(flags, predictor, model, train_dataset, eval_dataset, memory, state)
    if trees and flags.group_by_length:
        state.print("--group_by_length changes nothing for token trees; with --pack_rows 0 it sorts steps by length")
    accumulation = trees.accumulation if trees else flags.batch_size // (flags.micro_rows * state.num_processes)
    graphs.record(model, flags.compile and bool(trees) and not flags.gradient_checkpointing, state.print)

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
        goes_back=sizes_itself,
        args=training_arguments(flags, steps, accumulation),
    )
    trainer.train(resume)

    # Save the best checkpoint as final_checkpoint, with what the run cost.
    counts = {"trainable_parameters": trainable, "total_parameters": total, "train_examples": len(train_dataset)}
    return finish(trainer, counts, SFT_PANELS, merge=flags.freeze_LLM, dtype=saved_dtype)


def load_model(
    flags: SFTFlags, catalogue: Catalogue, tokenizer: "PreTrainedTokenizerFast", new_tokens: list[str]
) -> "tuple[PreTrainedModel, list[int]]":
    """The base with rows for the SID tokens, and the ids of these; `new_tokens` are those that it did not know."""
    import lora_utils
    from minionerec.model import device, loading
    from minionerec.model.sid_start import start_sid_rows

    model = loading.load_base(
        flags.base_model,
        lora_utils.quantization_config(flags),
        from_scratch=flags.train_from_scratch,
        dtype=device.master_dtype() if flags.method == "full" else None,
    )
    sid_token_ids = loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    if not flags.train_from_scratch:
        start_sid_rows(model, tokenizer, new_tokens, catalogue, flags.sid_init)
    return model, sid_token_ids


def planned(
    flags: SFTFlags,
    predictor: "Inputs",
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
    from accelerate.utils import gather_object

    from minionerec.dryrun import report
    from minionerec.model import device
    from minionerec.training.sft_trainer import fits, plan_trees

    sized = flags.micro_batch_size == "auto" and device.starts_kernels(state.device) and not engine()
    if flags.micro_batch_size == "auto":
        if sized:
            rows = report.largest_micro_batch(flags, predictor, train_dataset, memory)
            flags = replace(flags, micro_batch_size=min(gather_object([rows])))
        state.print(f"--micro_batch_size auto: {flags.micro_rows} rows")
    while True:
        sizes = flags.batch_size, flags.micro_rows, flags.num_epochs
        trees = plan_trees(model, train_dataset, eval_dataset, flags.rows_together, *sizes, flags.seed, state)
        # The Trainer turns checkpointing on, so a trial before it would need more.
        checked = not sized or flags.micro_rows == 1 or state.num_processes > 1 or flags.gradient_checkpointing
        if checked or fits(model, train_dataset, trees, flags.micro_rows, predictor.tokenizer.pad_token_id):
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
