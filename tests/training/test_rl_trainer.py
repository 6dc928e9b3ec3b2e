"""Steps of reinforcement: in micro-batches and passes of any size, and with groups that teach nothing."""

import pytest
import torch
from rl_trainers import generated, loss_settings, make_trainer, sids_of

from benchmarks.counting import as_on_gpu
from minionerec.model import adapters, graphs
from minionerec.model.token_trees import tree_rows
from minionerec.training import rewards, rl_trainer
from minionerec.training.retrying import recordings


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_accumulation_splits_groups_without_changing_the_step(sft, tmp_path, sft_weight):
    trained = []
    for size, steps in ((16, 1), (8, 2), (2, 8)):
        trainer = make_trainer(
            sft, "own LoRA", tmp_path, max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, switches={"beam_search": True, "sft_weight": sft_weight},
        )  # fmt: skip
        trainer.train()
        trained.append(adapters.adapter_parameters(trainer.model, "default"))
    for other in trained[1:]:
        for name, parameter in trained[0].items():
            torch.testing.assert_close(other[name], parameter, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dapo"}, {"importance_sampling_level": "sequence"}])
def test_passes_change_no_gradient(sft, tmp_path, settings):
    """However many completions fit into memory, whole groups or not."""
    switches = {"beam_search": True, "sft_weight": 0.5, "mask_all_zero": True}
    trainer = make_trainer(sft, "own LoRA", tmp_path, per_device_train_batch_size=16, switches=switches, **settings)
    _, inputs = generated(trainer)
    inputs.completion_mask[::3, 2:] = 0
    trainer.current_gradient_accumulation_steps = 1
    found = []
    for size in (16, 8, 6):
        trainer.pass_size = size
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.step_log.read()
        logged = {name: trainer._metrics["train"][name].pop() for name in ("kl", "entropy", "sft_loss")}
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        found.append((loss.detach(), gradients, torch.tensor(list(logged.values()))))
    for loss, gradients, logged in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(logged, found[0][2], atol=1e-6, rtol=1e-4)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-3)


def test_a_step_that_does_not_fit_is_made_in_smaller_passes(sft, tmp_path, monkeypatch, capsys):
    """Also where the memory runs out in its second pass: nothing of the first one is left in the gradients."""
    real, sizes = rl_trainer.completion_logps, []

    def small(model, ids, *args, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 4 and len(sizes) > 2:  # the reference and the policy of the first pass fit
            raise torch.OutOfMemoryError
        return real(model, ids, *args, **kwargs)

    trained, logged = [], []
    for limited in (False, True):
        trainer = make_trainer(sft, "own LoRA", tmp_path, per_device_train_batch_size=16, switches={"pass_size": 8})
        if limited:
            monkeypatch.setattr(rl_trainer, "completion_logps", small)
        trainer.train()
        trained.append(adapters.adapter_parameters(trainer.model, "default"))
        logged.append([trainer.state.log_history[0][name] for name in ("kl", "entropy")])
    assert logged[1] == pytest.approx(logged[0], abs=1e-6, rel=1e-4)
    assert sizes[:3] == [8, 8, 8] and set(sizes[3:]) == {4} and trainer.pass_size == 4
    assert capsys.readouterr().out.count("out of memory: passes have 4 completions from here on") == 1
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=2e-4, rtol=1e-3)
    monkeypatch.setattr(rl_trainer, "completion_logps", lambda *args, **kwargs: small(args[0], [0] * 5))
    with pytest.raises(torch.OutOfMemoryError):  # a group by itself does not fit
        make_trainer(sft, "own LoRA", tmp_path, switches={"pass_size": 4}).train()


def test_the_smallest_passes_are_made_without_recordings_where_both_do_not_fit(sft, tmp_path, monkeypatch):
    real, said, trained = rl_trainer.completion_logps, [], []
    for limited in (False, True):
        trainer = make_trainer(sft, "own LoRA", tmp_path, max_steps=3, switches={"pass_size": 4})
        with as_on_gpu():
            graphs.record(trainer.model, limited, said.append)

            def small(*args, of=trainer.model, **kwargs):
                if recordings(of):
                    raise torch.OutOfMemoryError
                return real(*args, **kwargs)

            monkeypatch.setattr(rl_trainer, "completion_logps", small)
            trainer.train()
        trained.append(adapters.adapter_parameters(trainer.model, "default"))
        assert trainer.pass_size == 4
    assert said == ["passes are not recorded as CUDA graphs, but computed kernel by kernel: memory ran out"]
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=2e-4, rtol=1e-3)


# --- Groups without a signal, and targets -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["grpo", "dapo", "gspo"])
def test_silent_groups_cost_nothing(sft, tmp_path, mode):
    """The other groups weigh as much as without the flag, because masked ones still count in the average."""

    def first_prompt_only(completion_ids, prompts, **_):
        pairs = zip(completion_ids, prompts, strict=True)
        return [float(ids[0] % 2 + ids[1] % 3) if prompt == prompts[0] else 1.0 for ids, prompt in pairs]

    seen, learned = [], []
    losses, grads = {}, {}
    for masked in (False, True):
        trainer = make_trainer(
            sft, "own LoRA", tmp_path, switches={"mask_all_zero": masked}, reward=first_prompt_only, beta=0.0,
            **loss_settings(mode),
        )  # fmt: skip
        _, inputs = generated(trainer)
        learned.append(inputs)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda _m, _a, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True
        )
        losses[masked] = trainer.compute_loss(trainer.model, inputs)
        losses[masked].backward()
        grads[masked] = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trees = [
        tree_rows(trainer.model, *part.tensors)[0]["input_ids"] for part in (learned[0], learned[1].rows(slice(4)))
    ]
    assert seen == [ids.numel() for ids in trees] and seen[1] < seen[0]
    torch.testing.assert_close(losses[True], losses[False])
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [3, 7, 8, 16, 24])
def test_groups_of_equal_fractions_are_silent(sft, tmp_path, size):
    """Exactly: in the advantages, in what is masked and in the log. A group with the smallest difference is not."""
    third = torch.tensor(1 / 3)
    slightly = [third.item()] * (size - 1) + [torch.nextafter(third, third + 1).item()]

    def thirds(prompts, **_):
        rest = [0.1] * (len(prompts) - 3 * size)
        return [*[1 / 3] * size, *slightly, *[None] * (size - 1), 0.9, *rest]

    def tenths(prompts, **_):
        return [0.1] * len(prompts)

    trainer = make_trainer(
        sft, "new LoRA", tmp_path, switches={"mask_all_zero": True}, reward=[thirds, tenths],
        reward_weights=[0.7, 0.3], num_generations=size, per_device_train_batch_size=4 * size,
    )  # fmt: skip
    _, outputs = generated(trainer)
    advantages = outputs.advantages.view(4, size)
    assert not advantages[[0, 3]].any() and advantages[1].any() and advantages[2].any()
    counted = outputs.completion_mask.view(4, size, -1).any(dim=2)
    assert counted.tolist() == [[False] * size, [True] * size, [True] * size, [False] * size]
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [0.5]


def test_a_batch_of_silent_groups_runs_no_model(sft, tmp_path):
    trainer = make_trainer(
        sft, "own LoRA", tmp_path, switches={"mask_all_zero": True}, reward=lambda prompts, **_: [1.0] * len(prompts)
    )
    _, inputs = generated(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.get_base_model().model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("collective", [True, False])
def test_a_step_of_silent_groups_has_a_zero_gradient(sft, tmp_path, monkeypatch, collective):
    """With a pass, where other processes wait for it, and without: the optimizer continues with its momentum. The group
    is larger than a micro-batch."""
    trainer = make_trainer(
        sft, "own LoRA", tmp_path, switches={"mask_all_zero": True}, reward=lambda prompts, **_: [1.0] * len(prompts),
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_passes_are_collective", lambda: collective)
    ran = []
    trainer.model.get_base_model().model.register_forward_pre_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    _, batch = generated(trainer)
    trainer._buffered_inputs = [batch.rows(slice(i, i + 2)) for i in (0, 2)]
    trainer._step, trainer.current_gradient_accumulation_steps = 1, 2
    ran.clear()
    loss = trainer.training_step(trainer.model, [], None)
    assert loss.item() == 0.0 and ran == ([False, True] if collective else [])
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.requires_grad)


def test_rewards_see_each_row_its_own_target(sft, tmp_path):
    """Two rows with the same prompt and different targets."""
    trainer = make_trainer(sft, "new LoRA", tmp_path)
    batch, outputs = generated(trainer)
    sid_of, first = trainer.trie.sid_of(trainer.sids), sids_of(trainer, outputs)[:4]
    rows = {"prompt": [batch["prompt"][0]] * 8, "target": [first[0]] * 4 + [first[2]] * 4, "row": batch["row"]}

    def rule(completion_ids, target, **_):
        return rewards.rule([sid_of[tuple(ids)] for ids in completion_ids], target)

    trainer.reward_funcs = [rule]
    advantages = trainer.roll_out(rows).advantages.view(2, 4)
    assert advantages.argmax(dim=1).tolist() == [0, 2]
