"""Measures one RL optimizer step (completions, reference, loss, backward, update): seconds by phase, peak memory in GB.

Four ways take their steps in turn, each in its own process, on the same model, prompts and rewards:

- plain: the original's way. `generate` with a Python function that looks up the allowed tokens of every beam; policy
  and reference on the prompt repeated for each of its G completions, with logits at every position; PEFT's layers.
- plain, completion logits: the same with logits at completion positions only.
- this project's `ReReTrainer`, and the same with `mask_all_zero`.

In a fraction `--silent_share` of the groups, all rewards are equal. All ways except `mask_all_zero` must have the same
loss.

    python benchmarks/rl_step.py --repeats 5
    python benchmarks/rl_step.py --hidden_size 896 --num_hidden_layers 24 --num_attention_heads 14 --vocab_size 151936
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.common import (
    answer,
    in_turn,
    peak_memory_gb,
    print_json,
    print_table,
    quiet,
    reset_peak_memory,
    small_qwen2,
)
from benchmarks.decode import LEVELS, prefix_table, random_sids, sid_tokenizer
from minionerec import cli
from minionerec.errors import Problems
from minionerec.flags import AdapterFlags, check_positive

WAYS = {
    "plain": "plain",
    "completion": "plain, completion logits",
    "rere": "ReReTrainer",
    "masked": "ReReTrainer, mask_all_zero",
}
PHASES = ("generation", "reference", "policy", "backward", "update", "other")
BETA = 0.04


class Phases(dict[str, float]):
    """Seconds by phase, since it was last cleared."""

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the seconds while it is open to a phase."""
        import torch

        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        wait()
        started = time.perf_counter()
        yield
        wait()
        self[name] = self.get(name, 0.0) + time.perf_counter() - started


def setting(shape: dict[str, int], sids: int, prompts: int, prompt_tokens: int, silent_share: float) -> tuple[Any, ...]:
    """What a step needs: tokenizer, model, adapter configuration, SIDs, their token ids [S, D], prompts, and the
    prompts whose groups have equal rewards."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    import lora_utils
    from minionerec.data import sid_tokens
    from minionerec.model import device

    set_seed(0)
    tokenizer = sid_tokenizer(shape["vocab_size"])
    config = small_qwen2(**{**shape, "vocab_size": len(tokenizer)})
    dtype = device.compute_dtype()
    with device.local_device():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    catalogue = random_sids(sids)
    sequences = sid_tokens.sid_sequences(tokenizer, catalogue)
    ids = sorted(set(sequences.flatten().tolist()))
    adapter = lora_utils.lora_config(model, ids, AdapterFlags(lora_dropout=0.0))
    rows = torch.randint(2, shape["vocab_size"], (prompts, prompt_tokens)).tolist()
    silent = {tuple(row) for row in rows[: round(silent_share * prompts)]}
    return tokenizer, model, adapter, catalogue, sequences, rows, silent


def reward_of(prompt: list[int], completion: list[int], silent: set[tuple[int, ...]]) -> float:
    """A reward that differs between the completions of a prompt, unless the prompt is one of `silent`."""
    return 1.0 if tuple(prompt) in silent else float(completion[0] % 3 + completion[1] % 2)


def ours(connection: Connection, way: str, generations: int, micro_batch: int, *settings: Any) -> None:
    """Answers with the steps of `ReReTrainer`."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig

    import lora_utils
    from minionerec.decoding.trie import Trie
    from minionerec.model import device
    from minionerec.model.fewer_kernels import use_fewer_kernels
    from minionerec.training.rl_trainer import ReReTrainer

    tokenizer, model, adapter, catalogue, sequences, prompts, silent = setting(*settings)
    use_fewer_kernels(model)
    # As rl.py: a step is one micro-batch, in passes of `micro_batch` completions on a CPU; a GPU that has the memory
    # takes all at once.
    pass_size = None if torch.cuda.is_available() else micro_batch

    def reward(prompts: list[list[int]], completion_ids: list[list[int]], **_: object) -> list[float]:
        return [reward_of(prompt, ids, silent) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    rows = {"prompt": prompts, "target": catalogue[: len(prompts)]}
    with tempfile.TemporaryDirectory() as folder:
        trainer = ReReTrainer(
            lora_utils.add_lora(model, adapter),
            [reward],
            GRPOConfig(
                output_dir=folder,
                report_to="none",
                per_device_train_batch_size=len(prompts) * generations,
                num_generations=generations,
                beta=BETA,
                use_bias_correction_kl=False,
                loss_type="grpo",
                learning_rate=1e-4,
                max_completion_length=len(LEVELS) + 1,
                **device.mixed_precision(False),
                use_cpu=not torch.cuda.is_available(),
                activation_checkpointing=False,
                remove_unused_columns=False,
            ),
            Dataset.from_dict(rows),
            processing_class=tokenizer,
            new_adapter=True,
            trie=Trie(sequences, tokenizer.eos_token_id),
            sids=catalogue,
            mask_all_zero=way == "masked",
            pass_size=pass_size,
        )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    phases, losses = Phases(), []
    complete, logps = trainer.complete, trainer.loss.logps

    def timed_generation(*args: Any) -> Any:
        with phases.of("generation"):
            return complete(*args)

    def timed_logps(*args: Any) -> Any:
        with phases.of("policy" if torch.is_grad_enabled() else "reference"):
            return logps(*args)

    trainer.__dict__["complete"], trainer.loss.logps = timed_generation, timed_logps
    backward = trainer.accelerator.backward

    def timed_backward(loss: Any) -> None:
        with phases.of("backward"):
            backward(loss)

    trainer.accelerator.backward = timed_backward
    batch = [row for row in range(len(prompts)) for _ in range(generations)]

    def step() -> dict[str, float]:
        phases.clear()
        started = time.perf_counter()
        trainer._step, trainer._buffered_inputs = 0, None
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        trainer.accelerator.backward(loss)
        with phases.of("update"):
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        losses.append(loss.item())
        seconds = time.perf_counter() - started
        return {**phases, "other": seconds - sum(phases.values()), "step": seconds}

    reset_peak_memory()
    step()
    answer(connection, step, lambda: {"peak_gb": peak_memory_gb(), "losses": losses})


def plain(connection: Connection, way: str, generations: int, micro_batch: int, *settings: Any) -> None:
    """Answers with the steps of the original's way."""
    import torch
    from peft import get_peft_model

    tokenizer, model, adapter, _, sequences, prompts, silent = setting(*settings)
    model = get_peft_model(model, adapter).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    allowed = prefix_table(sequences.tolist(), tokenizer.eos_token_id)
    depth, groups = len(LEVELS) + 1, micro_batch // generations
    phases, losses = Phases(), []

    def logps(ids: torch.Tensor) -> torch.Tensor:
        kept = {"logits_to_keep": depth + 1} if way == "completion" else {}
        with torch.autocast(ids.device.type, model.dtype, enabled=model.dtype != torch.float32):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kept).logits
        logits = logits[:, -depth - 1 : -1].float()
        return logits.log_softmax(dim=2).gather(2, ids[:, -depth:].unsqueeze(2)).squeeze(2)

    def step() -> dict[str, float]:
        phases.clear()
        started, total = time.perf_counter(), 0.0
        input_ids = torch.tensor(prompts, device=model.device)
        width = input_ids.shape[1]
        with phases.of("generation"), torch.no_grad():
            sequences = model.eval().generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                num_beams=generations,
                num_return_sequences=generations,
                max_new_tokens=depth,
                do_sample=False,
                length_penalty=0.0,
                prefix_allowed_tokens_fn=lambda _, ids: allowed.get(tuple(ids[width:].tolist()), [0]),
            )
        model.train()
        scores = [reward_of(row[:width], row[width:], silent) for row in sequences.tolist()]
        rewards = torch.tensor(scores, device=model.device).view(-1, generations)
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        advantages = (centred / (rewards.std(dim=1, keepdim=True) + 1e-4)).flatten()
        for start in range(0, len(sequences), groups * generations):
            ids = sequences[start : start + groups * generations]
            with phases.of("reference"), torch.no_grad(), model.disable_adapter():
                reference = logps(ids)
            with phases.of("policy"):
                policy = logps(ids)
                kl = (reference - policy).exp() - (reference - policy) - 1
                gain = (policy - policy.detach()).exp() * advantages[start : start + len(ids)].unsqueeze(1)
                loss = (BETA * kl - gain).mean() * len(ids) / len(sequences)
                total += loss.item()
            with phases.of("backward"):
                loss.backward()
        with phases.of("update"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
        seconds = time.perf_counter() - started
        return {**phases, "other": seconds - sum(phases.values()), "step": seconds}

    reset_peak_memory()
    step()
    answer(connection, step, lambda: {"peak_gb": peak_memory_gb(), "losses": losses})


def work(connection: Connection, way: str, *settings: Any) -> None:
    """The process of one way."""
    quiet()
    (plain if way in ("plain", "completion") else ours)(connection, way, *settings)


def rl_step(
    hidden_size: int = 256,
    num_hidden_layers: int = 6,
    num_attention_heads: int = 4,
    vocab_size: int = 32000,
    sids: int = 3670,
    prompts: int = 10,
    prompt_tokens: int = 200,
    num_generations: int = 16,
    micro_batch_size: int = 32,
    silent_share: float = 0.7,
    repeats: int = 3,
) -> None:
    """Prints seconds of each phase, the speed-up over the plain way and peak memory.

    Args:
        hidden_size: width of the model, a Qwen2 with random weights; float32 on a CPU, bfloat16 on a GPU.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads; half as many key and value heads.
        vocab_size: tokens besides those of the SIDs.
        sids: SIDs of the catalogue.
        prompts: prompts of an optimizer step.
        prompt_tokens: tokens of a prompt.
        num_generations: completions of a prompt.
        micro_batch_size: completions of a forward pass.
        silent_share: fraction of the groups whose rewards are all equal.
        repeats: timed steps of each way; medians are reported.
    """
    problems = Problems()
    check_positive(problems, prompts=prompts, prompt_tokens=prompt_tokens, sids=sids, repeats=repeats)
    if num_generations < 2:
        problems.add(f"--num_generations {num_generations}: must be 2 or more")
    elif micro_batch_size % num_generations or prompts * num_generations % micro_batch_size:
        problems.add(
            "--micro_batch_size must be a multiple of --num_generations, and --prompts x --num_generations one of "
            "--micro_batch_size"
        )
    if sids < max(prompts, num_generations):
        problems.add(f"--sids {sids}: must be at least --prompts and --num_generations")
    problems.check()
    shape = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "vocab_size": vocab_size,
    }
    settings = (num_generations, micro_batch_size, shape, sids, prompts, prompt_tokens, silent_share)
    results = in_turn(work, list(WAYS), repeats, *settings)
    first = {way: run["losses"][0] for way, run in results.items()}
    assert all(abs(first[way] - first["plain"]) < 1e-3 for way in ("completion", "rere")), first
    plain_step = median(step["step"] for step in results["plain"]["steps"])
    table = []
    for way, run in results.items():
        seconds = {phase: median(step.get(phase, 0.0) for step in run["steps"]) for phase in (*PHASES, "step")}
        run["speed_up"] = plain_step / seconds["step"]
        table.append(
            {
                "way": WAYS[way],
                **{f"{phase} s": value for phase, value in seconds.items()},
                "times as fast": run["speed_up"],
                "peak GB": run["peak_gb"],
            }
        )
    print_table(table)
    print()
    print_json("rl_step", shape=shape, prompts=prompts, prompt_tokens=prompt_tokens, results=results)


if __name__ == "__main__":
    cli.run(rl_step)
