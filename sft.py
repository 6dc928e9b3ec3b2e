"""Supervised fine-tuning of a generative recommender: in full, of the SID rows alone, with LoRA or with QLoRA.

Takes the flags and files of MiniOneRec's sft.py. New are the adapter flags, a loss that runs the output head on
response tokens only, exact resuming, and input that is checked before anything is loaded.

    python sft.py --base_model Qwen/Qwen2.5-0.5B --train_file train.csv --eval_file valid.csv --output_dir output/lora \
        --use_lora True --category Industrial_and_Scientific --sid_index_path index.json --item_meta_path item.json
    python sft.py ... --output_dir out/qlora --use_qlora True --micro_batch_size 16
"""

import os

from minionerec import checks, cli
from minionerec.data.files import read_catalogue, read_interactions, sample_rows
from minionerec.data.prompts import load_prompts
from minionerec.data.texts import check_interactions, items_left_out
from minionerec.errors import Problems


def train(
    base_model: str = "",
    train_file: str = "",
    eval_file: str = "",
    output_dir: str = "",
    sample: int = -1,
    seed: int = 42,
    batch_size: int = 128,
    micro_batch_size: int = 4,
    num_epochs: int = 10,
    learning_rate: float = 3e-4,
    cutoff_len: int = 512,
    group_by_length: bool = False,
    freeze_LLM: bool = False,
    wandb_project: str = "",
    wandb_run_name: str = "",
    resume_from_checkpoint: str | None = None,
    category: str = "",
    train_from_scratch: bool = False,
    sid_index_path: str = "",
    item_meta_path: str = "",
    use_lora: bool = False,
    use_qlora: bool = False,
    lora_r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    lora_target_modules: str = "all",
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: str = "True",
    load_in_8bit: bool = False,
    gradient_checkpointing: bool = False,
    tasks: str = "all",
    prompt_file: str | None = None,
    pack_rows: int = 16,
    eval_step: float = 0.05,
    report_to: str = "none",
    dry_run: bool = False,
    gpu_memory: str = "",
) -> dict:
    """Fine-tunes a causal LM to write the semantic ID (SID) of the next item.

    Args:
        base_model: folder or hub name of the model to start from.
        train_file: CSV of training interactions.
        eval_file: CSV of validation interactions; the model with the lowest loss of SID histories to SIDs is kept.
        output_dir: folder for checkpoints, final_checkpoint, metrics.json and curves.png.
        sample: how many rows of each source to train on, chosen at random; -1 for all. Validation always uses all rows
            (the original samples those too).
        seed: seed of every random choice.
        batch_size: rows of an optimizer step, over all processes.
        micro_batch_size: rows of a forward pass on one process.
        num_epochs: passes over the training rows at most; three evaluations without a gain end the run.
        learning_rate: peak of the schedule, which rises over 20 steps, or a tenth of a short run, and falls linearly.
        cutoff_len: tokens of a row at most; the oldest items of a history go first (the original cuts the beginning of
            the prompt).
        group_by_length: put rows of similar length into the same optimizer step; those of a step always go by length.
        freeze_LLM: train the SID rows of the embedding matrices alone (the original leaves an output head of its own
            frozen).
        wandb_project: Weights & Biases project; given, the run reports there.
        wandb_run_name: name of the run in the trackers.
        resume_from_checkpoint: a checkpoint folder, or True for the newest one in output_dir.
        category: what the items are, for the prompts; known Amazon categories are spelled out, other text is kept.
        train_from_scratch: random weights from base_model's configuration.
        sid_index_path: JSON of item id to SID tokens.
        item_meta_path: JSON of item id to title and description.
        use_lora: train a LoRA adapter and the SID rows; the base stays frozen.
        use_qlora: LoRA on a base stored in 4 bits (NF4).
        lora_r: rank of the adapter; in an expert, lora_r / experts per token.
        lora_alpha: scale of the adapter; its output is multiplied by lora_alpha / lora_r.
        lora_dropout: dropout on the adapter's input.
        lora_target_modules: all (linear layers and experts), qkv (attention projections q, k, v, o), or names separated
            by commas.
        use_rslora: scale by lora_alpha / sqrt(lora_r) instead.
        use_dora: weight-decomposed adapter (DoRA).
        init_lora_weights: True (zero B), gaussian or orthogonal.
        load_in_8bit: store the base of use_lora in 8 bits.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        tasks: all (six; the original's four are sid_history_to_sid, sid_history_to_title, title_to_sid, sid_to_title),
            or task names separated by commas; the table is in minionerec/data/prompts.py.
        prompt_file: JSON that replaces the wording of the prompts.
        pack_rows: compute the common beginnings of an optimizer step's rows once (token trees), and let up to this many
            rows that share much, such as a user's, come in the same step; 1 leaves the steps as random as they were.
            0: every row by itself, as for models whose attention takes no tree mask; group_by_length is for that only.
        eval_step: how often to evaluate and save, as a share of the training.
        report_to: none, tensorboard or wandb.
        dry_run: check the input, print rows, tokens, steps and the predicted peak memory, and stop.
        gpu_memory: with dry_run, the memory of the card that is meant, such as 12GB or 12GiB; otherwise the one found.
    """
    flags = dict(locals())
    problems = Problems()
    checks.check_base(problems, base_model)
    checks.check_adapter_flags(
        problems,
        use_lora,
        use_qlora,
        load_in_8bit,
        lora_r,
        lora_alpha,
        lora_dropout,
        lora_target_modules,
        init_lora_weights,
    )
    adapter = use_lora or use_qlora
    if adapter and (freeze_LLM or train_from_scratch):
        problems.add("--freeze_LLM and --train_from_scratch train without an adapter; drop --use_lora / --use_qlora")
    if freeze_LLM and train_from_scratch:
        problems.add("--freeze_LLM and --train_from_scratch exclude each other: a frozen random model learns nothing")
    checks.check_positive(
        problems,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        num_epochs=num_epochs,
        learning_rate=learning_rate,
        eval_step=eval_step,
    )
    if pack_rows < 0:
        problems.add(f"--pack_rows {pack_rows}: must be 0 or more")
    if eval_step >= 1:
        problems.add(f"--eval_step {eval_step}: is a share of the training; give a number below 1")
    if cutoff_len < 32:
        problems.add(f"--cutoff_len {cutoff_len}: must be 32 or more to hold a prompt")
    if sample == 0 or sample < -1:
        problems.add(f"--sample {sample}: must be above 0, or -1 for all rows")
    checks.check_batch(problems, batch_size, micro_batch_size)
    checks.check_output_dir(problems, output_dir, resume=resume_from_checkpoint is not None)
    report_to = "wandb" if wandb_project else report_to
    checks.check_report_to(problems, report_to)
    checks.check_resume(problems, resume_from_checkpoint)
    checks.check_gpu_memory(problems, gpu_memory)
    if not category.strip():
        problems.add("--category is missing; say what the items are, such as Industrial_and_Scientific")
    prompts = problems.attempt(load_prompts, category, prompt_file, tasks)
    if prompts and all(task.rows == "item" for task in prompts.tasks.values()):
        problems.add(f"--tasks {tasks!r}: needs a task on interactions to validate on")
    catalogue = problems.attempt(read_catalogue, sid_index_path, item_meta_path)
    sids = catalogue.sids if catalogue else None
    eval_prompts = prompts and prompts.for_validation()
    train_rows, notes = check_interactions(problems, "train_file", train_file, sids, prompts)
    notes += check_interactions(problems, "eval_file", eval_file, sids, eval_prompts)[1]
    notes += items_left_out(catalogue, prompts, item_meta_path)
    problems.check()

    import torch
    from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

    import lora_utils
    from minionerec import __version__
    from minionerec.data import sid_tokens
    from minionerec.data.encoding import Encoder
    from minionerec.data.examples import Collator, item_rows, tokenized_dataset
    from minionerec.decoding.probe import prove
    from minionerec.model import device, loading
    from minionerec.plots import SFT_PANELS
    from minionerec.training.finish import finish
    from minionerec.training.resume import resume_point
    from minionerec.training.sft_trainer import SFTTrainer, plan_trees

    adapter_settings = {
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "lora_target_modules": lora_target_modules,
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "init_lora_weights": init_lora_weights,
    }
    if adapter:
        bits = 4 if use_qlora else 8 if load_in_8bit else 16
        reach = lora_utils.check_adapter(loading.load_config(base_model), bits, **adapter_settings)
    method = "qlora" if use_qlora else "lora" if use_lora else "freeze_LLM" if freeze_LLM else "full"
    run = {"command": "sft", "method": method, "version": __version__, "flags": flags, "prompts": prompts.to_json()}

    def rows_of(kind: str):
        if kind == "item":
            items = item_rows(catalogue)
            return sample_rows(items, len(items), sample, seed)
        return sample_rows(
            read_interactions(train_file, "train_file", sids, prompts.need_titles), train_rows, sample, seed
        )

    tokenizer = loading.load_tokenizer(base_model)
    sid_tokens.add_sid_tokens(tokenizer, catalogue.sid_tokens)
    encoder = Encoder(tokenizer, prompts, cutoff_len)
    remedy = f"rename the SID tokens in --sid_index_path {sid_index_path}, or take another base"
    sid_tokens.check_sids(encoder, catalogue, f"--base_model {base_model}", remedy)
    if dry_run:
        from minionerec.dryrun import report

        config = loading.load_config(base_model)
        sid_token_ids = sorted(tokenizer.convert_tokens_to_ids(catalogue.sid_tokens))
        print(*notes, sep="\n", end="\n" if notes else "")
        if adapter:
            print(reach)
        return report.sft(flags, config, tokenizer, sid_token_ids, encoder, rows_of)

    set_seed(seed)
    state = device.process_state()
    run["base_fingerprint"] = loading.fingerprint(base_model)
    resume = resume_point(output_dir, resume_from_checkpoint, run, state.print)
    for line in notes:
        state.print(line)
    model = loading.load_base(
        base_model,
        lora_utils.quantization_config(use_qlora, load_in_8bit),
        from_scratch=train_from_scratch,
        dtype=device.master_dtype() if method == "full" else None,
    )
    sid_token_ids = loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    proof = prove(model, name=f"--base_model {base_model}")  # what cannot be decoded is not worth training
    if proof.why:
        state.print(f"decoding: {proof}")
    if adapter:
        config = lora_utils.lora_config(model, sid_token_ids, **adapter_settings)
        model = lora_utils.add_lora(model, config, gradient_checkpointing)
    elif freeze_LLM:
        model = lora_utils.train_sid_rows_only(model, sid_token_ids, gradient_checkpointing)
    trainable, total = lora_utils.count_parameters(model)
    state.print(lora_utils.trainable_report(model))
    if adapter:
        state.print(reach)

    with state.local_main_process_first():
        train_dataset = tokenized_dataset(
            encoder,
            rows_of,
            [train_file, sid_index_path, item_meta_path],
            sample=sample,
            seed=seed,
        )
        eval_dataset = tokenized_dataset(
            Encoder(tokenizer, eval_prompts, cutoff_len),
            lambda kind: read_interactions(eval_file, "eval_file", sids, eval_prompts.need_titles),
            [eval_file],
        )
    state.print(f"training examples: {len(train_dataset):,}; validation examples: {len(eval_dataset):,}")

    sizes = batch_size, micro_batch_size, num_epochs
    trees = plan_trees(model, train_dataset, eval_dataset, pack_rows, *sizes, seed, state)
    accumulation = trees.accumulation if trees else batch_size // (micro_batch_size * state.num_processes)
    steps = -(-len(train_dataset) // batch_size) * num_epochs
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", os.path.join(output_dir, "tensorboard"))
    model.config.use_cache = False
    sft_trainer = SFTTrainer(
        model=model,
        run=run,
        train_batches=trees,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        args=TrainingArguments(
            output_dir=output_dir,
            run_name=wandb_run_name or None,
            report_to=report_to,
            seed=seed,
            per_device_train_batch_size=micro_batch_size,
            per_device_eval_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=num_epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=min(20, steps // 10),
            **device.mixed_precision(use_qlora or load_in_8bit),
            use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
            train_sampling_strategy="group_by_length" if group_by_length else "random",
            logging_steps=0.01,
            eval_strategy="steps",
            eval_steps=eval_step,
            save_strategy="steps",
            save_steps=eval_step,
            save_total_limit=2,  # with 1 the end of a run, also of a stopped one, leaves the best alone
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            prediction_loss_only=True,
            restore_callback_states_from_checkpoint=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device.local_device().type == "cuda",
            ddp_find_unused_parameters=False,
        ),
    )
    sft_trainer.train(resume)
    metrics = {
        "method": method,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "train_examples": len(train_dataset),
        "steps": sft_trainer.state.global_step,
        "seconds": sft_trainer.seconds,
        "best_eval_loss": sft_trainer.state.best_metric,
        "best_checkpoint": sft_trainer.best_checkpoint,
    }
    saved = None if adapter else loading.saved_dtype(base_model)
    return finish(sft_trainer, output_dir, metrics, SFT_PANELS, merge=freeze_LLM, dtype=saved)


if __name__ == "__main__":
    cli.run(train)
