"""The loss of GRPO on completions whose advantages are known, the loss of lists, and what the log says of both.

Dimensions: `B` completions, `C` completion tokens, `L` lists, `G` completions of a list.
"""

from collections.abc import Callable

import torch
from torch import nn
from trl import GRPOConfig

from minionerec.training.reference import Reference
from minionerec.training.rl_log import RLLog
from minionerec.training.rollouts import Completed, Rollouts

LogProbs = Callable[[nn.Module, Completed], tuple[torch.Tensor, torch.Tensor]]


def listwise_loss(logps: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """[L], minus the log of the expected reward of each list (nats), where a completion counts by its share of the
    list's probability; 0 for a list without a reward. Beams are not draws: how probable they are is in the loss. With a
    reward of 1 for one item it is the cross-entropy of that item among those of the list.

    Args:
        logps: [L, G], of whole completions (nats).
        rewards: [L, G], 0 or more.

    Source: the expected reward is that of Shen et al., Minimum Risk Training (2016), without sharpening.
    """
    share = logps.float().log_softmax(dim=1)
    rewarded = rewards.amax(dim=1) > 0
    worth = torch.where(rewarded.unsqueeze(1), rewards.float(), 1.0).log()
    return torch.where(rewarded, -(share + worth).logsumexp(dim=1), 0.0)


class PolicyLoss:
    """The loss of passes.

    Args:
        args: the loss and its weights.
        logps: gives the log-probabilities (nats) and entropies of completions by a model, [B, C] each.
        reference: of the KL term; None for none.
        sft_weight: weight of the supervised loss, see `ReReTrainer`.
        log: of the steps.
        processes: how many average their gradients.
        listwise: the loss is `listwise_loss`, and advantages are rewards; passes then have whole groups.
    """

    def __init__(
        self,
        args: GRPOConfig,
        logps: LogProbs,
        reference: Reference | None,
        sft_weight: float,
        log: RLLog,
        processes: int,
        listwise: bool = False,
    ):
        self.args, self.logps, self.reference, self.sft_weight = args, logps, reference, sft_weight
        self.log, self.processes, self.listwise = log, processes, listwise

    def of_pass(
        self, model: nn.Module, part: Rollouts, count: int, accumulation: int = 1, first: bool = True
    ) -> torch.Tensor:
        """The loss of completions that are `part` of a micro-batch of `count`, its `first` or later ones; a step has
        `accumulation` micro-batches. The reference is asked now, only for the completions that count, and in the
        batches of the policy, so that equal models give equal values."""
        args, mask, reference, supervised = self.args, part.completion_mask, None, None
        if self.reference:
            with torch.no_grad(), self.reference.in_place() as frozen:
                reference, _ = self.logps(frozen, part)
        if self.sft_weight:
            logps, entropies, supervised = self._with_supervised(model, part)
        else:
            logps, entropies = self.logps(model, part)
        losses, divergence, found = self._of_tokens(part, logps, reference)
        if args.loss_type == "grpo":
            loss = ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum() / count / accumulation
        else:  # dapo; the tokens are those of all that was generated, of which this may be one of several steps
            tokens = part.tokens.clamp(min=1.0) / self.processes
            loss = (losses * mask).sum() / (tokens * accumulation / args.steps_per_generation)
        tokens = mask.sum()
        found["entropy"] = entropies
        if divergence is not None:
            found["kl"] = divergence
        if self.listwise:
            loss = loss + self._of_lists(part, logps, first) / count / accumulation
        for name, values in found.items():
            self.log.add_mean(name, (values.detach() * mask).sum(), tokens, first)
        if supervised is not None:
            share = len(mask) / count
            self.log.add_mean("sft_loss", supervised.detach() * share, torch.full_like(supervised, share), first)
            loss = loss + self.sft_weight * share * supervised / accumulation
        return loss

    def _of_lists(self, part: Rollouts, logps: torch.Tensor, first: bool) -> torch.Tensor:
        """The sum over completions of the loss of their list, per token as the other losses are."""
        size, mask = self.args.num_generations, part.completion_mask
        losses = listwise_loss((logps * mask).sum(dim=1).view(-1, size), part.advantages.view(-1, size))
        learned = part.advantages.view(-1, size).amax(dim=1) > 0
        self.log.add_mean("list_loss", losses.detach().sum(), learned.sum(), first)
        return (losses * size * size / mask.sum(dim=1).view(-1, size).sum(dim=1).clamp(min=1.0)).sum()

    def _with_supervised(self, model: nn.Module, part: Rollouts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `logps` gives, and the supervised loss of the targets, which are one more completion of their prompt in
        the same pass."""
        completed, place, share = part.with_targets()
        logps, entropies = (values.index_select(0, place) for values in self.logps(model, completed))
        count, width = part.completion_ids.shape
        lengths = completed.completion_mask.index_select(0, place[count:]).sum(dim=1)
        supervised = -(share * logps[count:].sum(dim=1) / lengths).sum()
        return logps[:count, :width], entropies[:count, :width], supervised

    def _of_tokens(
        self, part: Rollouts, logps: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """The loss of every token [B, C], its divergence from the reference [B, C] (nats; None without a reference),
        and how often ratios were clipped, by direction, as the log names it.

        Source: Shao et al., DeepSeekMath (2024); Zheng et al., Group Sequence Policy Optimization (2025).
        """
        args, mask, old = self.args, part.completion_mask, part.old_logps
        advantages = torch.zeros_like(mask) if self.listwise else part.advantages.unsqueeze(1)
        below, above = 1 - args.epsilon, 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
        of_sequence = args.importance_sampling_level == "sequence"  # ratios of whole completions (GSPO)
        log_ratio = logps - (logps.detach() if old is None else old)
        if of_sequence:
            log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        ratio = log_ratio.exp()
        losses = -torch.min(ratio * advantages, ratio.clamp(below, above) * advantages)
        divergence, found = None, {}
        if old is not None:  # else all ratios are 1
            low, high = (ratio < below) & (advantages < 0), (ratio > above) & (advantages > 0)
            clipped = {"low_mean": low, "high_mean": high, "region_mean": low | high}
            found = {f"clip_ratio/{name}": values.float().expand_as(logps) for name, values in clipped.items()}
        if reference is not None:
            divergence = (reference - logps).exp() - (reference - logps) - 1
            losses = losses + args.beta * divergence
        return losses.expand_as(logps), divergence, found
