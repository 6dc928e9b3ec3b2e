"""What a GPU computes in, and what trains in it: float32 weights of full runs, float16 on older cards, one card of
several."""

import json
import shutil
from pathlib import Path

import accelerate
import pytest
import torch
from as_on_gpu import answer
from helpers import logged, newest, rl_flags, sft_flags, strings, tensors_of
from models import trainer_of
from processes import ENGINES, two_processes
from torch import nn
from transformers import TrainingArguments

import evaluate
import rl
import sft
from minionerec.decoding import ranking
from minionerec.errors import RunError
from minionerec.model import device, loading
from minionerec.training.durable import DurableRun

# --- Full runs --------------------------------------------------------------------------------------------------------


def train(files, base, output, **flags) -> Path:
    sft.train(**strings(sft_flags(files, base, output, **flags)))
    return output


def share_changed(before: Path, after: Path, dtype: torch.dtype = torch.float32) -> float:
    """Of the values of a model, those of another one that are not what they were in `dtype`."""
    old, new = tensors_of(before), tensors_of(after)
    changed = sum(int((new[name][: len(t)] != t.to(dtype)).sum()) for name, t in old.items())
    return changed / sum(tensor.numel() for tensor in old.values())


def test_a_full_run_trains_all_weights_at_a_small_rate(files, base, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "compute_dtype", answer("bfloat16"))
    flags = {"learning_rate": 1e-6, "sample": 10}
    run = train(files, base, tmp_path / "masters", **flags)
    assert share_changed(Path(base), newest(run)) > 0.95
    # What the test is about: weights in bfloat16 lose nearly every step.
    monkeypatch.setattr(device, "master_dtype", lambda: torch.bfloat16)
    run = train(files, base, tmp_path / "bfloat16", **flags)
    assert share_changed(Path(base), newest(run), torch.bfloat16) < 0.05


def test_reinforcement_trains_all_weights_at_its_default_rate(files, sft_run, tmp_path, monkeypatch):
    start = sft_run("full") / "final_checkpoint"
    monkeypatch.setattr(device, "compute_dtype", answer("bfloat16"))
    flags = rl_flags(files, start, tmp_path / "rl", add_gt=True, test_during_training=False, learning_rate=1e-6)
    rl.train(**strings(flags))
    assert share_changed(start, newest(tmp_path / "rl")) > 0.95


@pytest.mark.parametrize(("learning_rate", "lost"), [(1e-6, True), (3e-2, False)])
def test_reinforcement_says_that_rounding_loses_its_changes(files, sft_run, tmp_path, capsys, learning_rate, lost):
    """From a start in bfloat16, whose precision final_checkpoint keeps."""
    start, run = tmp_path / "start", tmp_path / "rl"
    shutil.copytree(sft_run("full") / "final_checkpoint", start)
    loading.load_base(str(start)).to(torch.bfloat16).save_pretrained(start)
    flags = rl_flags(files, start, run, add_gt=True, test_during_training=False, learning_rate=learning_rate)
    rl.train(**strings(flags))
    assert share_changed(start, newest(run)) > 0.95
    assert (share_changed(start, run / "final_checkpoint", torch.bfloat16) < 0.5) == lost
    printed = capsys.readouterr().out
    assert (f"of the trained weights in final_checkpoint are still those of {start}:" in printed) == lost
    assert ("checkpoint-10 has them in float32" in printed) == lost


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_start_that_is_removed_during_a_full_run_is_not_missed(files, sft_run, tmp_path, monkeypatch, command):
    """As to make room for checkpoints."""
    start, run, trains = tmp_path / "start", tmp_path / "run", DurableRun.train
    shutil.copytree(sft_run("full") / "final_checkpoint", start)
    loading.load_base(str(start)).to(torch.bfloat16).save_pretrained(start)

    def train(*args):
        shutil.rmtree(start)
        return trains(*args)

    monkeypatch.setattr(DurableRun, "train", train)
    if command == "sft":
        sft.train(**strings(sft_flags(files, start, run, sample=10)))
    else:
        rl.train(**strings(rl_flags(files, start, run, test_during_training=False)))
    assert {t.dtype for t in tensors_of(run / "final_checkpoint").values()} == {torch.bfloat16}


def test_a_full_run_in_16_bits_follows_the_curve_of_float32(files, base, tmp_path, monkeypatch):
    curves = []
    for name in ("float32", "bfloat16"):
        monkeypatch.setattr(device, "compute_dtype", answer(name))
        run = train(files, base, tmp_path / name, learning_rate=1e-3)
        curves.append([*logged(run, "loss"), *logged(run, "eval_loss")])
    assert curves[0][-1] < curves[0][0] - 0.3
    assert curves[1] == pytest.approx(curves[0], abs=3e-3)


def test_full_runs_keep_the_precision_of_their_base(base, files, tmp_path):
    """On a CPU, where a base in bfloat16 trains in float32 too."""
    folder = tmp_path / "base"
    loading.load_base(base).to(torch.bfloat16).save_pretrained(folder)
    loading.load_tokenizer(base).save_pretrained(folder)
    assert loading.saved_dtype(str(folder)) == torch.bfloat16 and loading.saved_dtype(base) == torch.float32
    run = train(files, str(folder), tmp_path / "run", sample=10)
    assert {t.dtype for t in tensors_of(run / "final_checkpoint").values()} == {torch.bfloat16}
    config = json.loads((run / "final_checkpoint" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in tensors_of(newest(run)).values()} == {torch.float32}


def test_rows_alone_leave_a_base_that_was_rounded_as_it_was(files, base, tmp_path, monkeypatch):
    """A base in float32 on a GPU that computes in bfloat16."""
    monkeypatch.setattr(device, "compute_dtype", answer("bfloat16"))
    run = train(files, base, tmp_path / "run", sample=10, freeze_LLM=True, learning_rate=1e-2)
    before, after = tensors_of(Path(base)), tensors_of(run / "final_checkpoint")
    assert all(torch.equal(after[name][: len(old)], old) for name, old in before.items())
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.float32}


@pytest.fixture
def on_gpus(monkeypatch):
    """This process and those it starts compute in bfloat16."""
    monkeypatch.setattr(device, "compute_dtype", answer("bfloat16"))
    monkeypatch.setenv("AS_ON_GPU", "bfloat16")


IN_FULL = {"micro_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def one(files, base, tmp_path_factory) -> Path:
    """A run in full on one GPU."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(device, "compute_dtype", answer("bfloat16"))
        return train(files, base, tmp_path_factory.mktemp("full") / "one", **IN_FULL)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", *ENGINES])
def test_engines_train_in_full_as_one_gpu_does(files, base, one, tmp_path, on_gpus, engine):
    two = tmp_path / "two"
    two_processes(engine, tmp_path, "sft.py", sft_flags(files, base, two, **IN_FULL))
    for key in ("loss", "eval_loss"):
        assert logged(two, key) == pytest.approx(logged(one, key), abs=1e-2)
    assert {t.dtype for t in tensors_of(newest(two)).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_start_reinforcement_in_full_at_their_reference(files, sft_run, tmp_path, on_gpus, engine):
    start = sft_run("full") / "final_checkpoint"
    flags = rl_flags(files, start, tmp_path / "rl", add_gt=True, test_during_training=False, train_batch_size=8)
    two_processes(engine, tmp_path, "rl.py", flags)
    kl = logged(tmp_path / "rl", "kl")
    assert kl[0] == 0.0 and kl[-1] > 0


# --- float16 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def float16(monkeypatch):
    """A device that computes in float16. accelerate keeps autocast and scaler for GPUs; torch has both for CPUs.
    With the first scale gradients overflow."""
    monkeypatch.setattr(device, "compute_dtype", answer("float16"))
    start = accelerate.Accelerator.__init__

    def started(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.state.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**24)

    monkeypatch.setattr(accelerate.Accelerator, "__init__", started)
    monkeypatch.setattr("transformers.trainer.Accelerator.__init__", started)


@pytest.mark.parametrize("flags", [{}, {"use_lora": True}, {"use_qlora": True}, {"freeze_LLM": True}])
def test_sft_in_float16_skips_steps_that_overflow_and_learns(files, base, tmp_path, float16, flags):
    run = train(files, base, tmp_path / "run", learning_rate=1e-2, **flags)
    losses, norms = logged(run, "loss"), logged(run, "grad_norm")
    assert torch.tensor(norms).isinf().any() and len(losses) == 15
    assert losses[-1] < losses[0] - 0.1
    assert (newest(run) / "scaler.pt").exists()
    if not flags:
        assert {t.dtype for t in tensors_of(newest(run)).values()} == {torch.float32}


def test_rl_in_float16(files, sft_run, tmp_path, float16):
    start = sft_run("full") / "final_checkpoint"
    for name, flags in (("full", {}), ("lora", {"use_lora": True})):
        rl.train(**strings(rl_flags(files, start, tmp_path / name, add_gt=True, **flags)))
        kl = logged(tmp_path / name, "kl")
        assert kl[0] == 0.0 and kl[-1] > 0
    flags = {"base_model": str(tmp_path / "lora" / "final_checkpoint"), "info_file": files["info"], "category": "bolts"}
    flags |= {"test_data_path": files["test"], "result_json_data": str(tmp_path / "result.json"), "num_beams": 10}
    assert 0 <= evaluate.evaluate(**flags)["HR@10"] <= 1


def test_an_overflow_that_reaches_the_loss_ends_the_run_and_says_why(tmp_path, float16, monkeypatch):
    run = trainer_of(tmp_path, 8, fp16=True)
    monkeypatch.setattr(
        run, "compute_loss", lambda model, *_, **__: sum(p.sum() for p in model.parameters()) * torch.inf
    )
    with pytest.raises(RunError, match="this one computes in float16"):
        run.train()


@pytest.mark.parametrize("for_all", [True, False])
def test_a_ranking_without_numbers_is_no_ranking(files, base, tmp_path, monkeypatch, for_all):
    """Activations beyond float16 make scores NaN, for every prompt or for some, and any order of NaNs is as good."""
    checkpoint = train(files, base, tmp_path / "sft", sample=10) / "final_checkpoint"
    load, search = loading.load_base, ranking.constrained_beam_search

    def overflowing(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.layers[0].mlp.down_proj.weight.data.fill_(torch.inf)
        return model

    def nan_for_one(*args, **kwargs):
        beams, scores = search(*args, **kwargs)
        scores[0] = torch.nan
        return beams, scores

    if for_all:
        monkeypatch.setattr(loading, "load_base", overflowing)
    else:
        monkeypatch.setattr(ranking, "constrained_beam_search", nan_for_one)
    monkeypatch.setattr(device, "compute_dtype", answer("float16"))
    flags = {"base_model": str(checkpoint), "info_file": files["info"], "category": "bolts", "num_beams": 10}
    with pytest.raises(RunError, match="predictions are NaN or infinite in"):
        evaluate.evaluate(**flags, test_data_path=files["test"], result_json_data=str(tmp_path / "result.json"))
    assert not (tmp_path / "result.json").exists()


# --- Several cards, one card a process --------------------------------------------------------------------------------


@pytest.fixture
def two_visible(monkeypatch):
    """A machine with two GPUs and no launcher, as transformers sees it: TrainingArguments count both."""
    setup = TrainingArguments.__dict__["_setup_devices"].func

    def found(args):
        device = setup(args)
        args._n_gpu = 2
        return device

    monkeypatch.setattr(TrainingArguments.__dict__["_setup_devices"], "func", found)
    monkeypatch.setattr(nn.DataParallel, "__init__", lambda *_: pytest.fail("the model was wrapped for both cards"))


@pytest.mark.parametrize("flags", [{}, {"use_qlora": True}])
def test_two_visible_cards_train_as_one(files, base, tmp_path, two_visible, flags):
    run = train(files, base, tmp_path / "sft", learning_rate=1e-2, **flags)
    assert json.loads((run / "metrics.json").read_text())["steps"] == 15  # 240 examples in batches of 16
    rl.train(**strings(rl_flags(files, run / "final_checkpoint", tmp_path / "rl", test_during_training=False, **flags)))
    assert json.loads((tmp_path / "rl" / "metrics.json").read_text())["steps"] == 10
