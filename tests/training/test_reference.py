"""Where the reference of reinforcement is, what it computes, and when it moves."""

import pytest
import torch
from peft import LoraConfig
from rl_trainers import STARTS, make_trainer

from minionerec.model import adapters, loading


@pytest.mark.parametrize("start", STARTS)
def test_kl_starts_at_zero_and_the_reference_stays(sft, tmp_path, start):
    trainer = make_trainer(sft, start, tmp_path, max_steps=3)
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.reference.adapter:
        frozen = adapters.adapter_parameters(inner, "ref")
        assert any("trainable_tokens_delta" in name for name in frozen)
    elif trainer.reference.whole is not None:
        frozen = dict(trainer.reference.whole.named_parameters())
    else:
        frozen = {name: p for name, p in inner.named_parameters() if not p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    moving = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    assert not set(map(id, moving.values())) & set(map(id, frozen.values()))
    at_start = {name: parameter.detach().clone() for name, parameter in moving.items()}
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0.0 and all(value > 1e-6 for value in kl[1:])
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())
    unmoved = [name for name, parameter in moving.items() if torch.equal(parameter, at_start[name])]
    assert unmoved == []
    assert all(p.dtype == torch.float32 for p in moving.values())
    assert {name for name, p in inner.named_parameters() if p.requires_grad} == set(moving)


def test_where_the_reference_is(sft, tmp_path):
    new, own = (make_trainer(sft, start, tmp_path) for start in ("new LoRA", "own LoRA"))
    assert new.reference.adapter is None and new.reference.whole is None
    assert list(new.model.peft_config) == ["default"]
    assert own.reference.adapter == "ref" and own.reference.whole is None
    without = make_trainer(sft, "own LoRA", tmp_path, beta=0.0)
    assert without.reference is None
    without.train()
    assert all("kl" not in entry for entry in without.state.log_history)


def test_an_adapter_that_trl_makes_is_a_new_one(sft, tmp_path):
    """The model without it is the reference, and TRL leaves the model's forward method and the arguments alone."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(sft, "full", tmp_path, switches={"peft_config": adapter})
    assert trainer.reference.whole is None and trainer.reference.adapter is None and trainer.args.beta == 0.04
    assert not any("forward" in vars(module) for module in trainer.model.modules())
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0.0 < kl[1]


@pytest.mark.parametrize("start", ["full", "new LoRA", "own LoRA"])
def test_the_reference_follows_when_it_should(sft, tmp_path, start):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    trainer = make_trainer(sft, start, tmp_path, max_steps=2, **settings)
    inner = trainer.model

    def both():
        if start == "full":
            return dict(trainer.reference.whole.named_parameters()), dict(inner.named_parameters())
        return adapters.adapter_parameters(inner, "ref"), adapters.adapter_parameters(inner, "default")

    old = {name: parameter.detach().clone() for name, parameter in both()[0].items()}
    trainer.train()
    reference, policy = both()
    assert reference.keys() == policy.keys()
    for name, parameter in reference.items():
        torch.testing.assert_close(parameter, 0.75 * old[name] + 0.25 * policy[name])
    assert any(not torch.equal(parameter, old[name]) for name, parameter in reference.items())


def test_a_saved_adapter_is_the_policy_alone(sft, tmp_path):
    trainer = make_trainer(sft, "own LoRA", tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "ref").exists()
    folder, _, _, _ = sft
    again = adapters.load_adapter(loading.load_base(folder), str(tmp_path / "saved"))
    policy = adapters.adapter_parameters(trainer.model, "default")
    saved = adapters.adapter_parameters(again, "default")
    assert saved.keys() == policy.keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in policy.items())
