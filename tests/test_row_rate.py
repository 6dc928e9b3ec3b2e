"""A learning rate of their own for the rows of SID tokens."""

import shutil

import pytest
import torch
from architectures import CHANGES, build
from helpers import newest, run_command, sft_flags, tensors_of
from models import make_model
from processes import assert_same_run, two_processes

import lora_utils
import sft
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.training.row_rate import SidRowRate, sid_weights

IDS = [3, 7, 8]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("times", [8.0, 0.25])
def test_it_is_the_rate_that_the_rows_would_have_alone(kind, times):
    torch.manual_seed(0)
    start = torch.randn(12, 5)
    shared, fast = (torch.nn.Parameter(start.clone()) for _ in range(2))
    slow = torch.nn.Parameter(start.clone())
    steps = [
        kind([weight], lr=0.01 * rate, weight_decay=0.1) for weight, rate in ((shared, 1), (fast, times), (slow, 1))
    ]
    callback = SidRowRate([(shared, torch.tensor(IDS))], times)
    for _ in range(6):
        gradient = torch.randn(12, 5)
        for weight in (shared, fast, slow):
            weight.grad = gradient.clone()
        callback.on_pre_optimizer_step()
        for optimizer in steps:
            optimizer.step()
        callback.on_optimizer_step()
    others = [i for i in range(12) if i not in IDS]
    torch.testing.assert_close(shared[IDS], fast[IDS])
    assert torch.equal(shared[others], slow[others]) and not torch.allclose(shared[IDS], slow[IDS])


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_has_its_rows_in_both_matrices(tied):
    model = make_model("qwen2", tie_word_embeddings=tied)
    found = sid_weights(model, IDS)
    assert [ids.tolist() for _, ids in found] == [IDS] * (1 if tied else 2)
    assert found[0][0] is model.get_input_embeddings().weight and found[-1][0] is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_has_its_rows_apart(name):
    model = build(name)
    whole = sid_weights(model, IDS)
    model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, AdapterFlags()))
    found = [weight for weight, _ in sid_weights(model, IDS)]
    trained = [p for full, p in model.named_parameters() if p.requires_grad and "trainable_tokens_delta" in full]
    assert len(found) == len(whole) == len(trained) and {len(weight) for weight in found} == {len(IDS)}
    assert {id(weight) for weight in found} == {id(weight) for weight in trained}


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, {"use_lora": True, "lora_dropout": 0.0}], ids=str)
def test_two_processes_that_resume_train_as_one_does(files, base, tmp_path, method):
    flags = {"micro_batch_size": 4, "learning_rate": 1e-3, "sid_learning_rate": 1e-2, **method}
    one = run_command("sft.py", **sft_flags(files, base, tmp_path / "one", **flags))
    assert one.returncode == 0, one.stderr[-3000:]
    flags = sft_flags(files, base, tmp_path / "two", **flags)
    two_processes("torchrun", tmp_path, "sft.py", flags)
    shutil.rmtree(newest(tmp_path / "two"))
    shutil.rmtree(tmp_path / "two" / "final_checkpoint")
    two_processes("torchrun", tmp_path, "sft.py", {**flags, "resume_from_checkpoint": True})
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.parametrize("method", [{}, {"use_lora": True}, {"use_qlora": True}, {"freeze_LLM": True}], ids=str)
def test_a_run_moves_the_rows_and_little_else(files, base, tmp_path, method):
    """With a rate of almost 0 for the other weights, whatever moves is a SID row."""
    saved = {}
    for rate, rows in ((1e-9, 0.0), (1e-9, 1e-2)):
        flags = sft_flags(files, base, tmp_path / str(rows), learning_rate=rate, sid_learning_rate=rows, **method)
        sft.train(**flags)
        saved[rows] = tensors_of(newest(tmp_path / str(rows)))
    moved = {name: (saved[1e-2][name] - slow).abs().amax(dim=-1) for name, slow in saved[0.0].items()}
    assert {name for name, by in moved.items() if by.max() > 1e-3} == {name for name in moved if "token" in name}


def test_engines_refuse_it(files, base, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"--sid_learning_rate 0\.01: not with FSDP"):
        sft.train(**sft_flags(files, base, tmp_path, sid_learning_rate=0.01))
