"""What the steps of an RL run add to its log."""

import math
from collections.abc import Sequence, Sized

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from minionerec.training.rewards import deviation


class RLLog:
    """What steps add to the next entry of the log. What a device knows stays there until `read`.

    Args:
        metrics: of GRPOTrainer, whose means are logged: lists of numbers, by name.
        samples: of GRPOTrainer, the latest completions.
        names: of the reward functions.
    """

    def __init__(self, metrics: dict[str, list], samples: dict, names: Sequence[str], accelerator: Accelerator):
        self.metrics, self.samples, self.names, self.accelerator = metrics, samples, names, accelerator

    def add_rewards(self, rewards: torch.Tensor, total: torch.Tensor, silent: torch.Tensor) -> None:
        """Of the completions of all processes: their rewards [B, reward functions], the sum [B], and in which groups
        all are equal."""
        spread = deviation(torch.cat([rewards.T, total.unsqueeze(0)])).flatten()
        for name, values, std in zip(self.names, rewards.T, spread, strict=False):
            self.metrics[f"rewards/{name}/mean"].append(values.nanmean().item())
            self.metrics[f"rewards/{name}/std"].append(std.item())
            self.samples["rewards"][name].extend(values.tolist())
        self.metrics["reward"].append(total.nanmean().item())
        self.metrics["reward_std"].append(spread[-1].item())
        self.metrics["frac_reward_zero_std"].append(silent.float().mean().item())

    def add_samples(self, prompts: list, texts: list[str], advantages: torch.Tensor) -> None:
        self.samples["prompt"].extend(gather_object(prompts))
        self.samples["completion"].extend(gather_object(texts))
        self.samples["advantages"].extend(advantages.tolist())

    def add_lengths(self, prompts: Sequence[Sized], completions: Sequence[Sized], before: int) -> int:
        """As TRL logs them; all of our completions end. Returns the tokens so far, of which there were `before`."""
        lengths = [len(ids) for ids in completions]
        tokens = sum(map(len, prompts)) + sum(lengths)
        if self.accelerator.num_processes > 1:
            lengths = gather_object(lengths)
            tokens = sum(gather_object([tokens]))
        self.metrics["num_tokens"] = [before + tokens]
        for kind in ("", "terminated_"):
            self.metrics[f"completions/mean_{kind}length"].append(sum(lengths) / len(lengths))
            self.metrics[f"completions/min_{kind}length"].append(float(min(lengths)))
            self.metrics[f"completions/max_{kind}length"].append(float(max(lengths)))
        self.metrics["completions/clipped_ratio"].append(0.0)
        return before + tokens

    def add_mean(self, name: str, total: torch.Tensor, count: torch.Tensor, first: bool) -> None:
        """The mean total / count of a micro-batch, to which passes after the `first` one add."""
        noted, pair = self.metrics[name], torch.stack([total.float(), count.float()])
        if first:
            noted.append(pair)
        else:
            noted[-1] = noted[-1] + pair

    def sizes(self) -> dict[str, int]:
        """How many values of each metric there are."""
        return {name: len(values) for name, values in self.metrics.items()}

    def cut(self, sizes: dict[str, int]) -> None:
        """Drops the values that came after `sizes`, of a step that is made again. Processes would otherwise reduce
        different numbers of them."""
        for name, values in self.metrics.items():
            del values[sizes.get(name, 0) :]

    def read(self) -> None:
        """Reads the means that `add_mean` has left on the device, of all processes and at once."""
        kept = [(of, i) for of in self.metrics.values() for i, v in enumerate(of) if isinstance(v, torch.Tensor)]
        if kept:
            pairs = self.accelerator.reduce(torch.stack([of[i] for of, i in kept]), reduction="sum")
            for (of, i), (total, count) in zip(kept, pairs.tolist(), strict=True):
                of[i] = total / count if count else math.nan  # which TRL leaves out of its mean

    def state(self) -> dict[str, list[float | None]]:
        """What is not logged yet, as JSON can hold it: null for NaN, which TRL leaves out of the mean. All processes
        must call it."""
        self.read()
        return {
            name: [None if math.isnan(value) else value for value in values]
            for name, values in self.metrics.items()
            if values
        }

    def resume(self, state: dict[str, list[float | None]]) -> None:
        """Takes over what `state` gave."""
        for name, values in state.items():
            self.metrics[name] += [math.nan if value is None else value for value in values]
