"""The same LoRA SFT by other tools, side by side in one run: rows/s, peak memory in GB, losses, and the ranking of test
rows by what each has trained.

`ours` is sft.py with token trees, `ours_one_by_one` the same with `--pack_rows 0`. `trl` is TRL's SFTTrainer with PEFT,
with padding, `trl_padding_free` and `trl_packing` its ways without. `llamafactory` is LLaMA-Factory, run by the Python
of an environment of its own (benchmarks/requirements-peers.txt), since it needs older libraries.

All start from one folder, in which the SID tokens are added. All get the same token ids, learn from the response only,
adapt the same layers and train the same SID rows, with the same optimizer, schedule and precision. For that, two
defaults of the others are changed: gradient checkpointing, which costs time and saves memory, is off, and
LLaMA-Factory, which itself can only train an embedding as a whole, is told which rows to train. The rest is stock.

Each way has its own process. They take optimizer steps in turn, so that other load on the machine slows all of them; on
a GPU, its memory must hold all. Time and memory are those from the first step to the last: loading, saving and
evaluating do not count. CPU seconds depend less on what else the machine does.

What to know about TRL 1.16 with PEFT 0.21: its loss fails on a tied output head with trained rows, which lacks the
attribute `bias`, so it is given one. Where there is no Triton, as on a CPU, it computes the logits of all positions, as
LLaMA-Factory does everywhere, and not those of the responses only. Without flash attention, rows that follow each other
without padding get a mask of all their tokens by all their tokens, in which each row sees only itself: the losses are
those of `trl`. With packing, an optimizer step has about `batch_size` rows, in packs of `micro_batch_size` rows of
average length.

    python -m benchmarks.peers --data data/Industrial_and_Scientific --base_model out/smollm2 --rows 512
    python -m benchmarks.peers --data data/Industrial_and_Scientific --base_model out/smollm2 --rows 512 \\
        --ways ours,trl,llamafactory --llamafactory ~/llamafactory/bin/python
"""

import csv
import glob
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.common import in_fork, peak_memory_gb, print_json, print_table, quiet, reset_peak_memory
from benchmarks.fixtures import ROOT, find_files
from minionerec import cli
from minionerec.checkpoint import check_base
from minionerec.data.prompts import RECOMMENDATION, load_prompts
from minionerec.errors import Problems, RunError
from minionerec.flags import Check, Flags, above_zero, check_batch, command, flag

WAYS = ("ours", "ours_one_by_one", "trl", "trl_padding_free", "trl_packing", "llamafactory")
EVAL_ROWS = 8  # of sft.py's validation file, which it cannot do without; only the last step is evaluated
SEED = 42


# --- What all ways start from -----------------------------------------------------------------------------------------


def prepare(folder: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Writes the base with its SID tokens and the token ids of the rows. Returns what all ways have in common."""
    import lora_utils
    from minionerec.data.encoding import Encoder
    from minionerec.data.examples import tokenized_dataset
    from minionerec.flags import AdapterFlags
    from minionerec.model import device, loading
    from minionerec.model.sid_start import start_sid_rows
    from sft import SFTFlags, read_input

    files = read_input(SFTFlags(**flags))
    tokenizer = loading.load_tokenizer(flags["base_model"])
    model = loading.load_base(flags["base_model"])
    known = tokenizer.get_vocab()
    new_tokens = [token for token in files.catalogue.sid_tokens if token not in known]
    sid_token_ids = loading.add_sid_tokens(model, tokenizer, files.catalogue.sid_tokens)
    start_sid_rows(model, tokenizer, new_tokens, files.catalogue, files.flags.sid_init)
    base = os.path.join(folder, "base")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)

    sources = [flags[name] for name in ("train_file", "sid_index_path", "item_meta_path")]
    encoder = Encoder(tokenizer, files.prompts, flags["cutoff_len"])
    examples = tokenized_dataset(encoder, files.train_rows, sources, sample=flags["sample"], seed=SEED)
    with open(os.path.join(folder, "examples.json"), "w", encoding="utf-8") as file:
        json.dump([examples["input_ids"][:], examples["prompt_length"][:]], file)
    adapter = lora_utils.lora_config(model, sid_token_ids, AdapterFlags(use_lora=True))
    shared = ("r", "lora_alpha", "lora_dropout", "trainable_token_indices")
    return {
        "flags": {**flags, "base_model": base},
        "lora": {"target_modules": sorted(adapter.target_modules), **{name: getattr(adapter, name) for name in shared}},
        "precision": device.mixed_precision(quantized=False),
        "cpu": device.local_device().type == "cpu",
        "rows": len(examples),
        "tokens": sum(examples["length"][:]),
        "longest": max(examples["length"][:]),
    }


def sampled(path: str, copy: str, rows: int) -> None:
    """Copies rows of a CSV file, chosen at random; -1 for all."""
    with open(path, encoding="utf-8", newline="") as file:
        head, *body = csv.reader(file)
    chosen = body if rows < 0 else random.Random(SEED).sample(body, min(rows, len(body)))
    with open(copy, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *chosen])


# --- The process of a way ---------------------------------------------------------------------------------------------


def take_turns(connection: Connection) -> None:
    """Makes every Trainer of this process wait for a word before each optimizer step, and send what the step took."""
    import torch
    from transformers import TrainerCallback, trainer

    class Turns(TrainerCallback):
        losses: list[float]
        started = cpu_started = 0.0

        def wait(self) -> None:
            connection.recv()
            self.started, self.cpu_started = time.perf_counter(), time.process_time()

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.losses = []
            connection.send({"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)})
            reset_peak_memory()
            self.wait()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu_started
            last = state.global_step == state.max_steps
            connection.send({"seconds": seconds, "cpu": cpu, "peak_gb": peak_memory_gb(), "last": last})
            self.wait()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.losses += [float(logs["loss"])] if "loss" in logs else []

        def on_train_end(self, args, state, control, **kwargs):
            connection.send({"losses": self.losses})

    trainer.DEFAULT_CALLBACKS.append(Turns)


def labelled(folder: str) -> list[dict[str, list[int]]]:
    """The rows as token ids and labels, which are -100 on the prompt."""
    with open(os.path.join(folder, "examples.json"), encoding="utf-8") as file:
        rows, prompt_lengths = json.load(file)
    return [
        {"input_ids": ids, "labels": [-100] * length + ids[length:]}
        for ids, length in zip(rows, prompt_lengths, strict=True)
    ]


def trainer_settings(job: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """The arguments of transformers' Trainer that the peers share. They are those of sft.py."""
    flags = job["flags"]
    steps = math.ceil(job["rows"] / flags["batch_size"]) * flags["num_epochs"]
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": flags["micro_batch_size"],
        "gradient_accumulation_steps": flags["batch_size"] // flags["micro_batch_size"],
        "num_train_epochs": flags["num_epochs"],
        "learning_rate": flags["learning_rate"],
        "lr_scheduler_type": "linear",
        "warmup_steps": min(20, steps // 10),
        "optim": "adamw_torch_fused",
        "logging_steps": 0.01,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "use_cpu": job["cpu"],
        "dataloader_pin_memory": not job["cpu"],
        **job["precision"],
    }


def train_ours(job: dict[str, Any], folder: str, output_dir: str, way: str) -> None:
    import sft

    pack_rows = {"pack_rows": 0} if way == "ours_one_by_one" else {}
    sft.train(**job["flags"], **pack_rows, output_dir=output_dir)


def train_trl(job: dict[str, Any], folder: str, output_dir: str, way: str) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer, pack_dataset

    flags, settings = job["flags"], trainer_settings(job, output_dir)
    dataset = Dataset.from_list(labelled(folder))
    settings |= {"max_length": None, "padding_free": way == "trl_padding_free"}
    if way == "trl_packing":
        # A pack is a micro-batch. Every row must fit into one, or it would be cut. `trl` has as many steps, or more.
        size = max(job["longest"], math.ceil(flags["micro_batch_size"] * job["tokens"] / job["rows"]))
        packs = len(pack_dataset(dataset, size, "bfd")) / math.ceil(job["rows"] / flags["batch_size"])
        settings |= {"packing": True, "max_length": size}
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": math.ceil(packs)}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(flags["base_model"], dtype="auto"),
        processing_class=AutoTokenizer.from_pretrained(flags["base_model"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **job["lora"]),
        train_dataset=dataset,
        args=SFTConfig(**settings, gradient_checkpointing=False),
    )
    head = trainer.model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.register_parameter("bias", None)  # TRL 1.16 asks for it, and PEFT 0.21's head with trained rows has none
    trainer.train()
    trainer.save_model(os.path.join(output_dir, "final_checkpoint"))


def train_llamafactory(job: dict[str, Any], folder: str, output_dir: str, way: str) -> None:
    from datasets import Dataset, DatasetDict
    from llamafactory.model import adapter
    from llamafactory.train.tuner import run_exp

    flags, lora = job["flags"], job["lora"]
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in labelled(folder)]
    tokenized = f"{output_dir}-rows"
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tokenized)
    adapter.LoraConfig = partial(adapter.LoraConfig, trainable_token_indices=lora["trainable_token_indices"])
    run_exp(
        {
            **trainer_settings(job, os.path.join(output_dir, "final_checkpoint")),
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": flags["base_model"],
            "dataset": "none",  # must be named, is not read
            "tokenized_path": tokenized,
            "template": "empty",
            "cutoff_len": flags["cutoff_len"],
            "finetuning_type": "lora",
            "lora_rank": lora["r"],
            "lora_alpha": lora["lora_alpha"],
            "lora_dropout": lora["lora_dropout"],
            "lora_target": ",".join(lora["target_modules"]),
            "disable_gradient_checkpointing": True,
        }
    )


def run_way(way: str, folder: str) -> None:
    """Trains one way, in turns with the others, to `folder`/`way`/final_checkpoint. Its standard input is the
    connection."""
    take_turns(Connection(os.dup(0)))
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    train = {"ours": train_ours, "trl": train_trl, "llamafactory": train_llamafactory}[way.split("_")[0]]
    train(job, folder, os.path.join(folder, way), way)


# --- The benchmark ----------------------------------------------------------------------------------------------------


def in_steps(folder: str, ways: list[str], llamafactory: str) -> dict[str, dict[str, Any]]:
    """Trains all ways, one optimizer step of each in turn. Returns what their processes have sent."""
    processes, connections = {}, {}
    results: dict[str, dict[str, Any]] = {way: {"steps": [], "cpu_s": 0.0} for way in ways}

    def received(way: str) -> dict[str, Any]:
        try:
            return connections[way].recv()
        except EOFError:
            with open(os.path.join(folder, f"{way}.log"), encoding="utf-8") as file:
                raise RunError(f"{way} failed:\n{''.join(file.readlines()[-25:])}") from None

    try:
        for way in ways:
            connections[way], theirs = Pipe()
            python = llamafactory if way == "llamafactory" else sys.executable
            command = [python, "-m", "benchmarks.peers", "--worker", way, folder]
            with open(os.path.join(folder, f"{way}.log"), "w") as log:
                processes[way] = subprocess.Popen(command, cwd=ROOT, stdin=theirs.fileno(), stdout=log, stderr=log)
            theirs.close()
            results[way] |= received(way)
        waiting = list(ways)
        while waiting:
            for way in list(waiting):
                connections[way].send("step")
                step = received(way)
                results[way]["steps"].append(step["seconds"])
                results[way]["cpu_s"] += step["cpu"]
                if step["last"]:
                    waiting.remove(way)
                    results[way]["peak_gb"] = step["peak_gb"]
            print(f"{max(len(result['steps']) for result in results.values())} steps", file=sys.stderr)
        # What follows the last step, such as saving, is not timed.
        for way in ways:
            connections[way].send("finish")
            results[way] |= received(way)
            if processes[way].wait():
                received(way)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return results


def ranked(folder: str, ways: list[str], flags: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics that evaluate.py computes with the adapter of every way."""
    import evaluate

    base, metrics = os.path.join(folder, "base"), {}
    for way in ways:
        adapter = os.path.join(folder, way, "final_checkpoint")
        if not way.startswith("ours"):
            for file in glob.glob(os.path.join(glob.escape(base), "tokenizer*")):
                shutil.copy(file, adapter)  # as it was; other versions of transformers write it differently
        result = os.path.join(folder, f"{way}.json")
        with redirect_stdout(sys.stderr):  # the table comes last
            metrics[way] = evaluate.evaluate(**flags, base_model=adapter, result_json_data=result)
    return metrics


def _rows(least: int) -> Check[int]:
    return lambda value: None if value >= least or value == -1 else f"must be {least} or more, or -1 for all"


@dataclass(frozen=True, kw_only=True)
class PeerFlags(Flags):
    """The rows, the model, who trains it, and how."""

    data: str = flag("", "folder that holds train.csv, test.csv, info.txt, an .index.json and an .item.json file.")
    base_model: str = flag("", "folder or hub name of the model to start from.")
    category: str = flag("Industrial_and_Scientific", "what the items are, for the prompts.")
    tasks: str = flag(RECOMMENDATION, "all, or task names separated by commas.")
    ways: str = flag(
        "ours,trl,trl_padding_free",
        "some of ours, ours_one_by_one, trl, trl_padding_free, trl_packing, llamafactory, separated by commas.",
    )
    llamafactory: str = flag("", "the Python of an environment with LLaMA-Factory.")
    rows: int = flag(512, "rows of each source to train on, chosen at random; -1 for all.", _rows(1))
    test_rows: int = flag(256, "rows of test.csv to rank, chosen at random; -1 for all, 0 for none.", _rows(0))
    epochs: int = flag(1, "passes over the rows.", above_zero)
    batch_size: int = flag(64, "rows of an optimizer step.", above_zero)
    micro_batch_size: int = flag(8, "rows of a forward pass.", above_zero)
    learning_rate: float = flag(1e-3, "peak of the schedule.", above_zero)
    cutoff_len: int = flag(512, "tokens of a row at most.")
    num_beams: int = flag(20, "beams of a ranking.", above_zero)

    @property
    def chosen(self) -> list[str]:
        """The ways, each once."""
        return list(dict.fromkeys(way.strip() for way in self.ways.split(",")))

    def check(self, problems: Problems) -> None:
        check_base(problems, self.base_model)
        super().check(problems)
        check_batch(problems, self.batch_size, self.micro_batch_size)
        problems += [f"--ways {way!r}: there are {', '.join(WAYS)}" for way in self.chosen if way not in WAYS]
        if "llamafactory" in self.chosen and not shutil.which(self.llamafactory):
            problems.add(f"--llamafactory {self.llamafactory!r}: give the Python of an environment with LLaMA-Factory")
        problems.attempt(load_prompts, self.category, None, self.tasks)


@command(PeerFlags)
def peers(flags: PeerFlags) -> None:
    """Prints rows/s, peak memory, losses and ranking metrics of the same LoRA SFT by this project and by others."""
    # Check the flags and the files.
    problems = flags.problems()
    files = find_files(problems, flags.data, "train.csv", "test.csv", "info.txt", "*.index.json", "*.item.json")
    train_file, test_file, info_file, sid_index_path, item_meta_path = files
    chosen = flags.chosen

    with tempfile.TemporaryDirectory() as folder:
        # Prepare what all ways start from.
        eval_file, ranked_file = os.path.join(folder, "eval.csv"), os.path.join(folder, "test.csv")
        sampled(train_file, eval_file, EVAL_ROWS)
        sampled(test_file, ranked_file, flags.test_rows)
        of_sft = {
            "base_model": flags.base_model,
            "train_file": train_file,
            "eval_file": eval_file,
            "sid_index_path": sid_index_path,
            "item_meta_path": item_meta_path,
            "category": flags.category,
            "tasks": flags.tasks,
            "sample": flags.rows,
            "seed": SEED,
            "use_lora": True,
            "num_epochs": flags.epochs,
            **{
                name: getattr(flags, name) for name in ("batch_size", "micro_batch_size", "learning_rate", "cutoff_len")
            },
            "eval_step": 0.9999,
        }
        job = in_fork(prepare, folder, {**of_sft, "output_dir": folder})
        del job["flags"]["output_dir"]
        with open(os.path.join(folder, "job.json"), "w", encoding="utf-8") as file:
            json.dump(job, file)

        # Train, then rank with what each way has saved.
        runs = in_steps(folder, chosen, flags.llamafactory)
        metrics: dict[str, dict[str, float]] = {way: {} for way in chosen}
        if flags.test_rows:
            of_test = {"test_data_path": ranked_file, "info_file": info_file, "category": flags.category}
            metrics = in_fork(ranked, folder, chosen, {**of_test, "num_beams": flags.num_beams})

    table = []
    for way, run in runs.items():
        seconds = sum(run["steps"])
        table.append(
            {
                "way": way,
                "rows/s": job["rows"] * flags.epochs / seconds,
                f"{chosen[0]} times as fast": seconds / sum(runs[chosen[0]]["steps"]),
                "CPU s": run["cpu_s"],
                "peak GB": run["peak_gb"],
                "trained parameters": run["trained"],
                "steps": len(run["steps"]),
                "first loss": run["losses"][0],
                "last loss": run["losses"][-1],
                **{name: metrics[way][name] for name in ("HR@10", "NDCG@10") if flags.test_rows},
            }
        )
    print_table(table)
    sizes = {name: getattr(flags, name) for name in ("batch_size", "micro_batch_size", "epochs", "test_rows")}
    print_json("peers", table=table, rows=job["rows"], tokens=job["tokens"], **sizes, runs=runs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        quiet()
        run_way(sys.argv[2], sys.argv[3])
    else:
        cli.run(peers)
