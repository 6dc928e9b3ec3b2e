"""A learning rate of their own for the rows of SID tokens."""

import copy

import pytest
import torch
from architectures import CHANGES, build
from helpers import cut_short, newest, sft_flags, strings, tensors_of
from models import IDS, make_model
from processes import ENGINES, assert_same_run, two_processes

import lora_utils
import sft
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model.sid_rows import merge_own_rows
from minionerec.training.sid_learning_rate import give_rate, sid_weights


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_the_rows_get_groups_of_their_own(kind):
    rows, others = ([torch.nn.Parameter(torch.randn(2, 3)) for _ in range(2)] for _ in range(2))
    groups = [{"params": [others[0], rows[0]], "weight_decay": 0.1}, {"params": [rows[1]]}, {"params": [others[1]]}]
    optimizer = kind(groups, lr=0.01, weight_decay=0.0)
    give_rate(optimizer, rows, 0.5)
    found = [([*group["params"]], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [([others[0]], 0.01, 0.1), ([others[1]], 0.01, 0.0), ([rows[0]], 0.5, 0.1), ([rows[1]], 0.5, 0.0)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_rows_of_their_own_train_as_rows_of_the_matrix(name, tied):
    """The twin: a whole matrix, whose rows move `times` as far at each step."""
    plain, times = make_model(name, scale=2.0, tie_word_embeddings=tied), 8.0
    own = copy.deepcopy(plain)
    rows = sid_weights(own, IDS)
    assert [tuple(row.shape) for row in rows] == [(3, 64)] * (1 if tied else 2)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (plain, own)]
    give_rate(optimizers[1], rows, times * 1e-2)
    ids = torch.tensor([[5, 90, 91, 6, 92], [90, 1, 2, 3, 91]])
    for _ in range(3):
        losses = [model(input_ids=ids, labels=ids).loss for model in (plain, own)]
        torch.testing.assert_close(*losses)
        ends = {plain.get_input_embeddings().weight, plain.get_output_embeddings().weight}
        before = [(weight, weight.detach()[IDS]) for weight in ends]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for weight, old in before:
            weight.data[IDS] = torch.lerp(old, weight.data[IDS], times)
    state = dict(own.state_dict())
    merge_own_rows(own, state)
    assert state.keys() == plain.state_dict().keys()
    torch.testing.assert_close(state, dict(plain.state_dict()))
    again = copy.deepcopy(own)
    again.load_state_dict(state, strict=False)  # a checkpoint has the rows in their matrices only
    assert all(torch.equal(*pair) for pair in zip(sid_weights(again, IDS), rows, strict=True))


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_has_its_rows_apart(name):
    model = build(name)
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, AdapterFlags()))
    found = sid_weights(model, IDS)
    trained = [p for full, p in model.named_parameters() if p.requires_grad and "trainable_tokens_delta" in full]
    assert len(found) == len(ends) == len(trained) and {len(weight) for weight in found} == {len(IDS)}
    assert {id(weight) for weight in found} == {id(weight) for weight in trained}


RATES = {"micro_batch_size": 4, "learning_rate": 1e-3, "sid_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def one(files, base, tmp_path_factory):
    """A run in one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    sft.train(**strings(sft_flags(files, base, run, **RATES)))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", *ENGINES])
def test_an_engine_that_resumes_trains_as_one_process_does(files, base, one, tmp_path, engine):
    flags = sft_flags(files, base, tmp_path / "two", **RATES)
    two_processes(engine, tmp_path, "sft.py", flags)
    cut_short(tmp_path / "two")
    two_processes(engine, tmp_path, "sft.py", {**flags, "resume_from_checkpoint": True})
    assert_same_run(one, tmp_path / "two", 1e-5)


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


def test_a_run_resumes_only_at_the_rate_it_began_with(files, base, tmp_path):
    flags = sft_flags(files, base, tmp_path / "run", use_lora=True, sid_learning_rate=0.01, sample=8, eval_step=0.5)
    sft.train(**strings(flags))
    message = r"--sid_learning_rate is 0\.01 there, 0\.02 here"
    with pytest.raises(InputError, match=message):
        sft.train(**strings({**flags, "sid_learning_rate": 0.02, "resume_from_checkpoint": "True"}))
