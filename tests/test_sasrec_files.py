"""What the folder of a SASRec model says, and which folders are refused."""

import json
from pathlib import Path

import pytest
from helpers import refused, rl_flags, run_command, sft_flags

from minionerec import InputError, sasrec
from minionerec.data.files import read_info, read_info_items
from minionerec.sasrec_files import check_within, fingerprint, known
from minionerec.sasrec_files import files as files_of


@pytest.fixture
def folder(tmp_path) -> str:
    sasrec.save(sasrec.SASRec(["<a_0>", "<a_1>"], hidden_size=4), str(tmp_path / "sasrec"), "digest")
    return str(tmp_path / "sasrec")


def test_a_folder_says_what_its_model_knows(folder):
    assert known(folder, "blend") == (["<a_0>", "<a_1>"], "digest", "")
    check_within(folder, "cf_path", [("0", "<a_0>"), ("1", "<a_1>"), ("2", "<a_2>")], "the index")


def test_sids_that_stand_for_other_items_are_a_different_catalogue(folder):
    pairs = [("0", "<a_0>"), ("1", "<a_1>")]
    sasrec.save(sasrec.SASRec(["<a_1>", "<a_0>"], hidden_size=4), folder, fingerprint(pairs))
    check_within(folder, "cf_path", pairs[::-1], "the index")
    line = (
        f"--cf_path {folder}: was trained on a different catalogue: the SIDs of the index are the same, but stand for"
    )
    for swapped in ([("0", "<a_1>"), ("1", "<a_0>")], [*pairs, ("2", "<a_0>")]):
        with pytest.raises(InputError, match=line):
            check_within(folder, "cf_path", swapped, "the index")
    check_within(folder, "cf_path", [*pairs, ("2", "<a_2>")], "the index")  # an item was added


@pytest.mark.parametrize("wrong", ["no weights", "no folder", "SIDs that are numbers", "a list", "another catalogue"])
def test_other_folders_are_refused_in_one_line(folder, wrong):
    record, weights = files_of(folder)
    lines = {
        "SIDs that are numbers": (f"--cf_path {folder}: {record} does not list SIDs; train it again", {"sids": [1]}),
        "a list": (f"--cf_path {folder}: {record} does not list SIDs; train it again", []),
        "another catalogue": (
            f"--cf_path {folder}: was trained on a different catalogue: 1 of its SIDs are not in the index, such as "
            "'<b_7>'; train it on this one",
            {"sids": ["<a_0>", "<b_7>"]},
        ),
    }
    line = f"--cf_path {folder}: no SASRec model is there; train one with scripts/train_sasrec.py"
    if wrong in lines:
        line, data = lines[wrong]
        Path(record).write_text(json.dumps(data))
    elif wrong == "no weights":
        Path(weights).unlink()
    else:
        folder = f"{folder}2"
        line = line.replace(": no", "2: no")
    with pytest.raises(InputError) as error:
        check_within(folder, "cf_path", [("0", "<a_0>"), ("1", "<a_1>")], "the index")
    assert str(error.value) == line


def test_sft_refuses_a_model_of_another_catalogue_before_it_writes(files, base, tmp_path):
    sasrec.save(sasrec.SASRec(["<z_0>"], hidden_size=4), str(tmp_path / "sasrec"))
    line = f"--cf_path {tmp_path / 'sasrec'}: was trained on a different catalogue: 1 of its SIDs are not in"
    refused("sft.py", line, **sft_flags(files, base, tmp_path / "run", cf_path=tmp_path / "sasrec"))
    assert not (tmp_path / "run").exists()


def test_commands_refuse_a_model_whose_sids_stand_for_other_items(files, base, checkpoint, tmp_path):
    items = read_info_items(files["info"])
    moved = zip(items, [*items[1:], items[0]], strict=True)
    sasrec.save(
        sasrec.SASRec([item.sid for item in items], hidden_size=4),
        str(tmp_path / "sasrec"),
        fingerprint((item.id, other.sid) for item, other in moved),
    )
    line = f"--cf_path {tmp_path / 'sasrec'}: was trained on a different catalogue: the SIDs of"
    refused("sft.py", line, **sft_flags(files, base, tmp_path / "run", cf_path=tmp_path / "sasrec"))
    flags = rl_flags(files, checkpoint, tmp_path / "run", reward_type="sasrec", cf_path=tmp_path / "sasrec")
    refused("rl.py", line, **flags)
    refused("rl.py", "--cf_path is missing", **{**flags, "cf_path": ""})


def test_sft_refuses_damaged_weights_before_it_loads_the_base(files, base, tmp_path):
    sasrec.save(sasrec.SASRec(read_info(files["info"]), hidden_size=4), str(tmp_path / "sasrec"))
    (tmp_path / "sasrec" / "sasrec.safetensors").write_bytes(b"cut")
    flags = sft_flags(files, base, tmp_path / "run", cf_path=tmp_path / "sasrec")
    done = run_command("sft.py", **flags)
    assert done.returncode == 2 and "trainable" not in done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert f"--cf_path {tmp_path / 'sasrec'}: no SASRec model can be loaded" in line
