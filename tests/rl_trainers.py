"""Trainers of reinforcement from every kind of start, and what they generate."""

import torch
from datasets import Dataset
from trl import GRPOConfig

import lora_utils
from minionerec.data import sid_tokens
from minionerec.decoding.trie import Trie
from minionerec.flags import AdapterFlags
from minionerec.model import device, loading
from minionerec.training.prompts import look_up
from minionerec.training.rl_trainer import ReReTrainer

STARTS = ("full", "new LoRA", "own LoRA", "new QLoRA", "own QLoRA", "own DoRA")


def start_from(sft, start: str):
    """The model and whether its adapter is new."""
    folder, _, _, ids = sft
    kind = start.split()[-1]
    torch.manual_seed(1)
    model = loading.load_base(folder, lora_utils.quantization_config(AdapterFlags(use_qlora=kind == "QLoRA")))
    if kind == "full":
        return model, False
    config = lora_utils.lora_config(model, ids, AdapterFlags(lora_r=4, lora_dropout=0.5, use_dora=kind == "DoRA"))
    model = lora_utils.add_lora(model, config)
    if start.startswith("new"):
        return model, True
    with torch.no_grad():  # an adapter that has learned something
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model, False


def make_trainer(sft, start: str, output_dir, rows=8, switches=None, reward=None, **settings):
    _, tokenizer, sids, _ = sft
    model, new_adapter = start_from(sft, start)
    sequences = sid_tokens.sid_sequences(tokenizer, sids)
    prompts = [tokenizer(f"Purchases: {sids[i]}, {sids[(i * 3) % len(sids)]}").input_ids for i in range(rows)]
    targets = [sids[(i * 5) % len(sids)] for i in range(rows)]
    values = {"output_dir": str(output_dir), "per_device_train_batch_size": 8, "num_generations": 4, "beta": 0.04}
    values |= {"learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    values |= {**device.mixed_precision("QLoRA" in start), "use_cpu": True, "loss_type": "grpo", "seed": 3}
    values |= {"activation_checkpointing": False, "remove_unused_columns": False, "use_bias_correction_kl": False}
    values |= settings

    def varied(completion_ids, **_):
        return [float(ids[0] % 2 + ids[1] % 3) for ids in completion_ids]

    return ReReTrainer(
        model,
        reward if isinstance(reward, list) else [reward or varied],
        GRPOConfig(**values),
        Dataset.from_dict({"prompt": prompts, "target": targets}),
        processing_class=tokenizer,
        eval_dataset=Dataset.from_dict({"prompt": prompts, "target": targets}),
        new_adapter=new_adapter,
        trie=Trie(sequences, tokenizer.eos_token_id),
        sids=sids,
        **{"test_beam": 10, **(switches or {})},
    )


def generated(trainer):
    """The scored completions of one generation batch."""
    trainer.model.train()
    columns = look_up(trainer.train_dataset, next(iter(trainer.get_train_dataloader())))
    return columns, trainer.roll_out(columns)


def sids_of(trainer, outputs) -> list[str]:
    pairs = zip(outputs.completion_ids.tolist(), outputs.completion_mask.tolist(), strict=True)
    sid_of = trainer.trie.sid_of(trainer.sids)
    return [sid_of[tuple(t for t, m in zip(ids, mask, strict=True) if m)] for ids, mask in pairs]


def loss_settings(mode: str) -> dict[str, str]:
    level = "sequence" if mode == "gspo" else "token"
    return {"loss_type": "dapo" if mode == "dapo" else "grpo", "importance_sampling_level": level}
