"""RL steps with random settings against GRPO written down by hand: one completion at a time through a plain model.

FUZZ_SEEDS=500 tries as many settings.
"""

import math
import random
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import build
from as_on_gpu import answer
from datasets import Dataset
from plain import fuzz_seeds
from transformers import TrainerCallback
from trl import GRPOConfig

import lora_utils
from minionerec import sasrec
from minionerec.decoding.trie import Trie
from minionerec.flags import AdapterFlags
from minionerec.model import device, loading
from minionerec.training.rewards import reward_functions
from minionerec.training.rl_trainer import ReReTrainer

# The first five share a prompt's row among its completions, the others repeat the prompt.
ARCHITECTURES = ("qwen2", "qwen3", "llama", "gemma2", "gpt2", "lfm2", "mpt", "rwkv", "mamba", "qwen3_5_text")
QUANTIZED = ("qwen2", "qwen3", "llama", "lfm2")
METHODS = ("full", "new lora", "own lora", "new qlora", "own qlora")
LEARNT = [60, 61, 62]  # tokens whose rows an adapter trains
COLUMNS = {"rule": 1, "ranking": 2, "ranking_only": 1, "prefix": 1, "semantic": 1, "sasrec": 1}


@dataclass
class Settings:
    """A run of one step, drawn from a seed."""

    seed: int

    def __post_init__(self):
        chance = random.Random(self.seed)
        self.method = chance.choice(METHODS)
        self.architecture = chance.choice(QUANTIZED if "qlora" in self.method else ARCHITECTURES)
        self.group_size, self.groups = chance.randint(2, 6), chance.randint(1, 4)
        count = self.group_size * self.groups
        self.accumulation = chance.choice([n for n in range(1, count + 1) if count % n == 0])
        self.temperature = chance.choice([1.0, 1.0, 0.6, 1.7])
        self.beta = chance.choice([0.0, 0.04, 0.5])
        self.mode = chance.choice(["plain", "dapo", "gspo", "listwise"])
        self.sft_weight = chance.choice([0.0, 0.0, 0.7])
        names = chance.sample(sorted(COLUMNS), chance.randint(1, 3))
        self.weights = {name: chance.choice([1.0, 0.7, 1 / 3, 2.5]) for name in names}
        self.switches = {
            name: chance.random() < 0.5 for name in ("beam_search", "add_gt", "dynamic_sampling", "mask_all_zero")
        }
        if self.mode == "listwise":
            self.weights = {
                name: self.weights.get(name, 1.0) for name in chance.choice(["rule", "prefix", "rule prefix"]).split()
            }
            self.switches |= {"beam_search": True, "add_gt": False}
            self.accumulation = chance.choice([n for n in range(1, self.groups + 1) if self.groups % n == 0])
        self.checkpointing, self.tied = chance.random() < 0.2, chance.random() < 0.5
        self.adapter = {"use_dora": chance.random() < 0.2, "lora_target_modules": chance.choice(["all", "all", "qkv"])}
        # A catalogue whose SIDs have 1 to 4 tokens, some of which others start with; and prompts with their targets.
        tokens = [*range(20, 26), *LEARNT]
        sids = {tuple(chance.choices(tokens, k=chance.randint(1, 4))) for _ in range(chance.randint(10, 40))}
        self.sequences = {f"s{i}": sid for i, sid in enumerate(sorted(sids))}
        sid_names = list(self.sequences)
        rows = self.groups + chance.randint(0, 2)
        prompts = [chance.choices(range(20, 70), k=chance.randint(1, 12)) for _ in range(chance.randint(1, rows))]
        self.rows = {
            "prompt": chance.choices(prompts, k=rows),
            "target": chance.choices(sid_names, k=rows),
            "history": [chance.choices(sid_names, k=chance.randint(0, 3)) for _ in range(rows)],
        }


def start_of(settings: Settings, folder: str):
    """The model to train, the same for every call."""
    flags = AdapterFlags(use_qlora="qlora" in settings.method, lora_r=4, lora_dropout=0.5, **settings.adapter)
    dtype = torch.float32 if settings.method == "full" else None
    torch.manual_seed(settings.seed)
    model = loading.load_base(folder, lora_utils.quantization_config(flags), dtype=dtype)
    if settings.method != "full":
        model = lora_utils.add_lora(model, lora_utils.lora_config(model, LEARNT, flags), settings.checkpointing)
        if settings.method.startswith("own"):
            move(model, settings.seed)
    return model


def moving(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def move(model, seed: int) -> None:
    """Changes what trains a little, so that policy and reference differ."""
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in moving(model).values():
            parameter.add_(0.03 * torch.randn_like(parameter))


class Watch(TrainerCallback):
    """Keeps the gradients of the optimizer step."""

    def __init__(self, model):
        self.model = model

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in moving(self.model).items()
        }


@dataclass
class Step:
    """What a run of one step did: the rows of its groups, their completions, gradients [name] and the log."""

    rows: list[dict]
    completions: list[list[int]]
    gradients: dict[str, torch.Tensor]
    log: dict[str, float]


def run_step(settings: Settings, model, tokenizer, trie: Trie, rewards, weights, output: str) -> Step:
    """A step of the trainer, from weights that have moved away from the reference."""
    sids, size = list(settings.sequences), settings.group_size
    trainer = ReReTrainer(
        model,
        rewards,
        GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=size * settings.groups // settings.accumulation,
            gradient_accumulation_steps=settings.accumulation,
            num_generations=size,
            temperature=settings.temperature,
            beta=settings.beta,
            loss_type="dapo" if settings.mode == "dapo" else "grpo",
            importance_sampling_level="sequence" if settings.mode == "gspo" else "token",
            use_bias_correction_kl=False,
            reward_weights=weights,
            max_completion_length=trie.depth,
            max_grad_norm=0.0,
            max_steps=1,
            logging_steps=1,
            seed=settings.seed,
            activation_checkpointing=settings.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if settings.checkpointing else None,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **device.mixed_precision("qlora" in settings.method),
        ),
        Dataset.from_dict(settings.rows),
        processing_class=tokenizer,
        eval_dataset=Dataset.from_dict(settings.rows),
        new_adapter=settings.method.startswith("new"),
        trie=trie,
        sids=sids,
        sft_weight=settings.sft_weight,
        listwise=settings.mode == "listwise",
        **settings.switches,
    )
    move(trainer.model, settings.seed + 1)
    watch, drawn, asked = Watch(trainer.model), [], []
    complete, roll_out = trainer.complete, trainer.roll_out
    trainer.complete = lambda *args: drawn.append(complete(*args)) or drawn[-1]
    trainer.roll_out = lambda columns: asked.append(columns) or roll_out(columns)
    trainer.add_callback(watch)
    trainer.train()
    (columns,), (completions,) = asked, drawn
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return Step(rows, completions, watch.gradients, trainer.state.log_history[0])


# --- By hand ----------------------------------------------------------------------------------------------------------


def rewards_by_hand(settings: Settings, group: list[str], target: str, history: list[str], item_of, scores):
    """The total rewards of a group of SIDs, in float32."""
    size, sequences = len(group), settings.sequences
    discounts = [1 / math.log2(place + 2) for place in range(size)]
    totals = []
    for place, sid in enumerate(group):
        hit = float(sid == target)
        penalty = 0.0 if hit or target not in group else -discounts[place] / sum(discounts)
        common = 0
        for one, other in zip(sequences[sid], sequences[target], strict=False):
            if one != other:
                break
            common += 1
        a, b = item_of[sid], item_of[target]
        parts = {
            "rule": hit,
            "ranking": hit + penalty,
            "ranking_only": penalty,
            "prefix": common / max(len(sequences[sid]), len(sequences[target])),
            "semantic": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
            "sasrec": scores([history], [sid])[0] if history else hit,
        }
        totals.append(sum(np.float32(weight) * np.float32(parts[name]) for name, weight in settings.weights.items()))
    return np.array(totals, dtype=np.float64)


def logps_by_hand(model, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].float()
    logps = (logits / temperature).log_softmax(dim=1)
    return torch.stack([logps[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


def list_by_hand(settings: Settings, model, step: Step, first: int, rewards: np.ndarray) -> torch.Tensor | float:
    """The loss of the list that begins with a completion: minus the log of its expected reward, by token."""
    if not rewards.any():
        return 0.0
    completions = step.completions[first : first + settings.group_size]
    prompt = step.rows[first]["prompt"]
    likely = [logps_by_hand(model, prompt, completion, settings.temperature).sum().exp() for completion in completions]
    expected = sum(p * reward for p, reward in zip(likely, rewards, strict=True)) / sum(likely)
    return -expected.log() * len(completions) / sum(map(len, completions))


def loss_by_hand(settings: Settings, model, reference: list, step: Step, totals: np.ndarray, eos: int) -> float:
    """The loss of a step, whose gradients are left in `model`. `reference` has the log-probabilities of every
    completion, `totals` the rewards, group by group."""
    count, tokens = len(step.rows), sum(map(len, step.completions))
    loss = 0.0
    for i, (row, completion) in enumerate(zip(step.rows, step.completions, strict=True)):
        group = totals[i // settings.group_size]
        advantage, silent = 0.0, bool((group == group[0]).all())
        if not silent:
            advantage = (group[i % settings.group_size] - group.mean()) / (group.std(ddof=1) + 1e-4)
        parts = []
        if settings.mode == "listwise":
            advantage = 0.0
            if i % settings.group_size == 0 and not silent:
                parts.append(list_by_hand(settings, model, step, i, group) / (count // settings.group_size))
        if not (silent and settings.switches["mask_all_zero"]):
            logps = logps_by_hand(model, row["prompt"], completion, settings.temperature)
            change = logps - logps.detach()
            ratio = change.mean().exp().expand(len(completion)) if settings.mode == "gspo" else change.exp()
            gap = reference[i] - logps
            of_tokens = -advantage * ratio + settings.beta * (gap.exp() - gap - 1)
            parts.append(of_tokens.sum() / tokens if settings.mode == "dapo" else of_tokens.mean() / count)
        if settings.sft_weight:
            target = [*settings.sequences[row["target"]], eos]
            logps = logps_by_hand(model, row["prompt"], target, settings.temperature)
            parts.append(-settings.sft_weight * logps.mean() / count)
        if parts:
            sum(parts).backward()
            loss += sum(parts).item()
    return loss


def check_step(settings: Settings, folder: str, tokenizer, tmp_path) -> None:
    sids, sequences = list(settings.sequences), settings.sequences
    trie = Trie(list(sequences.values()), tokenizer.eos_token_id)
    # The files of the rewards, and the functions.
    matrix = np.random.default_rng(settings.seed).normal(size=(len(sids), 5)).astype(np.float32)
    np.save(tmp_path / "e.npy", matrix)
    torch.manual_seed(settings.seed)
    recommender = sasrec.SASRec(sids, hidden_size=8)
    sasrec.save(recommender, str(tmp_path / "cf"))
    items = {str(i): SimpleNamespace(sid=sid) for i, sid in enumerate(sids)}
    catalogue = SimpleNamespace(items=items, tokens_of={sid: list(tokens) for sid, tokens in sequences.items()})
    sid_of = trie.sid_of(sids)
    files = str(tmp_path / "e.npy"), str(tmp_path / "cf")
    functions = reward_functions(settings.weights, settings.group_size, sid_of, catalogue, *files)

    # The step, and what it should be.
    step = run_step(settings, start_of(settings, folder), tokenizer, trie, *functions, str(tmp_path))
    plain, temperature = start_of(settings, folder).eval(), settings.temperature
    if settings.method == "full":
        plain.requires_grad_(True)
    with torch.no_grad():
        pairs = zip(step.rows, step.completions, strict=True)
        reference = [logps_by_hand(plain, row["prompt"], completion, temperature) for row, completion in pairs]
    move(plain, settings.seed + 1)
    totals = []
    for first in range(0, len(step.rows), settings.group_size):
        row = step.rows[first]
        group = [sid_of[tuple(ids)] for ids in step.completions[first : first + settings.group_size]]
        item_of = dict(zip(sids, matrix, strict=True))
        totals.append(rewards_by_hand(settings, group, row["target"], row["history"], item_of, recommender.scores))
        if settings.switches["beam_search"]:
            assert settings.switches["add_gt"] or len(set(group)) == len(group)
        if settings.switches["add_gt"]:
            assert group[-1] == row["target"]
    loss = loss_by_hand(settings, plain, reference, step, np.stack(totals), tokenizer.eos_token_id)

    # They are equal.
    assert step.log["loss"] == pytest.approx(loss, abs=1e-4, rel=1e-3)
    silent = [bool((group == group[0]).all()) for group in totals]
    assert step.log["frac_reward_zero_std"] == pytest.approx(sum(silent) / len(silent))
    assert step.log["reward"] == pytest.approx(np.mean(totals), abs=1e-5)
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in moving(plain).items()}
    assert wanted.keys() == step.gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        atol = 1e-3 * gradient.abs().max().item() + 1e-4 * largest + 1e-7
        torch.testing.assert_close(step.gradients[name], gradient, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def model_of(base, tmp_path_factory):
    """A tokenizer, and the folder of a random model of an architecture, made once."""
    tokenizer = loading.load_tokenizer(base)

    @cache
    def folder(architecture: str, tied: bool) -> str:
        path = str(tmp_path_factory.mktemp(architecture))
        build(architecture, vocab_size=len(tokenizer), tie_word_embeddings=tied).save_pretrained(path)
        return path

    return tokenizer, folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", fuzz_seeds(20))
def test_a_step_is_that_of_one_completion_at_a_time(model_of, tmp_path, monkeypatch, seed):
    monkeypatch.setattr(device, "compute_dtype", answer("float32"))
    tokenizer, folder = model_of
    settings = Settings(seed)
    check_step(settings, folder(settings.architecture, settings.tied), tokenizer, tmp_path)
