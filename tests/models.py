"""Tiny random models of the architectures the project supports, adapted ones, and a trainer of one."""

import os

import torch
from datasets import Dataset
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, TrainingArguments

import lora_utils
from minionerec.data.examples import Collator
from minionerec.dryrun.memory import Prediction, Step, predict
from minionerec.flags import AdapterFlags
from minionerec.training.sft_trainer import SFTTrainer

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
ARCHITECTURES = {
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 16},
    "llama": SMALL,
    "mistral": SMALL,
    "gemma2": {**SMALL, "head_dim": 16},
    "phi3": SMALL,
    "gpt2": GPT2,
}


def config_of(architecture: str, **changes):
    return CONFIG_MAPPING[architecture](**{**ARCHITECTURES[architecture], **changes})


def make_model(architecture: str = "qwen2", scale: float = 8.0, **changes):
    """A model in evaluation mode; `scale` spreads its weights, so that its predictions differ between tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(architecture, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


IDS = [90, 91, 92]


def examples(count: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        prompt, response = 3 + i % 5, 1 + i % 4
        ids = torch.randint(1, 96, (prompt + response,), generator=generator).tolist()
        rows.append({"input_ids": ids, "prompt_length": prompt, "length": len(ids)})
    return rows


def adapted(architecture: str, tied: bool, method: str):
    model = make_model(architecture, scale=2.0, tie_word_embeddings=tied)
    if method == "lora":
        model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, AdapterFlags(lora_dropout=0.0)))
        torch.manual_seed(4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def trainer_of(tmp_path, micro_batch_size: int, strategy: str = "sequential", count: int = 8, **more) -> SFTTrainer:
    model = adapted("qwen2", True, "lora")
    return SFTTrainer(
        model=model,
        run={},
        data_collator=Collator(0),
        train_dataset=Dataset.from_list(examples(count)),
        eval_dataset=Dataset.from_list(examples(count)),
        args=TrainingArguments(
            **{
                "output_dir": os.path.join(tmp_path, f"{micro_batch_size}{strategy}"),
                "per_device_train_batch_size": micro_batch_size,
                "gradient_accumulation_steps": count // micro_batch_size,
                "max_steps": 1,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "optim": "sgd",
                "max_grad_norm": 0.0,
                "train_sampling_strategy": strategy,
                "logging_steps": 1,
                "report_to": "none",
                "use_cpu": True,
                "remove_unused_columns": False,
                "dataloader_pin_memory": False,
                "save_strategy": "no",
                "disable_tqdm": True,
                **more,
            }
        ),
    )


def predicted(
    config, ids: list[int], step: Step, method: str = "full", on_gpu: bool = False, vocabulary: int = 96,
    reference_copy: bool = False, **flags,
) -> Prediction:  # fmt: skip
    """The predicted memory of a training by a method, with other adapter flags."""
    chosen = AdapterFlags(use_lora=method == "lora", use_qlora=method == "qlora", **flags)
    return predict(config, vocabulary, ids, step, chosen, lora_utils.adapt, on_gpu, reference_copy)
