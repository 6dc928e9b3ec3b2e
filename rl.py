"""Reinforcement learning of a generative recommender from an SFT checkpoint: in full, with LoRA or with QLoRA.

Takes the flags and files of MiniOneRec's rl.py. New are the adapter flags, beams that share their prompt's cache, a
loss that computes each prompt once for all its completions, targets that belong to rows instead of to histories, exact
resuming, and input that is checked before anything is loaded.

    python rl.py --model_path out/lora/final_checkpoint --train_file train.csv --eval_file valid.csv \\
        --info_file info.txt --sid_index_path index.json --item_meta_path item.json --output_dir out/rl \\
        --use_lora True --beam_search True --reward_type ranking --learning_rate 1e-5
    python rl.py ... --output_dir out/rl_qlora --use_qlora True
"""

import math
import os
from dataclasses import replace

from minionerec import checks, cli
from minionerec.checkpoint import adapter_type, base_of_adapter, is_adapter, mismatches, read_run
from minionerec.data.files import read_catalogue, read_info, read_interactions
from minionerec.data.prompts import RECOMMENDATION, RL_TASKS, TASKS, differing_prompts, recorded_prompts
from minionerec.errors import InputError, Problems

REWARD_TYPES = ("rule", "ranking", "ranking_only", "semantic", "sasrec")
ADAPTER_FLAGS = ("lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora")
LEFT_OUT = 0.2  # of the training prompts by sample_train


def train(
    model_path: str = "",
    seed: int = 42,
    train_file: str = "",
    eval_file: str = "",
    info_file: str = "",
    category: str = "",
    wandb_project: str = "",
    wandb_run_name: str = "",
    output_dir: str = "",
    train_batch_size: int = 32,
    eval_batch_size: int = 32,
    gradient_accumulation_steps: int = 1,
    temperature: float = 1.0,
    add_gt: bool = False,
    eval_step: float = 0.199,
    num_generations: int = 16,
    num_train_epochs: int = 1,
    learning_rate: float = 1e-6,
    beta: float = 0.04,
    beam_search: bool = False,
    test_during_training: bool = True,
    dynamic_sampling: bool = False,
    mask_all_zero: bool = False,
    sync_ref_model: bool = False,
    test_beam: int = 20,
    reward_type: str = "rule",
    sample_train: bool = False,
    ada_path: str = "",
    cf_path: str = "",
    sid_index_path: str = "",
    item_meta_path: str = "",
    dapo: bool = False,
    gspo: bool = False,
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
    base_model: str = "",
    tasks: str = "all",
    prompt_file: str | None = None,
    save_steps: float = 0.199,
    resume_from_checkpoint: str | None = None,
    report_to: str = "none",
    dry_run: bool = False,
    gpu_memory: str = "",
) -> dict:
    """Trains an SFT checkpoint further on rewards for the items it recommends (GRPO). Batch sizes count completions.

    Args:
        model_path: folder of an SFT checkpoint, whole or adapter. An adapter is continued with use_lora or use_qlora
            and merged into its base without them.
        seed: seed of every random choice.
        train_file: CSV of training interactions.
        eval_file: CSV of validation interactions.
        info_file: the catalogue that completions come from, one SID, title and item id a line, separated by tabs.
        category: what the items are, for the prompts; a checkpoint that recorded its prompts needs none.
        wandb_project: Weights & Biases project; given, the run reports there.
        wandb_run_name: name of the run in the trackers.
        output_dir: folder for checkpoints, final_checkpoint, metrics.json and curves.png.
        train_batch_size: completions of a forward pass on one process.
        eval_batch_size: beams of a forward pass in evaluations during training.
        gradient_accumulation_steps: forward passes of an optimizer step.
        temperature: of sampling, and what the logits in the loss are divided by (in the original: of drawing only).
        add_gt: put the target in the place of the last completion of every group.
        eval_step: how often to evaluate, as a share of the training.
        num_generations: completions of a prompt, a group.
        num_train_epochs: passes over the prompts.
        learning_rate: peak of the cosine schedule, after 3% of the steps; gradients are clipped at 0.3. 1e-6 suits
            training in full; an adapter takes 10 to 100 times that.
        beta: weight of the KL divergence from the start; 0 drops the reference pass.
        beam_search: complete prompts with the best items by beam search (the original draws its beams at random);
            otherwise items are sampled (the original: at each token from the 50 most likely).
        test_during_training: evaluate HR@K and NDCG@K on eval_file, and keep the best checkpoint by NDCG@10 (the
            original measures the prompts of each step and keeps the last model).
        dynamic_sampling: draw 1.5 times as many completions, keep the target, if drawn, and the most frequent (the
            original keeps the target as often as it was drawn, and ignores the flag under beam_search).
        mask_all_zero: leave groups whose rewards are all equal out of the loss, KL included; they then cost no pass
            (the original ignores the flag).
        sync_ref_model: let the reference follow the policy slowly.
        test_beam: beams of an evaluation.
        reward_type: rule (1 for the target), ranking (rule, and a penalty for wrong items by rank), ranking_only (the
            penalty alone), semantic (cosine of item embeddings), sasrec (score of a SASRec model).
        sample_train: leave out a random fifth of the prompts (the original: if model_path contains sft).
        ada_path: item embeddings for semantic, .npy or .safetensors, row i for item id i (the original: a pickle, row i
            for line i of info_file).
        cf_path: folder of a model of scripts/train_sasrec.py, for sasrec (the original: a file of its own sasrec.py).
        sid_index_path: JSON of item id to SID tokens.
        item_meta_path: JSON of item id to title and description.
        dapo: average the loss over all tokens of a batch instead of over sequences first.
        gspo: importance ratios of sequences instead of tokens.
        use_lora: train a LoRA adapter, new or the checkpoint's own.
        use_qlora: LoRA on a base stored in 4 bits (NF4).
        lora_r: rank of a new adapter.
        lora_alpha: scale of a new adapter; its output is multiplied by lora_alpha / lora_r.
        lora_dropout: recorded in a new adapter; RL itself runs without dropout.
        lora_target_modules: all (linear layers and experts), qkv (attention projections q, k, v, o), or names separated
            by commas.
        use_rslora: scale by lora_alpha / sqrt(lora_r) instead.
        use_dora: weight-decomposed adapter (DoRA).
        init_lora_weights: True (zero B), gaussian or orthogonal.
        load_in_8bit: store the base of use_lora in 8 bits.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        base_model: where the base of an adapter checkpoint is, if not where the adapter says.
        tasks: all (the original takes at most 10,000 rows of title_history_to_sid), or task names separated by commas;
            the table is in minionerec/data/prompts.py.
        prompt_file: JSON that replaces the wording of the prompts, also that of the checkpoint.
        save_steps: how often to save a checkpoint, as a share of the training (the original: 0.1).
        resume_from_checkpoint: a checkpoint folder, or True for the newest one in output_dir.
        report_to: none, tensorboard or wandb.
        dry_run: check the input, print prompts, steps and the predicted peak memory, and stop.
        gpu_memory: with dry_run, the memory of the card that is meant, such as 12GB or 12GiB; otherwise the one found.
    """
    flags = dict(locals())
    problems = Problems()
    from_adapter = is_adapter(model_path)
    adapter = use_lora or use_qlora
    checks.check_model(problems, "model_path", model_path)
    if from_adapter:
        base_model = base_model or problems.attempt(base_of_adapter, model_path) or ""
        if base_model:
            checks.check_base(problems, base_model)
        if adapter_type(model_path) != "LORA":
            problems.add(
                f"--model_path {model_path}: is a checkpoint from the middle of a --freeze_LLM run, SID rows alone; "
                "give the run's final_checkpoint"
            )
    elif base_model:
        problems.add(f"--base_model names the base of an adapter checkpoint, and {model_path} is none; drop it")
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
    checks.check_positive(
        problems,
        train_batch_size=train_batch_size,
        eval_batch_size=eval_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        temperature=temperature,
        eval_step=eval_step,
        save_steps=save_steps,
        num_train_epochs=num_train_epochs,
        learning_rate=learning_rate,
        test_beam=test_beam,
    )
    for name, share in (("eval_step", eval_step), ("save_steps", save_steps)):
        if share >= 1:
            problems.add(f"--{name} {share}: is a share of the training; give a number below 1")
    if beta < 0:
        problems.add(f"--beta {beta}: must be 0 or more")
    if num_generations < 2:
        problems.add(f"--num_generations {num_generations}: a group needs 2 completions or more to compare")
    elif train_batch_size * gradient_accumulation_steps % num_generations:
        problems.add(
            f"--num_generations {num_generations} does not divide --train_batch_size {train_batch_size} x "
            f"--gradient_accumulation_steps {gradient_accumulation_steps} completions; groups must be whole"
        )
    if dapo and gspo:
        problems.add("--dapo and --gspo exclude each other; keep one")
    if sync_ref_model and not beta:
        problems.add("--sync_ref_model needs a reference, and --beta 0 drops it; give --beta above 0")
    if test_during_training and not _multiple(save_steps, eval_step):
        problems.add(
            f"--save_steps {save_steps}: must be a multiple of --eval_step {eval_step}, so that the best evaluated "
            "model is a saved one; or give --test_during_training False"
        )
    checks.check_output_dir(problems, output_dir, resume=resume_from_checkpoint is not None)
    report_to = "wandb" if wandb_project else report_to
    checks.check_report_to(problems, report_to)
    checks.check_resume(problems, resume_from_checkpoint)
    checks.check_gpu_memory(problems, gpu_memory)
    prompts = problems.attempt(recorded_prompts, model_path, category, prompt_file, tasks, RL_TASKS)
    # Of all tasks, not of this run's alone: a checkpoint is asked for recommendations in the wording that it learnt.
    wording = prompts and recorded_prompts(model_path, category, prompt_file, default=tuple(TASKS))
    validation = wording and wording.only(RECOMMENDATION)
    for task in prompts.tasks.values() if prompts else ():
        if task.ending is None:
            problems.add(f"--tasks {tasks}: {task.name} asks for a title; RL rewards items: {', '.join(RL_TASKS)}")
    endings = {task.ending for task in [*prompts.tasks.values(), *validation.tasks.values()]} if prompts else set()
    if len(endings - {None}) > 1:
        problems.add(
            f"--tasks {tasks}: what follows the SID differs between the responses, of {RECOMMENDATION} too; RL writes "
            "them all alike"
        )
    catalogue = problems.attempt(read_catalogue, sid_index_path, item_meta_path)
    sids = problems.attempt(read_info, info_file, catalogue)
    if sids and len(sids) < num_generations:
        problems.add(f"--num_generations {num_generations}: {info_file} has only {len(sids)} different SIDs")
    _, left_out = checks.check_interactions(problems, "train_file", train_file, sids, prompts)
    left_out += checks.check_interactions(problems, "eval_file", eval_file, sids, validation)[1]
    left_out += checks.items_left_out(catalogue, prompts, item_meta_path)
    problems.attempt(_check_reward, reward_type, ada_path, cf_path)
    problems.check()

    import torch
    from transformers import set_seed
    from trl import GRPOConfig

    import lora_utils
    from minionerec import __version__
    from minionerec.data import sid_tokens
    from minionerec.data.encoding import Encoder
    from minionerec.data.examples import item_rows, prompt_dataset
    from minionerec.decoding.probe import prove
    from minionerec.decoding.trie import Trie
    from minionerec.model import architecture, device, loading
    from minionerec.plots import RL_PANELS
    from minionerec.training.finish import finish
    from minionerec.training.resume import resume_point
    from minionerec.training.rl_trainer import ReReTrainer

    started_from = read_run(model_path)
    method = "qlora" if use_qlora else "lora" if use_lora else "full"
    run = {"command": "rl", "method": method, "version": __version__, "flags": flags, "prompts": wording.to_json()}
    set_seed(seed)
    state = device.process_state()

    adapter_settings = {
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "lora_target_modules": lora_target_modules,
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "init_lora_weights": init_lora_weights,
    }
    bits = 4 if use_qlora else 8 if load_in_8bit else 16
    if adapter:
        config = loading.load_config(base_model) if from_adapter else loading.load_config(model_path, "model_path")
        there = {"adapter": model_path} if from_adapter else adapter_settings
        reach = lora_utils.check_adapter(config, bits, **there)
    tokenizer = loading.load_tokenizer(model_path)
    cutoff_len = flags["cutoff_len"] = started_from.get("flags", {}).get("cutoff_len", 512)
    encoder = Encoder(tokenizer, prompts, cutoff_len)
    asked = Encoder(tokenizer, replace(prompts, tasks={**prompts.tasks, **validation.tasks}), cutoff_len)
    remedy = f"start from a checkpoint that sft.py made with {sid_index_path}"
    sequences = sid_tokens.sid_responses(asked, sids, endings.pop(), catalogue, f"--model_path {model_path}", remedy)
    # The longest SID, its end included, must fit behind the prompt.
    budget = cutoff_len - sequences.shape[1] - 1

    def rows_of(kind: str):
        if kind == "item":
            return item_rows(catalogue)
        return read_interactions(train_file, "train_file", sids, prompts.need_titles)

    train_dataset = prompt_dataset(encoder, rows_of, budget)
    if sample_train:
        train_dataset = train_dataset.shuffle(seed=seed)
        train_dataset = train_dataset.select(range(int(LEFT_OUT * len(train_dataset)), len(train_dataset)))
    eval_encoder = Encoder(tokenizer, validation, cutoff_len)
    eval_dataset = prompt_dataset(
        eval_encoder, lambda kind: read_interactions(eval_file, "eval_file", sids, validation.need_titles), budget
    )
    prompts_per_step = train_batch_size * gradient_accumulation_steps * state.num_processes // num_generations
    steps = len(train_dataset) // prompts_per_step * num_train_epochs
    if not steps:
        raise InputError(
            f"--train_file {train_file}: {len(train_dataset)} prompts are less than the {prompts_per_step} of a step"
        )
    notes = differing_prompts(model_path, prompts) if prompt_file else mismatches(model_path, flags, ("category",))
    if from_adapter:
        notes += _how_it_continues(model_path, started_from, flags, adapter)
    for line in [*left_out, *notes]:
        state.print(line)
    reward_funcs = _reward_functions(reward_type, num_generations, sids, sequences, catalogue, ada_path, cf_path)
    if dry_run:
        from minionerec.dryrun import report

        config = loading.load_config(base_model if from_adapter else model_path)
        ids = sorted(tokenizer.convert_tokens_to_ids(catalogue.sid_tokens))
        columns = list(train_dataset["prompt"])
        depth = sequences.shape[1] + 1
        if adapter:
            print(reach)
        return report.rl(flags, config, tokenizer, ids, encoder, rows_of, columns, steps, depth, own=from_adapter)
    state.print(f"prompts: {len(train_dataset):,} to train on, {len(eval_dataset):,} to validate; steps: {steps:,}")

    run["base_fingerprint"] = loading.fingerprint(base_model if from_adapter else model_path)
    resume = resume_point(output_dir, resume_from_checkpoint, run, state.print)
    quantization = lora_utils.quantization_config(use_qlora, load_in_8bit)
    peft_config = None
    if from_adapter:
        model = lora_utils.load_adapted(
            base_model,
            model_path,
            tokenizer,
            quantization,
            trainable=adapter,
            merge_in=None if adapter else device.master_dtype(),
        )
        if not adapter:
            model.requires_grad_(True)
            architecture.freeze_beside_text(model)
    else:
        model = loading.load_base(model_path, quantization, dtype=None if adapter else device.master_dtype())
        if adapter:
            sid_token_ids = sorted(tokenizer.convert_tokens_to_ids(catalogue.sid_tokens))
            peft_config = lora_utils.lora_config(model, sid_token_ids, **adapter_settings)

    # Before the weights are sharded, and for the longest rows that any process can have.
    beams = max(test_beam, num_generations * 3 // 2, train_batch_size)
    depth = sequences.shape[1] + 1
    proof = prove(model, cutoff_len, cutoff_len + beams * depth, f"--model_path {model_path}")
    state.print(f"decoding: {proof}; completions {'share a row with' if proof.shared else 'each repeat'} their prompt")

    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", os.path.join(output_dir, "tensorboard"))
    # In whole steps, and every save behind an evaluation: shares would be rounded each for itself.
    evaluate_every = math.ceil(eval_step * steps)
    save_every = (
        evaluate_every * round(save_steps / eval_step) if test_during_training else math.ceil(save_steps * steps)
    )
    watched = f"NDCG@{max(k for k in (1, 3, 5, 10) if k <= min(test_beam, len(sids)))}"
    rl_trainer = ReReTrainer(
        model=model,
        reward_funcs=reward_funcs,
        processing_class=tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        trie=Trie(sequences, tokenizer.eos_token_id),
        sids=sids,
        run=run,
        beam_search=beam_search,
        add_gt=add_gt,
        dynamic_sampling=dynamic_sampling,
        mask_all_zero=mask_all_zero,
        test_beam=test_beam,
        test_batch_size=-(-eval_batch_size // test_beam),
        args=GRPOConfig(
            output_dir=output_dir,
            run_name=wandb_run_name or None,
            report_to=report_to,
            seed=seed,
            per_device_train_batch_size=train_batch_size,
            per_device_eval_batch_size=num_generations,  # TRL checks it; `evaluate` has its own
            gradient_accumulation_steps=gradient_accumulation_steps,
            num_train_epochs=num_train_epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.03 * steps),
            max_grad_norm=0.3,
            num_generations=num_generations,
            max_completion_length=sequences.shape[1] + 1,
            temperature=temperature,
            beta=beta,
            use_bias_correction_kl=False,  # the original's KL term, without TRL's ratio in front
            sync_ref_model=sync_ref_model,
            loss_type="dapo" if dapo else "grpo",
            importance_sampling_level="sequence" if gspo else "token",
            **device.mixed_precision(use_qlora or load_in_8bit),
            use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
            logging_steps=0.01,
            eval_strategy="steps" if test_during_training else "no",
            eval_steps=evaluate_every,
            eval_on_start=test_during_training and resume is None,
            save_strategy="steps",
            save_steps=save_every,
            save_total_limit=2,  # with 1 the end of a run, also of a stopped one, leaves the best alone
            load_best_model_at_end=test_during_training,
            metric_for_best_model=f"eval_{watched}",
            greater_is_better=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device.local_device().type == "cuda",
            ddp_find_unused_parameters=False,
        ),
    )
    trainable, total = lora_utils.count_parameters(rl_trainer.model)
    state.print(lora_utils.trainable_report(rl_trainer.model))
    if adapter:
        state.print(reach)
    rl_trainer.train(resume)
    metrics = {
        "method": method,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "train_prompts": len(train_dataset),
        "steps": rl_trainer.state.global_step,
        "seconds": rl_trainer.seconds,
        f"best_eval_{watched}": rl_trainer.state.best_metric,
        "best_checkpoint": rl_trainer.best_checkpoint,
    }
    saved = None if adapter else loading.saved_dtype(base_model if from_adapter else model_path)
    return finish(rl_trainer, output_dir, metrics, RL_PANELS, dtype=saved)


def _multiple(whole: float, part: float) -> bool:
    return part > 0 and abs(whole / part - round(whole / part)) < 1e-9 and whole >= part


def _check_reward(reward_type: str, ada_path: str, cf_path: str) -> None:
    """Raises InputError for an unknown reward, or one without the file it reads."""
    if reward_type not in REWARD_TYPES:
        raise InputError(f"--reward_type {reward_type!r}: must be one of {', '.join(REWARD_TYPES)}")
    if reward_type == "semantic" and not (ada_path.endswith((".npy", ".safetensors")) and os.path.isfile(ada_path)):
        raise InputError(
            f"--ada_path {ada_path!r}: --reward_type semantic needs a file of item embeddings, .npy or .safetensors"
        )
    if reward_type == "sasrec" and not os.path.isfile(os.path.join(cf_path, "sasrec.json")):
        raise InputError(
            f"--cf_path {cf_path!r}: --reward_type sasrec needs a model of scripts/train_sasrec.py; give its folder"
        )


def _how_it_continues(model_path: str, started_from: dict, flags: dict, adapter: bool) -> list[str]:
    """What becomes of an adapter checkpoint, and where that differs from how it was trained. `flags` then say what the
    adapter is."""
    trained = started_from.get("flags", {})
    what = "continuing the adapter of {}" if adapter else "merging the adapter of {} into its base, to train it all"
    lines = [what.format(model_path)]
    if started_from and _storage(trained) != _storage(flags):
        lines.append(
            f"warning: it was trained on {_storage(trained)}, and goes on here on {_storage(flags)}, which it fits a "
            "little less exactly"
        )
    if adapter:
        lines += mismatches(model_path, flags, ADAPTER_FLAGS)
        flags.update({name: trained[name] for name in ADAPTER_FLAGS if name in trained})
    return lines


def _storage(flags: dict) -> str:
    """How a run stored its base."""
    bits = 4 if flags.get("use_qlora") else 8 if flags.get("load_in_8bit") else 16
    return f"a base in {bits} bits" if bits < 16 else "an unquantized base"


def _reward_functions(reward_type, num_generations, sids, sequences, catalogue, ada_path, cf_path) -> list:
    """Reward functions as TRL calls them: token ids and dataset columns in, a list of floats out."""
    from minionerec import sasrec
    from minionerec.training import rewards

    sid_of = {tuple(t for t in row if t >= 0): sid for row, sid in zip(sequences.tolist(), sids, strict=True)}

    def predicted(completion_ids: list[list[int]]) -> list[str]:
        return [sid_of[tuple(ids[:-1])] for ids in completion_ids]  # without the end-of-sequence token

    def rule(completion_ids, target, **_):
        return rewards.rule(predicted(completion_ids), target)

    def rank_penalty(completion_ids, target, **_):
        return rewards.rank_penalty(predicted(completion_ids), target, num_generations)

    if reward_type == "semantic":
        embeddings = rewards.read_embeddings(ada_path, {id_: item.sid for id_, item in catalogue.items.items()})

        def semantic(completion_ids, target, **_):
            return rewards.semantic(predicted(completion_ids), target, embeddings)

        return [semantic]
    if reward_type == "sasrec":
        recommender = sasrec.load(cf_path)
        lacking = [sid for sid in sids if sid not in recommender.number]
        if lacking:
            raise InputError(f"--cf_path {cf_path}: the model does not know {len(lacking)} SIDs, such as {lacking[0]}")

        def collaborative(completion_ids, target, history, **_):
            return rewards.collaborative(predicted(completion_ids), target, history, recommender.scores)

        return [collaborative]
    return {"rule": [rule], "ranking": [rule, rank_penalty], "ranking_only": [rank_penalty]}[reward_type]


if __name__ == "__main__":
    cli.run(train)
