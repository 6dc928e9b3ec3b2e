"""More than one process: the same curve and metrics as one (RL: test_rl.py, evaluation: test_evaluate.py), the same
adapter on every rank, weights that are sharded, and the engines' configurations."""

import json
import re
import sys
from functools import cache
from pathlib import Path

import processes
import pytest
import torch
from helpers import cut_short, flag_words, newest, rl_flags, sft_flags, succeed
from processes import ENGINES, ENGINES_AND_STARTS, assert_same_run, two_processes
from safetensors.torch import load_file

import lora_utils
from minionerec.flags import AdapterFlags
from minionerec.model import loading

METHODS = {
    "full": {},
    "lora": {"use_lora": True, "lora_dropout": 0.0},
    "qlora": {"use_qlora": True, "lora_dropout": 0.0},
    "grouped lora": {"use_lora": True, "lora_dropout": 0.0, "group_by_length": True},
    "freeze_LLM": {"freeze_LLM": True},
}
SMALL_STEPS = {"micro_batch_size": 4, "learning_rate": 1e-3}
LAUNCHED = [("torchrun", "lora"), ("zero2", "qlora")]  # by the launchers themselves


@pytest.fixture(scope="module")
def trained(files, base, tmp_path_factory):
    """`trained(method)`: the folder of an SFT run in one process, made once."""

    @cache
    def folder(method: str) -> Path:
        output = tmp_path_factory.mktemp("one") / method
        succeed("sft.py", **sft_flags(files, base, output, **METHODS[method], **SMALL_STEPS))
        return output

    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "method"),
    [
        *(("torchrun", m) for m in ("lora", "qlora")),
        *(pytest.param(*e.values, "qlora", marks=e.marks) for e in ENGINES),
    ],
)
def test_two_processes_of_an_engine_train_as_one_does(files, base, trained, tmp_path, monkeypatch, engine, method):
    monkeypatch.setenv("PYTHON_EXEC", sys.executable)  # processes that import everything anew
    flags = sft_flags(files, base, tmp_path / "two", **METHODS[method], **SMALL_STEPS)
    two_processes(engine, tmp_path, "sft.py", flags, launched=(engine, method) in LAUNCHED)
    # Engines that shard multiply 16-bit matrices in another order, or round after the bias once more.
    sharded = engine in ("zero3", "fsdp")
    assert_same_run(trained(method), tmp_path / "two", 3e-3 if method == "qlora" and sharded else 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "method"), [(26, "grouped lora"), (3, "full")])
def test_rows_that_no_trees_share_out_train_once_on_three_processes(files, base, tmp_path, rows, method):
    """The last step, or the only one, has too few rows for all processes: some have micro-batches without any."""
    flags = {"batch_size": 12, "micro_batch_size": 2, "num_epochs": 3 if rows > 12 else 10, "learning_rate": 1e-3}
    flags |= {"pack_rows": 0, "tasks": "sid_history_to_sid", "sample": rows, "eval_step": 0.3, **METHODS[method]}
    succeed("sft.py", **sft_flags(files, base, tmp_path / "one", **flags))
    three = processes.start_command("sft.py", sft_flags(files, base, tmp_path / "three", **flags), ranks=3)
    assert three.wait() == [0, 0, 0], three.errors[-3000:]
    assert_same_run(tmp_path / "one", tmp_path / "three", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_saves_a_tied_matrix_once(files, base, trained, tmp_path, engine):
    two_processes(engine, tmp_path, "sft.py", sft_flags(files, base, tmp_path / "two", **SMALL_STEPS))
    assert_same_run(trained("full"), tmp_path / "two", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", *ENGINES])
def test_an_engine_goes_on_from_its_checkpoint(files, base, trained, tmp_path, engine):
    flags = sft_flags(files, base, tmp_path / "two", **METHODS["grouped lora"], **SMALL_STEPS)
    two_processes(engine, tmp_path, "sft.py", flags)
    as_older_release(cut_short(tmp_path / "two"))
    two_processes(engine, tmp_path, "sft.py", {**flags, "resume_from_checkpoint": True})
    assert_same_run(trained("grouped lora"), tmp_path / "two", 1e-5)
    assert_same_checkpoint(trained("grouped lora"), tmp_path / "two")


def as_older_release(checkpoint: Path) -> None:
    """0.1.0 did not record the engine, and had DeepSpeed compute in bfloat16, which its files are named after."""
    record = checkpoint / "minionerec.json"
    run = json.loads(record.read_text())
    kept = {name: run[name] for name in run if name not in ("engine", "processes")}
    record.write_text(json.dumps({**kept, "version": "0.1.0"}))
    for file in checkpoint.glob("global_step*/*optim_states.pt"):
        file.rename(file.with_name(f"bf16_{file.name}"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_does_the_same_rl(files, trained, tmp_path, engine):
    start = trained("lora") / "final_checkpoint"
    flags = {"use_lora": True, "add_gt": True}
    succeed("rl.py", **rl_flags(files, start, tmp_path / "one", **flags))
    flags = rl_flags(files, start, tmp_path / "two", **flags)
    two_processes(engine, tmp_path, "rl.py", {**flags, "train_batch_size": flags["train_batch_size"] // 2})
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-4)


SPARSE = {"mask_all_zero": True, "reward_type": "rule", "num_generations": 2, "learning_rate": 5e-3}
SPARSE |= {"sync_ref_model": True, "test_during_training": False}


@pytest.fixture(scope="module")
def sparse(files, trained, tmp_path_factory):
    """`sparse(start)`: the flags of an RL run in which few groups count, and the folder of that run in one process."""

    def flags_of(start: str, output: Path, batch: int) -> dict:
        more = {"use_lora": start == "lora", "train_batch_size": batch, **SPARSE}
        return rl_flags(files, trained(start) / "final_checkpoint", output, **more)

    @cache
    def run(start: str):
        folder = tmp_path_factory.mktemp("sparse")
        one = processes.start("watched", folder, "rl.py", *flag_words(flags_of(start, folder / "one", 4)))
        assert one.wait() == [0], one.errors[-3000:]
        return folder / "one", lambda output: flags_of(start, output, 2)

    return run


def assert_same_checkpoint(one: Path, two: Path) -> None:
    """The newest checkpoints hold the same weights and, of RL, the same reference."""
    folders = [newest(run) for run in (one, two)]
    names = [path.name for path in folders[0].glob("*.safetensors")]
    assert folders[0].name == folders[1].name and names
    for name in names:
        tensors = [load_file(folder / name) for folder in folders]
        torch.testing.assert_close(tensors[1], tensors[0], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "start"), ENGINES_AND_STARTS)
def test_a_process_without_a_group_that_counts_keeps_pace(sparse, tmp_path, engine, start):
    one, flags = sparse(start)
    two_processes(engine, tmp_path, "rl.py", flags(tmp_path / "two"))
    counted = [json.loads((tmp_path / f"rank{rank}.counted").read_text()) for rank in (0, 1)]
    steps = {tuple(map(bool, step)) for step in zip(*counted, strict=True)}
    assert (False, False) in steps and steps & {(False, True), (True, False)}
    assert_same_run(one, tmp_path / "two", 5e-5)
    assert_same_checkpoint(one, tmp_path / "two")
    assert any(path.name == "reference.safetensors" for path in one.glob("checkpoint-*/*"))
    # Its checkpoint holds what resuming needs: the moving reference too.
    cut_short(tmp_path / "two")
    two_processes(engine, tmp_path, "rl.py", {**flags(tmp_path / "two"), "resume_from_checkpoint": True})
    assert_same_run(one, tmp_path / "two", 5e-5)
    assert_same_checkpoint(one, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", *ENGINES])
def test_sid_rows_trained_alone_are_merged_from_their_shards(files, base, trained, tmp_path, engine):
    flags = sft_flags(files, base, tmp_path / "two", **METHODS["freeze_LLM"], **SMALL_STEPS)
    two_processes(engine, tmp_path, "sft.py", flags)
    one, two = trained("freeze_LLM"), tmp_path / "two"
    assert_same_run(one, two, 1e-5)
    assert_same_checkpoint(one, two)
    for name in ("config.json", "generation_config.json"):
        assert (one / "final_checkpoint" / name).read_text() == (two / "final_checkpoint" / name).read_text()
    cut_short(two)
    two_processes(engine, tmp_path, "sft.py", {**flags, "resume_from_checkpoint": True})
    assert_same_run(one, two, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("loss_is_nan", r"the loss is nan at step 5; the last good checkpoint is \S+checkpoint-4\."),
        (
            "disk_is_full",
            r"the checkpoint of step 8 cannot be written: \[Errno 28\] No space left on device; the last good "
            r"checkpoint is \S+checkpoint-4\.",
        ),
    ],
)
@pytest.mark.parametrize("engine", ["torchrun", "fsdp"])
def test_what_ends_one_process_ends_all(files, base, tmp_path, engine, mode, said):
    flags = sft_flags(files, base, tmp_path / "run", **METHODS["lora"], **SMALL_STEPS)
    launched = engine == "torchrun" and mode == "loss_is_nan"
    errors = two_processes(engine, tmp_path, "sft.py", flags, mode, code=1, launched=launched)
    assert [(tmp_path / f"rank{rank}.exit").read_text() for rank in (0, 1)] == ["1", "1"]
    lines = [line for line in errors.splitlines() if line.startswith("sft.py: error: ")]
    assert len(lines) == 1 and re.match(f"sft.py: error: {said}", lines[0])
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.slow
def test_two_processes_try_and_rank_alike():
    """Under FSDP every forward pass is a collective: all must try the same ways and run as many passes."""
    two = processes.start("probe", ranks=2)
    assert two.wait() == [0, 0], two.errors[-3000:]


def test_four_bits_are_stored_as_a_type_that_the_engine_can_share_out(base, monkeypatch):
    def storage() -> torch.dtype:
        return lora_utils.quantization_config(AdapterFlags(use_qlora=True)).bnb_4bit_quant_storage

    assert storage() == torch.uint8
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        plain = loading.load_base(base, lora_utils.quantization_config(AdapterFlags(use_qlora=True)))(
            input_ids=ids
        ).logits
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert storage() == torch.uint8
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert storage() == torch.bfloat16
    with torch.no_grad():
        stored = loading.load_base(base, lora_utils.quantization_config(AdapterFlags(use_qlora=True)))(
            input_ids=ids
        ).logits
    assert torch.equal(stored, plain)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert storage() == torch.bfloat16
