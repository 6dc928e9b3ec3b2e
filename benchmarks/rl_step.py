"""Measures one RL optimizer step (completions, reference, loss, backward, update): seconds by phase, peak memory in GB.

Four ways take their steps in turn, each in its own process, on the same model, prompts and rewards:

- plain: the original's way. `generate` with a Python function that looks up the allowed tokens of every beam; policy
  and reference on the prompt repeated for each of its G completions, with logits at every position; PEFT's layers.
- plain, completion logits: the same with logits at completion positions only.
- this project's `ReReTrainer`, and the same with `mask_all_zero`.

In a fraction `--silent_share` of the groups, all rewards are equal. All ways except `mask_all_zero` must have the same
loss.

    python -m benchmarks.rl_step --repeats 5
    python -m benchmarks.rl_step --hidden_size 896 --num_hidden_layers 24 --num_attention_heads 14 --vocab_size 151936
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.common import answer, in_turn, peak_memory_gb, print_json, print_table, quiet, reset_peak_memory
from benchmarks.decode import prefix_table
from benchmarks.fixtures import LEVELS, SmallShapeFlags, random_sids, sid_tokenizer, small_qwen2
from minionerec import cli
from minionerec.errors import Problems
from minionerec.flags import AdapterFlags, above_zero, command, flag

if TYPE_CHECKING:
    from minionerec.training.rl_trainer import ReReTrainer

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


def our_trainer(
    parts: tuple[Any, ...], generations: int, recorded: bool, times: int = 1, more: dict | None = None, **args: Any
) -> "ReReTrainer":
    """The trainer of a new LoRA adapter on the `parts` of `setting`. A step has all prompts, and the dataset each of
    them so many `times`. `more` are its own settings, `args` further ones of a `GRPOConfig`."""
    from datasets import Dataset
    from trl import GRPOConfig

    import lora_utils
    from minionerec.decoding.trie import Trie
    from minionerec.model import graphs
    from minionerec.model.fewer_kernels import use_fewer_kernels
    from minionerec.training.rl_trainer import ReReTrainer

    tokenizer, model, adapter, catalogue, sequences, prompts, silent = parts
    use_fewer_kernels(model)
    model = lora_utils.add_lora(model, adapter)
    graphs.record(model, recorded)

    def reward(prompts: list[list[int]], completion_ids: list[list[int]], **_: object) -> list[float]:
        return [reward_of(prompt, ids, silent) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    return ReReTrainer(
        model,
        [reward],
        GRPOConfig(
            per_device_train_batch_size=len(prompts) * generations,
            num_generations=generations,
            beta=BETA,
            use_bias_correction_kl=False,
            loss_type="grpo",
            learning_rate=1e-4,
            max_completion_length=len(LEVELS) + 1,
            **args,
        ),
        Dataset.from_dict({"prompt": prompts * times, "target": catalogue[: times * len(prompts)]}),
        processing_class=tokenizer,
        new_adapter=True,
        trie=Trie(sequences, tokenizer.eos_token_id),
        sids=catalogue,
        **(more or {}),
    )


def ours(connection: Connection, way: str, generations: int, micro_batch: int, *settings: Any) -> None:
    """Answers with the steps of `ReReTrainer`."""
    import torch

    from minionerec.model import device

    parts = setting(*settings)
    on_gpu = torch.cuda.is_available()
    # As rl.py: a step is one micro-batch, in passes of `micro_batch` completions on a CPU; a GPU that has the memory
    # takes all at once.
    more = {"mask_all_zero": way == "masked", "pass_size": None if on_gpu else micro_batch}
    args = {"report_to": "none", "use_cpu": not on_gpu, "activation_checkpointing": False}
    args |= {"remove_unused_columns": False, **device.mixed_precision(False)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(parts, generations, True, more=more, output_dir=folder, **args)
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
    batch = [row for row in range(len(trainer.train_dataset)) for _ in range(generations)]

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
    for _ in range(3 if on_gpu else 1):  # a GPU records the second pass, and replays the third
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


@dataclass(frozen=True, kw_only=True)
class RLStepFlags(SmallShapeFlags):
    """What a step has, and the shape of the model: float32 on a CPU, bfloat16 on a GPU."""

    sids: int = flag(3670, "SIDs of the catalogue.", above_zero)
    prompts: int = flag(10, "prompts of an optimizer step.", above_zero)
    prompt_tokens: int = flag(200, "tokens of a prompt.", above_zero)
    num_generations: int = flag(
        16, "completions of a prompt.", lambda count: None if count > 1 else "must be 2 or more"
    )
    micro_batch_size: int = flag(32, "completions of a forward pass.", above_zero)
    silent_share: float = flag(0.7, "fraction of the groups whose rewards are all equal.")
    repeats: int = flag(3, "timed steps of each way; medians are reported.", above_zero)

    def check(self, problems: Problems) -> None:
        """Adds what is wrong with the values, and the sizes that do not fit together."""
        super().check(problems)
        if problems:
            return
        if self.micro_batch_size % self.num_generations or self.prompts * self.num_generations % self.micro_batch_size:
            problems.add(
                "--micro_batch_size must be a multiple of --num_generations, and --prompts x --num_generations one of "
                "--micro_batch_size"
            )
        if self.sids < max(self.prompts, self.num_generations):
            problems.add(f"--sids {self.sids}: must be at least --prompts and --num_generations")


@command(RLStepFlags)
def rl_step(flags: RLStepFlags) -> None:
    """Prints seconds of each phase, the speed-up over the plain way and peak memory."""
    flags.problems().check()
    sizes = (flags.sids, flags.prompts, flags.prompt_tokens, flags.silent_share)
    settings = (flags.num_generations, flags.micro_batch_size, flags.shape, *sizes)
    results = in_turn(work, list(WAYS), flags.repeats, *settings)
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
    print_json("rl_step", **flags.to_dict(), results=results)


if __name__ == "__main__":
    cli.run(rl_step)
