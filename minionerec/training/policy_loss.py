"""The loss of GRPO on completions whose advantages are known, and what the log says of it.

Dimensions: `B` completions, `C` completion tokens.
"""

from collections.abc import Callable

import torch
from torch import nn
from trl import GRPOConfig

from minionerec.training.reference import Reference
from minionerec.training.rl_log import RLLog
from minionerec.training.rollouts import Completed, Rollouts

LogProbs = Callable[[nn.Module, Completed], tuple[torch.Tensor, torch.Tensor]]


class PolicyLoss:
    """The loss of passes.

    Args:
        args: the loss and its weights.
        logps: gives the log-probabilities (nats) and entropies of completions by a model, [B, C] each.
        reference: of the KL term; None for none.
        sft_weight: weight of the supervised loss, see `ReReTrainer`.
        log: of the steps.
        processes: how many average their gradients.
    """

    def __init__(
        self,
        args: GRPOConfig,
        logps: LogProbs,
        reference: Reference | None,
        sft_weight: float,
        log: RLLog,
        processes: int,
    ):
        self.args, self.logps, self.reference, self.sft_weight = args, logps, reference, sft_weight
        self.log, self.processes = log, processes

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
        losses, divergence, clipped = token_losses(
            logps,
            part.old_logps,
            reference,
            mask,
            part.advantages,
            beta=args.beta,
            clip=(args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high),
            by_sequence=args.importance_sampling_level == "sequence",
        )
        if args.loss_type == "grpo":
            loss = ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum() / count / accumulation
        else:  # dapo; the tokens are those of all that was generated, of which this may be one of several steps
            tokens = part.tokens.clamp(min=1.0) / self.processes
            loss = (losses * mask).sum() / (tokens * accumulation / args.steps_per_generation)
        found = {f"clip_ratio/{name}": values for name, values in clipped.items()} | {"entropy": entropies}
        if divergence is not None:
            found["kl"] = divergence
        tokens = mask.sum()
        for name, values in found.items():
            self.log.add_mean(name, (values.detach() * mask).sum(), tokens, first)
        if supervised is not None:
            share = len(mask) / count
            self.log.add_mean("sft_loss", supervised.detach() * share, torch.full_like(supervised, share), first)
            loss = loss + self.sft_weight * share * supervised / accumulation
        return loss

    def _with_supervised(self, model: nn.Module, part: Rollouts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `logps` gives, and the supervised loss of the targets, which are one more completion of their prompt in
        the same pass."""
        completed, place, share = part.with_targets()
        logps, entropies = (values.index_select(0, place) for values in self.logps(model, completed))
        count, width = part.completion_ids.shape
        lengths = completed.completion_mask.index_select(0, place[count:]).sum(dim=1)
        supervised = -(share * logps[count:].sum(dim=1) / lengths).sum()
        return logps[:count, :width], entropies[:count, :width], supervised


def token_losses(
    logps: torch.Tensor,
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    *,
    beta: float,
    clip: tuple[float, float],
    by_sequence: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """The loss of every token [B, C], its divergence from the reference [B, C] (nats; None without a reference), and
    how often ratios were clipped, by direction.

    Args:
        logps: log-probabilities of the policy [B, C], nats.
        old: those of the policy that made the completions; None where that is this one.
        reference: those of the reference, or None for no KL term.
        mask: [B, C], 1 for the tokens of a completion.
        advantages: [B].
        beta: weight of the KL term.
        clip: how far the ratio may fall below 1 and rise above it.
        by_sequence: ratios of whole completions (GSPO).

    Source: Shao et al., DeepSeekMath (2024); Zheng et al., Group Sequence Policy Optimization (2025).
    """
    advantages = advantages.unsqueeze(1)
    log_ratio = logps - (logps.detach() if old is None else old)
    if by_sequence:
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    ratio = log_ratio.exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)
    divergence = None
    if reference is not None:
        divergence = (reference - logps).exp() - (reference - logps) - 1
        losses = losses + beta * divergence
    if by_sequence:
        losses = losses.expand_as(logps)
    clipped: dict[str, torch.Tensor] = {}
    if old is not None:  # else all ratios are 1
        low = (ratio < 1 - clip[0]) & (advantages < 0)
        high = (ratio > 1 + clip[1]) & (advantages > 0)
        clipped = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    return losses, divergence, {name: found.float().expand_as(logps) for name, found in clipped.items()}
