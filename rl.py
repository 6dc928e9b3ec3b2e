"""Reinforcement learning of a generative recommender from an SFT checkpoint: all weights, LoRA or QLoRA.

Takes the flags and files of MiniOneRec's rl.py. New are the adapter flags, beams that share their prompt's cache, a
loss that computes each prompt once for all its completions, targets that belong to rows instead of to histories, exact
resuming, and input that is checked before anything is loaded.

    python rl.py --model_path out/lora/final_checkpoint --train_file train.csv --eval_file valid.csv \\
        --info_file info.txt --sid_index_path index.json --item_meta_path item.json --output_dir out/rl \\
        --use_lora True --reward_type rule,prefix --add_gt True --sft_weight 1 --beta 0 --average_weights True \\
        --num_generations 4 --learning_rate 1e-5
    python rl.py ... --output_dir out/rl_qlora --use_qlora True
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from minionerec import cli, sasrec_files, world
from minionerec.checkpoint import Checkpoint, check_base, check_model, run_record
from minionerec.data.files import (
    Catalogue,
    Interaction,
    Item,
    read_catalogue,
    read_info,
    read_info_items,
    read_interactions,
)
from minionerec.data.prompts import RECOMMENDATION, RL_TASKS, TASKS, Prompts
from minionerec.data.texts import ValidationRows, check_interactions, items_left_out
from minionerec.errors import InputError, Problems
from minionerec.flags import command, engine
from minionerec.flags.rl import BEST_BY, RLFlags
from minionerec.process_memory import importing

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from trl import GRPOConfig

    from minionerec.data.encoding import Encoder
    from minionerec.decoding.trie import Trie
    from minionerec.dryrun.memory import Prediction
    from minionerec.dryrun.report import Inputs
    from minionerec.training.rl_trainer import ReReTrainer

LEFT_OUT = 0.2  # of the training prompts by sample_train
SYNC_STEPS = 512  # between two moves of the reference with sync_ref_model, as in the original


@dataclass(frozen=True)
class RLInput:
    """What a run starts from, checked.

    Attributes:
        flags: with the shape of the checkpoint's own adapter, where that is continued.
        checkpoint: to start from.
        base: where the weights below the adapter are; of a whole checkpoint, itself.
        prompts: of the training.
        validation: of the evaluations: one task.
        wording: of all tasks, which later commands ask the new checkpoint in.
        ending: the text that follows every SID.
        catalogue, sids: the index, and the SIDs of the info file that completions come from.
        eval_sample: the rows of the evaluations.
        notes: lines about rows that are left out and about what differs from the checkpoint.
    """

    flags: RLFlags
    checkpoint: Checkpoint
    base: str
    prompts: Prompts
    validation: Prompts
    wording: Prompts
    ending: str
    catalogue: Catalogue
    sids: list[str]
    eval_sample: ValidationRows
    notes: list[str]

    @property
    def cutoff_len(self) -> int:
        """Tokens of a prompt and its completion at most, as in SFT."""
        return self.checkpoint.cutoff_len

    @property
    def continues(self) -> bool:
        """Whether the checkpoint's own adapter trains on."""
        return self.checkpoint.adapter is not None and self.flags.adapted

    def train_rows(self, kind: str) -> Iterable[Interaction | Item]:
        """Starts a pass over the interactions or items to train on."""
        if kind == "item":
            known = set(self.sids)
            return [item for item in self.catalogue.items_with_text() if item.sid in known]
        return read_interactions(self.flags.train_file, "train_file", self.sids, self.prompts.need_titles)

    def eval_rows(self, _kind: str) -> Iterable[Interaction]:
        """Starts a pass over the validation interactions."""
        return self.eval_sample


def read_input(flags: RLFlags) -> RLInput:
    """Checks the flags, the checkpoint and every row of the files. Raises InputError with everything that is wrong."""
    problems = Problems()
    check_model(problems, "model_path", flags.model_path)
    checkpoint = problems.attempt(Checkpoint.read, flags.model_path)
    base = flags.base_model or (checkpoint and problems.attempt(checkpoint.base)) or ""
    if checkpoint and checkpoint.adapter is not None:
        if base:
            check_base(problems, base)
        if checkpoint.sid_rows_only:
            problems.add(
                f"--model_path {flags.model_path}: is a checkpoint from the middle of a --freeze_LLM run, with SID "
                "rows only; give the run's final_checkpoint"
            )
        if flags.adapted and (found := checkpoint.weights_of_base):
            problems.add(
                f"--model_path {flags.model_path}: the adapter also holds {len(found)} weights of the base, such as "
                f"{found[0]}, which training it further would lose; merge it with merge_lora.py, and train the result"
            )
    elif checkpoint and flags.base_model:
        problems.add(f"--base_model names the base of an adapter checkpoint, and {flags.model_path} is none; drop it")
    flags.check(problems)

    # The wording of all tasks is recorded, not of this run's only: a checkpoint is asked in the wording it was taught.
    prompts = wording = validation = None
    if checkpoint:
        category, prompt_file = flags.category, flags.prompt_file
        prompts = problems.attempt(checkpoint.prompts, category, prompt_file, flags.tasks, RL_TASKS)
        wording = prompts and checkpoint.prompts(category, prompt_file, default=tuple(TASKS))
        validation = wording and wording.only(RECOMMENDATION)
    for task in prompts.tasks.values() if prompts else ():
        if task.ending is None:
            problems.add(
                f"--tasks {flags.tasks}: {task.name} asks for a title; RL rewards items: {', '.join(RL_TASKS)}"
            )
    tasks = [*prompts.tasks.values(), *validation.tasks.values()] if prompts and validation else []
    endings = {task.ending for task in tasks if task.ending is not None}
    if len(endings) > 1:
        problems.add(
            f"--tasks {flags.tasks}: what follows the SID differs between the responses, of {RECOMMENDATION} too; RL "
            "writes them all alike"
        )

    # The catalogue and every row.
    catalogue = problems.attempt(read_catalogue, flags.sid_index_path, flags.item_meta_path)
    sids = problems.attempt(read_info, flags.info_file, catalogue)
    if "sasrec" in flags.reward_names:
        model = problems.attempt(sasrec_files.known, flags.cf_path, "cf_path")
        if model and sids:
            pairs = [(item.id, item.sid) for item in read_info_items(flags.info_file)]
            of = f"--info_file {flags.info_file}"
            problems.attempt(sasrec_files.check_items, flags.cf_path, "cf_path", model, pairs, of)
    if sids and len(sids) < flags.num_generations:
        problems.add(
            f"--num_generations {flags.num_generations}: {flags.info_file} has only {len(sids)} different SIDs"
        )
    before = len(problems)
    checked = check_interactions(problems, "train_file", flags.train_file, sids, prompts)
    if prompts and catalogue and sids and len(problems) == before:
        _check_step(problems, flags, checked.num_examples + _num_item_prompts(prompts, catalogue, sids))
    notes = checked.notes
    eval_checked = check_interactions(problems, "eval_file", flags.eval_file, sids, validation)
    notes += eval_checked.notes
    notes += items_left_out(catalogue, prompts, flags.item_meta_path) + flags.notes
    if not flags.beam_search and {"ranking", "ranking_only"} & set(flags.reward_names):
        notes.append(
            f"warning: --reward_type {flags.reward_type} penalizes wrong items by rank, but sampled completions have "
            "no rank, only the order they were sampled in; give --beam_search True"
        )
    problems.check()
    assert checkpoint and prompts and validation and wording and catalogue and sids  # nothing was wrong

    eval_sample = ValidationRows(
        flags.eval_file, sids, validation, eval_checked.num_usable, flags.eval_sample, flags.seed
    )
    notes += eval_sample.notes
    outside = len(catalogue.sids.difference(sids))
    if outside and any(task.rows == "item" for task in prompts.tasks.values()):
        notes.append(f"{outside:,} SIDs of the index are not in {flags.info_file}; tasks on items leave them out")

    # What differs from the checkpoint. The shape of an adapter stays what it was.
    sid_of_item = ((name, item.sid) for name, item in catalogue.items.items())
    notes += checkpoint.notes_on_catalogue(sid_of_item, f"--sid_index_path {flags.sid_index_path}")
    notes += checkpoint.notes_on_wording(prompts, flags.category, flags.prompt_file)
    if checkpoint.adapter is not None:
        notes += _how_it_continues(checkpoint, flags)
        if flags.adapted:
            flags = replace(flags, **checkpoint.adapter_shape)
    return RLInput(
        flags, checkpoint, base, prompts, validation, wording, endings.pop(), catalogue, sids, eval_sample, notes
    )


def _num_item_prompts(prompts: Prompts, catalogue: Catalogue, sids: Iterable[str]) -> int:
    """How many prompts the tasks on items make."""
    tasks = [task for task in prompts.tasks.values() if task.rows == "item"]
    known = set(sids) if tasks else set()
    items = [item for item in catalogue.items_with_text() if item.sid in known] if tasks else []
    return sum(task.weight * sum(map(task.suits, items)) for task in tasks)


def _check_step(problems: Problems, flags: RLFlags, prompts: int) -> None:
    """A run must have a whole step: the rows of a small shop's validation file may be less."""
    if flags.sample_train:
        prompts -= int(LEFT_OUT * prompts)
    if prompts < flags.prompts_of_step:
        problems.add(
            f"--train_file {flags.train_file}: {prompts} prompts are less than the {flags.prompts_of_step} of a step; "
            "lower --gradient_accumulation_steps or --train_batch_size"
        )


def _how_it_continues(checkpoint: Checkpoint, flags: RLFlags) -> list[str]:
    """What becomes of an adapter checkpoint, and where that differs from how it was trained."""
    what = (
        "continuing the adapter of {}"
        if flags.adapted
        else "merging the adapter of {} into its base for full fine-tuning"
    )
    lines = [what.format(checkpoint.path)]
    trained_on = checkpoint.adapter_flags.bits
    if checkpoint.run and trained_on != flags.bits:
        kinds = {4: "a 4-bit base", 8: "an 8-bit base", 16: "an unquantized base"}
        lines.append(
            f"warning: it was trained on {kinds[trained_on]}, and it continues on {kinds[flags.bits]} here; expect a "
            "small mismatch"
        )
    if flags.adapted:
        given = tuple(name for name in flags.SHAPE if getattr(flags, name) != getattr(RLFlags, name))
        lines += checkpoint.differing_flags(flags.to_dict(), given)
    return lines


@command(RLFlags)
def train(flags: RLFlags) -> "dict | Prediction":
    """Trains an SFT checkpoint further on rewards for the items it recommends (GRPO). Batch sizes count completions."""
    # Check the flags, the checkpoint and every row of the files, before anything heavy is imported.
    inputs = read_input(flags)
    flags, checkpoint = inputs.flags, inputs.checkpoint
    flags.hold_output_dir()

    with importing():
        world.watch()
        from transformers import set_seed

        import lora_utils
        from minionerec.decoding.probe import probe
        from minionerec.dryrun import report
        from minionerec.model import device, graphs, loading
        from minionerec.plots import RL_PANELS
        from minionerec.training.finish import finish
        from minionerec.training.resume import resume_point
        from minionerec.training.rewards import reward_functions
        from minionerec.training.rl_trainer import ReReTrainer

    # Check that the base can have the adapter, and that every SID becomes its own tokens. Tokenize the prompts.
    set_seed(flags.seed)
    state = device.process_state(flags.ddp_timeout)
    memory = device.free_memory_gb()
    of_base = "model_path" if checkpoint.adapter is None else "base_model"
    config = loading.load_config(inputs.base, of_base)
    lora_utils.check_stored(config, flags, of_base)
    adapter_path = checkpoint.path if inputs.continues else None
    adapter_summary = [lora_utils.check_adapter(config, flags, adapter_path)] if flags.adapted else []
    tokenizer = loading.load_tokenizer(checkpoint.path)
    encoded = encode(inputs, tokenizer)
    train_dataset, trie = encoded.train_dataset, encoded.trie
    steps = count_steps(flags, len(train_dataset), state)
    sid_of = trie.sid_of(inputs.sids)
    reward_funcs, reward_weights = reward_functions(
        flags.rewards, flags.num_generations, sid_of, inputs.catalogue, flags.ada_path, flags.cf_path
    )
    for line in [*inputs.notes, *without_effect(flags, trie)]:
        state.print(line)
    sid_token_ids = sorted(tokenizer.convert_tokens_to_ids(inputs.catalogue.sid_tokens))
    own_adapter = checkpoint.path if checkpoint.adapter is not None else ""  # which an adapter run trains on
    adapt = partial(lora_utils.adapt, adapter_path=own_adapter)
    predictor = report.Inputs(config, tokenizer, sid_token_ids, encoded.encoder, inputs.train_rows, adapt)
    if flags.dry_run:
        print(*adapter_summary, sep="\n", end="\n" if adapter_summary else "")
        shape = checkpoint.adapter_shape if checkpoint.adapter is not None else None
        return report.rl(flags, predictor, list(train_dataset["prompt"]), steps, trie.depth, shape)
    eval_dataset = encoded.eval_dataset
    for note in encoded.notes:
        state.print(note)
    state.print(f"prompts: {len(train_dataset):,} to train on, {len(eval_dataset):,} to validate; steps: {steps:,}")

    # Find the checkpoint to resume from.
    fingerprint = loading.fingerprint(inputs.base)
    recorded_flags = {**flags.to_dict(), "cutoff_len": inputs.cutoff_len}
    run = run_record("rl", flags.method, recorded_flags, inputs.wording, fingerprint, inputs.catalogue)
    resume = resume_point(flags, run, state.print)
    cutoff = chosen_by(flags, len(trie), resume)

    # Load the policy. Probed before the weights are sharded, and for the longest rows that any process can have.
    model = load_policy(inputs, tokenizer, fingerprint)
    saved_dtype = None if flags.adapted else loading.saved_dtype(inputs.base)  # the start may be removed meanwhile
    pass_size = size_of_passes(inputs, predictor, train_dataset, trie.depth, memory, state)
    in_a_pass = pass_size + pass_size // flags.num_generations + 2  # with the targets of all groups that it touches
    beams = max(flags.test_beam, flags.num_generations * 3 // 2, in_a_pass)
    longest = inputs.cutoff_len
    support = probe(model, longest, longest + beams * trie.depth, f"--model_path {checkpoint.path}")
    state.print(
        f"decoding: {support}; completions {'share a row with' if support.shared else 'each repeat'} their prompt"
    )
    new_adapter = flags.adapted and not inputs.continues
    if new_adapter:
        model = lora_utils.adapt(model, flags, sid_token_ids)
    trainable, total = lora_utils.count_parameters(model)
    for line in [lora_utils.trainable_report(model), *adapter_summary]:
        state.print(line)

    # Train.
    graphs.record(model, flags.compile, state.print)
    watched = f"{BEST_BY[flags.best_by]}@{cutoff}"
    trainer = ReReTrainer(
        model=model,
        new_adapter=new_adapter,
        reward_funcs=reward_funcs,
        args=grpo_config(flags, steps, trie.depth, watched, reward_weights, resumes=resume is not None),
        processing_class=tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        trie=trie,
        sids=inputs.sids,
        run=run,
        beam_search=flags.beam_search,
        add_gt=flags.add_gt,
        dynamic_sampling=flags.dynamic_sampling,
        mask_all_zero=flags.mask_all_zero,
        sft_weight=flags.sft_weight,
        listwise=flags.listwise,
        average_weights=flags.average_weights,
        pass_size=pass_size,
        test_beam=flags.test_beam,
        test_batch_size=math.ceil(flags.eval_batch_size / flags.test_beam),
    )
    trainer.train(resume)

    # Save the best checkpoint as final_checkpoint, with what the run cost.
    counts: dict[str, object] = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "train_prompts": len(train_dataset),
    }
    if flags.test_during_training:
        counts["improved"], verdict = compared_with_start(trainer, watched, cutoff)
    metrics = finish(trainer, counts, RL_PANELS, dtype=saved_dtype)
    if saved_dtype is not None and state.is_main_process:
        for line in lost_in_rounding(trainer, inputs.base, saved_dtype):
            print(line)
    if flags.test_during_training:
        state.print(verdict)
    return metrics


def count_steps(flags: RLFlags, prompts: int, state: "PartialState") -> int:
    """The optimizer steps of a run on so many prompts; prints what a step is."""
    step = flags.prompts_of_step
    steps = prompts // step * flags.num_train_epochs
    processes = f", on {state.num_processes} processes" if state.num_processes > 1 else ""
    state.print(f"an optimizer step: {step:,} prompts x {flags.num_generations} completions{processes}")
    if flags.sync_ref_model and steps < SYNC_STEPS:
        state.print(
            f"--sync_ref_model changes nothing: the reference moves every {SYNC_STEPS} steps, and this run has {steps}"
        )
    return steps


def without_effect(flags: RLFlags, trie: "Trie") -> list[str]:
    """A line for a kind of loss whose gradient is that of the plain one in this run. Both kinds then train exactly the
    same model, so comparing them says nothing."""
    if flags.gspo:
        return [
            "--gspo changes nothing: completions are learned once, by the policy that made them, so all importance "
            "ratios are 1"
        ]
    if flags.dapo and not any(trie.ends[:-1]):
        return [f"--dapo changes nothing: all completions have {trie.depth} tokens, so sequences count equally anyway"]
    return []


def chosen_by(flags: RLFlags, num_sids: int, resume: Checkpoint | None) -> int:
    """The K whose metrics choose the best checkpoint. Raises InputError if the run that is resumed had another one,
    since values at two K do not compare."""
    from minionerec.metrics import watched_cutoff

    cutoff = watched_cutoff(min(flags.test_beam, num_sids))
    beams = resume.flags.get("test_beam", flags.test_beam) if resume else flags.test_beam
    before = watched_cutoff(min(beams, num_sids))
    if resume and before != cutoff:
        raise InputError(
            f"--test_beam {flags.test_beam}: the best checkpoint is chosen by the metrics at {cutoff}, and was by "
            f"those at {before} up to {resume.path}; resume with --test_beam {beams}"
        )
    return cutoff


def size_of_passes(
    inputs: RLInput, predictor: "Inputs", train_dataset: "Dataset", depth: int, memory: float, state: "PartialState"
) -> int:
    """How many completions go through the model at a time: on a GPU as many as its free `memory` (GB) is predicted to
    hold, since a pass takes about as long as the next larger one; else `--train_batch_size`.

    Args:
        depth: tokens of a completion at most.
    """
    from accelerate.utils import gather_object

    from minionerec.dryrun import report
    from minionerec.model import device

    flags = inputs.flags
    if not device.starts_kernels(state.device) or engine():
        return flags.train_batch_size
    longest = max(map(len, train_dataset["prompt"]))
    size = report.largest_pass(flags, predictor, longest, depth, inputs.continues, memory)
    size = min(gather_object([size]))
    state.print(f"passes of up to {size} completions, by the predicted memory")
    return size


@dataclass(frozen=True)
class Encoded:
    """The input as token ids: prompts to train on and to validate, the trie of the SIDs that complete them, and lines
    about their texts."""

    encoder: "Encoder"
    trie: "Trie"
    train_dataset: "Dataset"
    eval_dataset: "Dataset"
    notes: list[str]


def encode(inputs: RLInput, tokenizer: "PreTrainedTokenizerFast") -> Encoded:
    """Tokenizes the prompts, and the SIDs, each of which must become its own tokens in all prompts and responses.

    Raises InputError where one does not.
    """
    from minionerec.data.encoding import Encoder
    from minionerec.data.examples import prompt_dataset
    from minionerec.data.sid_tokens import sid_responses
    from minionerec.decoding.trie import Trie

    flags, where = inputs.flags, f"--model_path {inputs.checkpoint.path}"
    tasks = {**inputs.prompts.tasks, **inputs.validation.tasks}
    checked = Encoder(tokenizer, replace(inputs.prompts, tasks=tasks), inputs.cutoff_len)
    remedy = f"start from a checkpoint that sft.py made with {flags.sid_index_path}"
    sequences = sid_responses(checked, inputs.sids, inputs.ending, inputs.catalogue, where, remedy)
    trie = Trie(sequences, tokenizer.eos_token_id)

    # The longest SID, its end included, must fit after each prompt.
    budget = inputs.cutoff_len - trie.depth
    encoder = Encoder(tokenizer, inputs.prompts, inputs.cutoff_len)
    train_dataset = prompt_dataset(encoder, inputs.train_rows, budget)
    if flags.sample_train:
        train_dataset = train_dataset.shuffle(seed=flags.seed)
        train_dataset = train_dataset.select(range(int(LEFT_OUT * len(train_dataset)), len(train_dataset)))
    eval_encoder = Encoder(tokenizer, inputs.validation, inputs.cutoff_len)
    eval_dataset = prompt_dataset(eval_encoder, inputs.eval_rows, budget)
    notes = list(filter(None, dict.fromkeys([encoder.control_note, eval_encoder.control_note])))
    return Encoded(encoder, trie, train_dataset, eval_dataset, notes)


def grpo_config(
    flags: RLFlags, steps: int, depth: int, watched: str, reward_weights: list[float], resumes: bool
) -> "GRPOConfig":
    """The trainer's settings: `steps` in all, completions of at most `depth` tokens, the metric that chooses the best
    checkpoint, the weight of each reward function, and whether the run resumes."""
    from trl import GRPOConfig

    from minionerec.training.arguments import shared_arguments

    # Counted in steps, and every save is after an evaluation; as fractions, each would be rounded separately.
    evaluate_every = math.ceil(flags.eval_step * steps)
    save_every = math.ceil(flags.save_fraction * steps)
    if flags.test_during_training:
        # Rounding up must not put it behind the last evaluation, or no model but the first could be the best.
        save_every = evaluate_every * min(round(flags.save_fraction / flags.eval_step), steps // evaluate_every)
    # All completions of a step are one micro-batch, which the trainer makes in passes; an engine counts micro-batches.
    batch, accumulation = flags.train_batch_size, flags.gradient_accumulation_steps
    if not engine():
        batch, accumulation = batch * accumulation, 1
    return GRPOConfig(
        **shared_arguments(flags),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=flags.num_generations,  # TRL checks it; `evaluate` has its own
        gradient_accumulation_steps=accumulation,
        num_train_epochs=flags.num_train_epochs,
        learning_rate=flags.learning_rate,
        lr_scheduler_type="constant_with_warmup" if flags.average_weights else "cosine",
        warmup_steps=min(math.ceil(0.03 * steps), steps - 1),  # the first of them has a rate of 0
        max_grad_norm=0.3,
        num_generations=flags.num_generations,
        reward_weights=reward_weights,
        max_completion_length=depth,
        temperature=flags.temperature,
        beta=flags.beta,
        use_bias_correction_kl=False,  # the original's KL term, without TRL's ratio in front
        sync_ref_model=flags.sync_ref_model,
        ref_model_sync_steps=SYNC_STEPS,
        loss_type="dapo" if flags.dapo else "grpo",
        importance_sampling_level="sequence" if flags.gspo else "token",
        eval_strategy="steps" if flags.test_during_training else "no",
        eval_steps=evaluate_every,
        eval_on_start=flags.test_during_training and not resumes,
        save_steps=save_every,
        load_best_model_at_end=flags.test_during_training,
        metric_for_best_model=f"eval_{watched}",
        greater_is_better=True,
    )


def compared_with_start(trainer: "ReReTrainer", watched: str, cutoff: int) -> tuple[bool | None, str]:
    """Whether the best checkpoint beats the starting model in the `watched` metric, and a line that says so with HR and
    NDCG at `cutoff`; None if the starting model was not evaluated."""
    state = trainer.state
    final = {"start": "the starting model", None: "the last model"}.get(
        trainer.best_checkpoint, trainer.best_checkpoint
    )
    evaluated = {entry["step"]: entry for entry in state.log_history if f"eval_{watched}" in entry}
    if 0 not in evaluated:  # a run that began with --test_during_training False
        return None, f"the starting model was not evaluated; final_checkpoint is {final}"
    start, best = evaluated[0], evaluated[state.best_global_step]
    improved = best[f"eval_{watched}"] > start[f"eval_{watched}"]
    if improved and not trainer.loads_best:
        return None, f"the best checkpoint no longer exists; final_checkpoint is {final}"
    shown = [f"{name}@{cutoff} {start[f'eval_{name}@{cutoff}']:.4f}" for name in ("HR", "NDCG")]
    if improved:
        shown = [f"{text} -> {best['eval_' + text.split()[0]]:.4f}" for text in shown]
    beats = "better than the starting model" if improved else "no checkpoint is better than the starting model"
    return improved, f"{beats} on the validation file ({', '.join(shown)}); final_checkpoint is {final}"


def lost_in_rounding(trainer: "ReReTrainer", start: str, dtype: "torch.dtype") -> list[str]:
    """A line if most of the weights that trained in float32 are those of `start` again where they are saved in `dtype`:
    what was evaluated is then not what is saved."""
    from minionerec.model import loading

    if dtype.itemsize == 4 or trainer.best_checkpoint == "start":
        return []
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    try:
        kept = loading.share_kept(os.path.join(trainer.args.output_dir, "final_checkpoint"), start, trained)
    except OSError:  # the start was removed while the run trained
        return []
    if kept <= 0.5:
        return []
    whole = trainer.best_checkpoint or f"checkpoint-{trainer.state.global_step}"
    precision = str(dtype).removeprefix("torch.")
    return [
        f"warning: {kept:.1%} of the trained weights in final_checkpoint are still those of {start}: their changes are "
        f"smaller than a step of {precision} and are lost. {whole} has them in float32; a larger --learning_rate loses "
        "less, and an adapter (--use_lora True) nothing"
    ]


def load_policy(inputs: RLInput, tokenizer: "PreTrainedTokenizerFast", fingerprint: str | None) -> "PreTrainedModel":
    """The model to train: the checkpoint's adapter on its base, merged into it, or a whole model."""
    import lora_utils
    from minionerec.model import architecture, device, loading

    flags, quantization = inputs.flags, lora_utils.quantization_config(inputs.flags)
    dtype = None if flags.adapted else device.master_dtype()
    if inputs.checkpoint.adapter is None:
        return loading.load_base(inputs.base, quantization, dtype=dtype)
    model = lora_utils.load_adapted(
        inputs.checkpoint,
        tokenizer,
        inputs.base,
        quantization,
        trainable=flags.adapted,
        merge_in=dtype,
        fingerprint=fingerprint,
    )
    if not flags.adapted:
        model.requires_grad_(True)
        architecture.freeze_non_text_modules(model)
    return model


if __name__ == "__main__":
    cli.run(train)
