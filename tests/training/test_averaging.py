"""rl.py --average_weights: an average of the weights over the steps is what is evaluated, saved and final."""

import shutil
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import configuration
from helpers import cut_short, evaluate_flags, logged, newest, rl_flags, strings, tensors_of
from processes import ENGINES, assert_same_run, two_processes
from safetensors.torch import load_file
from torch import nn

import evaluate
import lora_utils
import rl
from minionerec.dryrun import report
from minionerec.errors import InputError
from minionerec.model.sharding import OwnedWeights
from minionerec.training.averaging import POWER, WeightAverage

METHOD = {"full": {}, "lora": {"use_lora": True}, "qlora": {"use_qlora": True}}


def by_hand(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    counts = [prod(range(step + 1, step + 1 + POWER)) for step in range(len(steps))]
    return {
        name: sum(count * weights[name].double() for count, weights in zip(counts, steps, strict=True)) / sum(counts)
        for name in steps[0]
    }


@pytest.fixture
def steps(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The trained weights after every step of the runs of a test."""
    recorded: list[dict[str, torch.Tensor]] = []
    averaged = WeightAverage.on_step_end

    def on_step_end(average, *args, **kwargs):
        recorded.append({name: p.detach().clone() for name, p in average.weights.named.items()})
        averaged(average, *args, **kwargs)

    monkeypatch.setattr(WeightAverage, "on_step_end", on_step_end)
    return recorded


def test_later_steps_count_more():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, steps = WeightAverage(OwnedWeights(model)), []
    for step in range(1, 8):
        model.weight.data += torch.randn(2, 3)
        steps.append({"weight": model.weight.detach().clone()})
        average.on_step_end(None, SimpleNamespace(global_step=step), None)
    with average.in_place():
        torch.testing.assert_close(model.weight.double(), by_hand(steps)["weight"], atol=1e-6, rtol=1e-6)
    assert torch.equal(model.weight, steps[-1]["weight"])


@pytest.mark.parametrize("method", METHOD)
def test_the_average_is_final(files, sft_run, tmp_path, steps, method):
    start = sft_run(method) / "final_checkpoint"
    flags = {**METHOD[method], "average_weights": True, "test_during_training": False}
    metrics = rl.train(**strings(rl_flags(files, start, tmp_path / "run", **flags)))
    assert len(steps) == metrics["steps"] == 10
    final = tensors_of(tmp_path / "run" / "final_checkpoint")
    saved = {name: name.replace(".default", "") for name in steps[0]}
    checked = [name for name in saved if saved[name] in final]  # SID rows have another name in a file
    assert len(checked) >= len(steps[0]) - 2
    for name, average in by_hand(steps).items():
        if name in checked:
            torch.testing.assert_close(final[saved[name]].double(), average, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(final[saved[name]], steps[-1][name])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_evaluated_is_saved_and_resumed(files, sft_run, tmp_path, method):
    flags = {**METHOD[method], "average_weights": True, "num_train_epochs": 2, "beam_search": False}
    flags |= {"eval_step": 0.2, "save_steps": 0.2, "sft_weight": 1.0}
    whole, two = tmp_path / "whole", tmp_path / "two"
    start = sft_run(method) / "final_checkpoint"
    rl.train(**strings(rl_flags(files, start, whole, **flags)))
    # The metrics of the last evaluation are those of the last checkpoint.
    found = evaluate.evaluate(
        **strings(evaluate_flags(files, tmp_path / "result.json", num_beams=10, base_model=newest(whole)))
        | {"test_data_path": files["valid"]}
    )
    assert found["NDCG@10"] == pytest.approx(logged(whole, "eval_NDCG@10")[-1], abs=1e-6)
    # A run that goes on from its first checkpoint ends as one that was never stopped.
    shutil.copytree(whole, two)
    assert (cut_short(two) / "unaveraged.safetensors").is_file()
    rl.train(**strings(rl_flags(files, start, two, **flags, resume_from_checkpoint="True")))
    assert_same_run(whole, two, 0.0)
    assert all(torch.equal(tensor, tensors_of(newest(two))[name]) for name, tensor in tensors_of(newest(whole)).items())


def test_a_run_resumes_only_with_what_it_began_with(files, sft_run, tmp_path):
    flags = {"use_lora": True, "average_weights": True, "test_during_training": False}
    flags = rl_flags(files, sft_run("lora") / "final_checkpoint", tmp_path / "run", **flags)
    rl.train(**strings(flags))
    flags["resume_from_checkpoint"] = "True"
    with pytest.raises(InputError, match="--average_weights is True there, False here"):
        rl.train(**strings(flags | {"average_weights": False}))
    with pytest.raises(InputError, match="--sync_ref_model is False there, True here"):
        rl.train(**strings(flags | {"sync_ref_model": True}))
    for damage in (lambda path: path.write_bytes(b"{"), lambda path: path.unlink()):
        damage(newest(tmp_path / "run") / "unaveraged.safetensors")
        with pytest.raises(InputError, match=r"has lost its unaveraged\.safetensors, or it is damaged"):
            rl.train(**strings(flags))


@pytest.fixture(scope="module")
def one(files, sft_run, tmp_path_factory):
    """A run in full in one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    rl.train(**strings(rl_flags(files, sft_run("full") / "final_checkpoint", run, **IN_FULL)))
    return run


IN_FULL = {"average_weights": True, "add_gt": True, "eval_step": 0.2, "save_steps": 0.4}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", *ENGINES])
def test_an_engine_averages_as_one_process_does(files, sft_run, one, tmp_path, engine):
    """And goes on from its checkpoint, which has the average in it and the weights that train on next to it."""
    two = tmp_path / "two"
    flags = rl_flags(files, sft_run("full") / "final_checkpoint", two, **IN_FULL, train_batch_size=8)
    two_processes(engine, tmp_path, "rl.py", flags)
    same_checkpoint(one, two)
    cut_short(two)
    two_processes(engine, tmp_path, "rl.py", {**flags, "resume_from_checkpoint": True})
    same_checkpoint(one, two)
    assert_same_run(one, two, 1e-5)


def same_checkpoint(one: Path, two: Path) -> None:
    for name in ("model.safetensors", "unaveraged.safetensors"):
        torch.testing.assert_close(*(load_file(newest(run) / name) for run in (two, one)), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_dry_run_counts_it(monkeypatch, method):
    monkeypatch.setattr(report, "print_flags", lambda flags: None)
    monkeypatch.setattr(report, "print_tasks", lambda *_: None)
    inputs = report.Inputs(configuration("qwen2"), range(96), [5], None, None, lora_utils.adapt)
    flags = {**METHOD[method], "gpu_memory": "12GB", "train_batch_size": 4, "num_generations": 2}
    plain, averaged = (
        report.rl(rl.RLFlags(**flags, average_weights=on), inputs, [[1] * 20], 1, 4, shape=None) for on in (False, True)
    )
    trained = averaged.trainable * 4 / 1e9
    assert averaged.total - plain.total == pytest.approx(trained)
