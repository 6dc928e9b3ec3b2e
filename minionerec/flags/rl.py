"""The flags of rl.py that are not those of every training."""

import math
import os
from dataclasses import dataclass

from minionerec import world
from minionerec.errors import Problems
from minionerec.flags import TrainingFlags, above_zero, flag, fraction_of_training, one_of, zero_or_more

REWARD_TYPES = ("rule", "ranking", "ranking_only", "prefix", "semantic", "sasrec")
BEST_BY = {"ndcg": "NDCG", "hr": "HR", "mean": "mean"}  # best_by -> the metric of evaluations


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _known_rewards(value: str) -> str | None:
    names = _names(value)
    if not names or set(names) - set(REWARD_TYPES):
        return f"must be one of {', '.join(REWARD_TYPES)}, or several of them separated by commas"
    return None if len(names) == len(set(names)) else "names a reward twice"


def _weights(value: str) -> str | None:
    try:
        good = all(0 < float(weight) < math.inf for weight in _names(value))
    except ValueError:
        good = False
    return None if good else "must be numbers above 0, separated by commas"


@dataclass(frozen=True, kw_only=True)
class RLFlags(TrainingFlags):
    """The flags of rl.py."""

    model_path: str = flag(
        "",
        "folder of an SFT checkpoint: a full model or an adapter. An adapter is continued with use_lora or "
        "use_qlora and merged into its base without them.",
    )
    base_model: str = flag("", "where the base of an adapter checkpoint is, if it is not where the adapter says.")
    info_file: str = flag(
        "",
        "the catalogue that completions come from: a line per item with SID, title and item id, separated by tabs.",
    )
    train_batch_size: int = flag(
        32,
        "completions per forward pass on one process. An optimizer step has this times gradient_accumulation_steps "
        "times the number of processes. A GPU computes as many of them in one pass as its memory holds.",
        above_zero,
    )
    eval_batch_size: int = flag(32, "beams per forward pass in evaluations during training.", above_zero)
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step.", above_zero)
    temperature: float = flag(
        1.0,
        "sampling temperature; the logits in the loss are divided by it, too (the original only samples with it).",
        above_zero,
    )
    add_gt: bool = flag(False, "replace the last completion of every group by the target.")
    eval_step: float = flag(0.199, "how often to evaluate, as a fraction of the training.", fraction_of_training)
    num_generations: int = flag(
        16,
        "completions per prompt (the group size).",
        lambda value: "a group needs 2 completions or more to compare" if value < 2 else None,
    )
    num_train_epochs: int = flag(1, "passes over the prompts.", above_zero)
    learning_rate: float = flag(
        1e-6,
        "peak of the cosine schedule, after a warm-up of 3% of the steps; gradients are clipped at 0.3. 1e-6 suits "
        "full fine-tuning; an adapter needs 10 to 100 times as much.",
        above_zero,
    )
    beta: float = flag(
        0.04, "weight of the KL divergence from the starting model; 0 drops the reference pass.", zero_or_more
    )
    beam_search: bool = flag(
        False,
        "complete prompts with the best items by beam search (the original samples its beams); otherwise items "
        "are sampled (the original: at each token from the 50 most likely).",
    )
    test_during_training: bool = flag(
        True,
        "evaluate HR@K and NDCG@K on eval_file, and keep the best checkpoint, which is the starting model if no other "
        "is better (the original measures the prompts of each step and keeps the last model).",
    )
    best_by: str = flag(
        "mean",
        "metric that chooses the best checkpoint: ndcg (NDCG@10), hr (HR@10) or mean (their geometric mean).",
        one_of(*BEST_BY),
    )
    dynamic_sampling: bool = flag(
        False,
        "sample 1.5 times as many completions, and keep the target, if it is among them, and the most frequent others "
        "(the original keeps the target as often as it was sampled, and ignores the flag under beam_search).",
    )
    mask_all_zero: bool = flag(
        False,
        "leave groups whose rewards are all equal out of the loss and its KL term; they then cost no pass. The loss is "
        "still averaged over all groups, with dapo and gspo too, so the others weigh as much as without the flag (the "
        "original ignores the flag).",
    )
    sync_ref_model: bool = flag(
        False, "let the reference model follow the policy: every 512 steps it moves 60% of the way there."
    )
    test_beam: int = flag(20, "beams per prompt in evaluations.", above_zero)
    reward_type: str = flag(
        "rule",
        "a reward, or several separated by commas, which add up: rule (1 for the target), ranking (rule, and a penalty "
        "for wrong items by rank, which needs beam_search), ranking_only (only the penalty), prefix (fraction of "
        "leading SID levels that are the target's), semantic (cosine of item embeddings), sasrec (score of a SASRec "
        "model).",
        _known_rewards,
    )
    reward_weights: str = flag(
        "", "a weight for each reward of reward_type, separated by commas; 1 each if not given.", _weights
    )
    sft_weight: float = flag(
        0.0,
        "weight of a supervised loss on the targets next to the rewards: their mean negative log-probability per "
        "token. It keeps what SFT has learned (not in the original).",
        zero_or_more,
    )
    listwise: bool = flag(
        False,
        "take each group of beams as a list: the loss is minus the log of its expected reward, with each item counted "
        "by its share of the list's probability. GRPO counts a beam as a draw, however improbable it is. Needs "
        "beam_search, and the rewards rule or prefix (not in the original).",
    )
    average_weights: bool = flag(
        False,
        "evaluate and save an average of the weights after all steps, in which later steps count more; the learning "
        "rate stays constant after its warm-up (not in the original).",
    )
    sample_train: bool = flag(
        False, "leave out a random fifth of the prompts (the original does so only if model_path contains sft)."
    )
    ada_path: str = flag(
        "",
        "item embeddings for the semantic reward, .npy or .safetensors, row i for item id i (the original: a pickle, "
        "row i for line i of info_file).",
    )
    cf_path: str = flag(
        "",
        "folder of a SASRec model (scripts/train_sasrec.py) for the sasrec reward (the original: a file of its own "
        "sasrec.py).",
    )
    dapo: bool = flag(
        False,
        "average the loss over all tokens of a batch instead of over sequences first, which differs where SIDs have "
        "different numbers of tokens. Not with gspo (in the original, dapo then wins).",
    )
    gspo: bool = flag(
        False,
        "importance ratios per sequence instead of per token. They are all 1, because completions are learned once, by "
        "the policy that made them: no gradient changes. Not with dapo.",
    )
    save_steps: float = flag(
        0.0,
        "how often to save a checkpoint, as a fraction of the training: a multiple of eval_step, because only a saved "
        "model can be the best. 0: after every evaluation; without test_during_training, 0.199 (the original: 0.1).",
        lambda value: None if value == 0 else fraction_of_training(value),
    )

    @property
    def save_fraction(self) -> float:
        """`save_steps` as a fraction of the training."""
        return self.save_steps or (self.eval_step if self.test_during_training else 0.199)

    @property
    def prompts_of_step(self) -> int:
        """The prompts of an optimizer step, over all processes."""
        completions = self.train_batch_size * self.gradient_accumulation_steps * world.size()
        return completions // max(self.num_generations, 1)

    @property
    def reward_names(self) -> list[str]:
        """The rewards that add up."""
        return _names(self.reward_type)

    @property
    def rewards(self) -> dict[str, float]:
        """The weight of every reward."""
        names = self.reward_names
        weights = [float(weight) for weight in _names(self.reward_weights)] or [1.0] * len(names)
        return dict(zip(names, weights, strict=True))

    @property
    def chooses_best(self) -> bool:
        return self.test_during_training

    def check(self, problems: Problems) -> None:
        super().check(problems)
        rewards, weights = self.reward_names, _names(self.reward_weights)
        if weights and len(weights) != len(rewards):
            problems.add(
                f"--reward_weights {self.reward_weights}: has {len(weights)} weights for the {len(rewards)} rewards of "
                f"--reward_type {self.reward_type}"
            )
        step = self.train_batch_size * self.gradient_accumulation_steps
        if self.num_generations > 1 and step % self.num_generations:
            problems.add(
                f"--num_generations {self.num_generations} does not divide --train_batch_size {self.train_batch_size} "
                f"x --gradient_accumulation_steps {self.gradient_accumulation_steps} completions; groups must be whole"
            )
        if self.dapo and self.gspo:
            problems.add("--dapo and --gspo exclude each other; keep one")
        if self.listwise:
            self._check_lists(problems)
        if self.sync_ref_model and not self.beta:
            problems.add("--sync_ref_model needs a reference, and --beta 0 drops it; give --beta above 0")
        if self.test_during_training and not _is_multiple(self.save_fraction, self.eval_step):
            problems.add(
                f"--save_steps {self.save_steps}: must be a multiple of --eval_step {self.eval_step}, so that the best "
                "evaluated model is a saved one; without the flag, every evaluated model is saved"
            )
        embeddings = self.ada_path.endswith((".npy", ".safetensors")) and os.path.isfile(self.ada_path)
        if "semantic" in rewards and not embeddings:
            problems.add(
                f"--ada_path {self.ada_path!r}: --reward_type semantic needs a file of item embeddings, .npy or "
                ".safetensors, row i for item id i"
            )

    def _check_lists(self, problems: Problems) -> None:
        if not self.beam_search:
            problems.add(
                "--listwise weighs beams by their probability, and draws have it already; give --beam_search True"
            )
        if self.add_gt:
            problems.add(
                "--listwise and --add_gt exclude each other: a list has each item once. --sft_weight 1 learns targets"
            )
        if self.dapo or self.gspo:
            problems.add("--listwise has a loss of its own, so --dapo and --gspo have no effect; drop them")
        if others := [name for name in self.reward_names if name not in ("rule", "prefix")]:
            problems.add(f"--listwise needs rewards from 0 to 1, rule or prefix, and {others[0]} may be negative")
        if self.train_batch_size % self.num_generations:
            problems.add(
                f"--num_generations {self.num_generations} does not divide --train_batch_size {self.train_batch_size}; "
                "with --listwise a forward pass has whole groups"
            )


def _is_multiple(whole: float, part: float) -> bool:
    return part > 0 and whole >= part and abs(whole / part - round(whole / part)) < 1e-9
