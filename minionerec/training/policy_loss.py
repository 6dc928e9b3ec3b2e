"""The loss of GRPO on completions whose advantages are known, and what the log says of it.

Dimensions: `B` completions, `C` completion tokens.
"""

import torch


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


def advantages_of(rewards: torch.Tensor, group_size: int, scale: str = "group") -> torch.Tensor:
    """[B], how far each reward is above the mean of its group, in standard deviations of the group, of all (`batch`),
    or unscaled (`none`); 0 for a completion without a reward, which is NaN."""
    groups = rewards.view(-1, group_size)
    apart = groups - groups.nanmean(dim=1, keepdim=True)
    if scale != "none":
        apart = apart / (deviation(groups if scale == "group" else rewards.view(1, -1)) + 1e-4)
    return apart.nan_to_num(nan=0.0).flatten()


def deviation(values: torch.Tensor) -> torch.Tensor:
    """[n, 1], the standard deviation of each row of values [n, m] that are not NaN; NaN for fewer than two."""
    count = (~values.isnan()).sum(dim=1, keepdim=True)
    variance = (values - values.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1, keepdim=True)
    correction = torch.where(count > 1, count / (count - 1), torch.nan)
    return (variance * correction).sqrt()
