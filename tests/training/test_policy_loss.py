"""The loss of reinforcement against its formula, written down term by term."""

import pytest
import torch
from as_on_gpu import answer
from rl_trainers import STARTS, generated, loss_settings, make_trainer

from minionerec.model import device
from minionerec.training.logprobs import completion_logps
from minionerec.training.policy_loss import listwise_loss


def plain_loss(mode, logps, old, ref, mask, advantages, beta, epsilon=0.2):
    """The loss of a batch, written down term by term."""
    rows = []
    for row in range(len(logps)):
        length = int(mask[row].sum())
        new, before, start = logps[row, :length], old[row, :length], ref[row, :length]
        ratio = (new - before).exp()
        if mode == "gspo":
            ratio = (new - before).mean().exp().expand(length)
        gain = torch.minimum(ratio * advantages[row], ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[row])
        kl = (start - new).exp() - (start - new) - 1
        rows.append(-gain + beta * kl)
    if mode == "dapo":
        return torch.cat(rows).mean()
    return torch.stack([row.mean() for row in rows]).mean()


@pytest.mark.parametrize("mode", ["grpo", "dapo", "gspo"])
def test_the_loss_is_the_formula(sft, tmp_path, mode):
    trainer = make_trainer(sft, "own LoRA", tmp_path, **loss_settings(mode))
    trainer.train()  # so that policy and reference differ
    _, inputs = generated(trainer)
    inputs.completion_mask[::3, 2:] = 0  # sequences of different lengths
    inputs.tokens = inputs.completion_mask.sum()
    torch.manual_seed(0)
    inputs.advantages = torch.randn(len(inputs.advantages))
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    parts = [getattr(inputs, name) for name in names]
    logps, _ = completion_logps(trainer.model, *parts, shared=False)
    inputs.old_logps = logps.detach() + 0.3 * torch.randn_like(logps)
    with torch.no_grad(), trainer.reference.in_place() as reference:
        ref, _ = completion_logps(reference, *parts, shared=False)
    mask = inputs.completion_mask
    expected = plain_loss(mode, logps, inputs.old_logps, ref, mask, inputs.advantages, 0.04)
    expected.backward()
    moving = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    grads = {name: p.grad.clone() for name, p in moving.items()}
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    loss.backward()
    for name, parameter in moving.items():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-3)


def test_completions_of_one_length_have_the_same_gradient_under_every_loss(sft, tmp_path):
    """Learned by the policy that made them, they have ratios of 1: `rl.without_effect` says so."""
    found = []
    for mode in ("grpo", "dapo", "gspo"):
        trainer = make_trainer(sft, "own LoRA", tmp_path, **loss_settings(mode))
        _, inputs = generated(trainer)
        assert inputs.completion_mask.all() and inputs.advantages.any()
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, inputs).backward()
        found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for gradients in found[1:]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][name], atol=1e-7, rtol=1e-5)


def test_the_loss_of_lists_is_the_expected_reward():
    """Written down item by item; a list without a reward teaches nothing, nor does one whose rewards are all equal."""
    torch.manual_seed(0)
    logps = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[0, 0, 1, 0, 0], [1, 0.5, 0, 0, 0.5], [0, 0, 0, 0, 0], [0.7] * 5], dtype=torch.float64)
    expected = []
    for of_list, worth in zip(logps, rewards, strict=True):
        chance = of_list.exp() / of_list.exp().sum()
        reward = sum(p * r for p, r in zip(chance, worth, strict=True))
        expected.append(-reward.log() if worth.any() else 0.0 * reward)
    plain = torch.stack(expected)
    (wanted,) = torch.autograd.grad(plain.sum(), logps)
    found = listwise_loss(logps, rewards)
    torch.testing.assert_close(found.double(), plain, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-6)
    assert not gradient[2].any()


def test_lists_that_no_policy_would_make_have_finite_gradients():
    """Log-probabilities far apart: the target's share is 0 in float32, and its gradient still is 1."""
    logps = torch.tensor([[0.0, -300.0, -5.0]], requires_grad=True)
    loss = listwise_loss(logps, torch.tensor([[0.0, 1.0, 0.0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.item() == pytest.approx(300.0067, abs=1e-3)
    assert gradient[0, 1].item() == pytest.approx(-1.0, abs=1e-4) and gradient.isfinite().all()


def test_lists_are_whole_in_every_pass(sft, tmp_path):
    """Passes of at most 6 completions have one list of 4, and change no gradient."""
    found = []
    for size in (6, 8):
        switches = {"listwise": True, "pass_size": size, "sft_weight": 0.5}
        trainer = make_trainer(sft, "own LoRA", tmp_path, switches=switches)
        _, inputs = generated(trainer)
        assert trainer.pass_size == size // 4 * 4 and inputs.advantages.any()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_the_supervised_loss_is_that_of_the_targets(sft, tmp_path, monkeypatch, start):
    """In one pass with the completions, values and gradients are those of a pass of its own without shared prompts: in
    float32, on a base in 4 bits too."""
    monkeypatch.setattr(device, "compute_dtype", answer("float32"))
    trainer = make_trainer(sft, start, tmp_path, switches={"sft_weight": 0.7, "mask_all_zero": True})
    trainer.train()
    batch, inputs = generated(trainer)
    sid_of = trainer.trie.sid_of(trainer.sids)
    assert [sid_of[tuple(ids)] for ids in inputs.target_ids.tolist()] == batch["target"]
    inputs.completion_mask[:4] = 0  # a group without a signal still learns its target
    inputs.target_mask[4:, -1] = 0  # targets of different lengths
    model, parts = trainer.model, [inputs.prompt_ids, inputs.prompt_mask, inputs.target_ids, inputs.target_mask]
    trainer.current_gradient_accumulation_steps = 2
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in moving.items()}

    logps, _ = completion_logps(model, *parts, shared=False)
    plain = -(logps.sum(dim=1) / inputs.target_mask.sum(dim=1)).mean()
    trainer.loss.sft_weight = 0.0
    expected = trainer.compute_loss(model, inputs) + 0.7 * plain / 2
    of_plain = gradients(expected)
    trainer.loss.sft_weight = 0.7
    loss = trainer.compute_loss(model, inputs)
    tolerance = {"atol": 1e-5, "rtol": 1e-3}
    torch.testing.assert_close(loss, expected, **tolerance)
    trainer.step_log.read()
    assert trainer._metrics["train"]["sft_loss"][-1] == pytest.approx(plain.item(), rel=1e-2)
    for name, gradient in gradients(loss).items():
        torch.testing.assert_close(gradient, of_plain[name], **tolerance)
