"""Tiny random models of the architectures the project supports, adapted ones, and a trainer of one."""

import os

import plain
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from trl import GRPOConfig

import lora_utils
from minionerec.data.examples import Collator
from minionerec.decoding.trie import Trie
from minionerec.dryrun.memory import Prediction, predict
from minionerec.dryrun.passes import Step
from minionerec.flags import AdapterFlags
from minionerec.model import loading
from minionerec.training.rl_trainer import ReReTrainer
from minionerec.training.sft_trainer import SFTTrainer, step_order
from minionerec.training.tree_batches import Prefixes, TreeBatches

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
        return plain.moved(model, seed=4)
    return model


QUIET = {
    "report_to": "none", "use_cpu": True, "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def trainer_of(
    tmp_path, micro_batch_size: int, strategy="sequential", count=8, rows=None, trees=None, eval_rows=None, **more
) -> SFTTrainer:
    """A trainer of one step of SGD over `rows`, `count` examples if not given; `more` are arguments of the Trainer."""
    rows = rows or examples(count)
    values = {
        **QUIET, "output_dir": os.path.join(tmp_path, f"{micro_batch_size}{strategy}"), "max_steps": 1,
        "per_device_train_batch_size": micro_batch_size, "gradient_accumulation_steps": count // micro_batch_size,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
        "train_sampling_strategy": strategy, "logging_steps": 1, "dataloader_pin_memory": False, **more,
    }  # fmt: skip
    return SFTTrainer(
        model=adapted("qwen2", True, "lora"), run={}, data_collator=Collator(0), train_batches=trees,
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(eval_rows or rows),
        args=TrainingArguments(**values),
    )  # fmt: skip


def predicted(
    config, ids: list[int], step: Step, method: str = "full", on_gpu: bool = False, vocabulary: int = 96,
    reference_copy: bool = False, **flags,
) -> Prediction:  # fmt: skip
    """The predicted memory of a training by a method, with other adapter flags."""
    chosen = AdapterFlags(use_lora=method == "lora", use_qlora=method == "qlora", **flags)
    return predict(config, vocabulary, ids, step, chosen, lora_utils.adapt, on_gpu, reference_copy)


# --- Methods, and trainers of both kinds ------------------------------------------------------------------------------

METHODS = {
    "full": {},
    "freeze_LLM": {},
    "lora": {"use_lora": True},
    "qlora": {"use_qlora": True},
    "lora on 8 bits": {"use_lora": True, "load_in_8bit": True},
    "dora": {"use_lora": True, "use_dora": True},
    "qlora and dora": {"use_qlora": True, "use_dora": True},
}


def flags_of(method: str) -> AdapterFlags:
    return AdapterFlags(lora_r=4, lora_dropout=0.0, **METHODS[method])


def model_of(method: str, folder: str):
    """The base in a folder, loaded and adapted as the commands do; an adapter has moved."""
    flags = flags_of(method)
    model = loading.load_base(folder, lora_utils.quantization_config(flags))
    freeze = method == "freeze_LLM"
    torch.manual_seed(4)
    model = lora_utils.train_sid_rows_only(model, IDS) if freeze else lora_utils.adapt(model, flags, IDS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and method != "full" and "magnitude" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tree_trainer(model, output_dir, rows, batch_size, micro_batch_size, pack_rows=1, bits=16, **more) -> SFTTrainer:
    """A trainer of one epoch over rows as token trees, in SGD of rate 0.1."""
    state, dataset = PartialState(cpu=True), Dataset.from_list(rows)
    prefixes = Prefixes(dataset)
    order = step_order(prefixes, pack_rows, batch_size, seed=0)
    trees = TreeBatches(prefixes, order, 1, micro_batch_size, batch_size, state.num_processes, state.process_index)
    settings = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, **more}
    args = TrainingArguments(
        **settings, **QUIET, output_dir=str(output_dir), bf16=bits < 16, logging_steps=1,
        gradient_accumulation_steps=trees.accumulation, num_train_epochs=1,
        per_device_train_batch_size=micro_batch_size, dataloader_pin_memory=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    return SFTTrainer(
        model=model, run={}, args=args, train_batches=trees, data_collator=Collator(0), train_dataset=dataset,
        eval_dataset=dataset,
    )  # fmt: skip


def gradients_by_rows(model, rows, step, bits=16) -> tuple[float, dict[str, torch.Tensor]]:
    """The plain twin of a step: its loss and gradients, with one row at a time through the model."""
    tokens, loss = sum(len(rows[i]["input_ids"]) - rows[i]["prompt_length"] for i in step), 0.0
    model.train()
    for i in step:
        ids, start = torch.tensor([rows[i]["input_ids"]]), rows[i]["prompt_length"]
        with torch.autocast("cpu", torch.bfloat16, enabled=bits < 16):
            logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        part = F.cross_entropy(logits.float(), ids[0, start:], reduction="sum") / tokens
        part.backward()
        loss += part.item()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, found


def steps_by_rows(model, rows, steps, bits=16, rate=0.1) -> list[float]:
    """Steps of SGD with those gradients; returns the loss of each."""
    losses = []
    for step in steps:
        loss, gradients = gradients_by_rows(model, rows, step, bits)
        losses.append(loss)
        with torch.no_grad():
            for name, gradient in gradients.items():
                model.get_parameter(name).sub_(rate * gradient)
    return losses


def check_last_step(folder: str, output_dir, method: str) -> None:
    """An epoch of 9 rows in steps of 8 and micro-batches of one, most of which are empty in the last step, trains what
    row by row trains."""
    rows, bits, start = examples(9), flags_of(method).bits, model_of(method, folder)
    for i, row in enumerate(rows):
        row["input_ids"][1] = IDS[i % len(IDS)]
    trainer = tree_trainer(model_of(method, folder), output_dir, rows, 8, 1, bits=bits)
    last = list(trainer.train_batches.steps())[-1]
    assert sum(not len(part) for part in last) >= 4
    trainer.train()
    twin, order = model_of(method, folder), list(trainer.train_batches.sampler)
    losses = steps_by_rows(twin, rows, (order[:8], order[8:]), bits)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    error = 1e-4 if bits == 16 else 0.2  # in 16 or 8 bits
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), atol=0, rtol=error / 10)
    trained = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    for (name, before), after in zip(start.named_parameters(), twin.parameters(), strict=True):
        if before.requires_grad:
            moved = (after - before).norm()
            assert moved > 0 and (trained[name] - after).norm() < error * moved, name


def numbers_as_words() -> PreTrainedTokenizerFast:
    """A tokenizer of 96 words, each its own id."""
    words = Tokenizer(WordLevel({str(number): number for number in range(96)}, unk_token="95"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")


def rl_trainer(model, output_dir, new_adapter=False, bits=16, rows=2, **more) -> ReReTrainer:
    """A trainer on the items of `plain.SIDS`, whose tokens are numbers: two prompts of two completions a step."""
    tokenizer = numbers_as_words()
    sids = [" ".join(map(str, sid)) for sid in plain.SIDS]
    prompts = [[5 + i, 7, 90, 8, 9, 11 + i][: 6 - i % 2] for i in range(rows)]
    dataset = Dataset.from_dict({"prompt": prompts, "target": [sids[i % len(sids)] for i in range(rows)]})
    settings = {"beta": 0.04, "learning_rate": 1e-2, "max_steps": 1, "loss_type": "grpo", **more}
    args = GRPOConfig(
        **settings, **QUIET, output_dir=str(output_dir), bf16=bits < 16, logging_steps=1, num_generations=2,
        per_device_train_batch_size=4, activation_checkpointing=False, use_bias_correction_kl=False,
    )  # fmt: skip

    def varied(completion_ids, **_):
        return [float(ids[0] + place) for place, ids in enumerate(completion_ids)]

    return ReReTrainer(
        model, [varied], args, dataset, processing_class=tokenizer, new_adapter=new_adapter,
        trie=Trie(plain.SIDS, plain.EOS), sids=sids,
    )  # fmt: skip
