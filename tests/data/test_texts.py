import csv
import json
from pathlib import Path

import pytest
from helpers import COLUMNS, rl_flags, run_command, sft_flags, succeed

from minionerec.data.files import read_interactions
from minionerec.data.prompts import load_prompts
from minionerec.data.texts import ValidationRows, check_interactions
from minionerec.errors import Problems
from minionerec.flags.sft import SFTFlags
from sft import read_input


@pytest.fixture
def half_titled(tmp_path) -> str:
    """Every other row has no title."""
    with open(tmp_path / "valid.csv", "w", encoding="utf-8", newline="") as file:
        rows = [["u", ["x" * (i % 2)], "y" * (i % 2), "[]", "0", [f"<a_{i}>"], "<b>"] for i in range(40)]
        csv.writer(file).writerows([COLUMNS, *rows])
    return str(tmp_path / "valid.csv")


def test_validation_takes_a_sample_of_the_rows_that_it_can_use(half_titled):
    """Those that the seed says, in their order; of the rows with the texts of a task, so that some are left."""
    for tasks, usable in (("sid_history_to_sid", 40), ("title_history_to_title", 20)):
        prompts = load_prompts("x", tasks=tasks).for_validation()
        problems = Problems()
        checked = check_interactions(problems, "eval_file", half_titled, None, prompts)
        assert not problems and checked.num_usable == usable
        every = [row for row in read_interactions(half_titled, "eval_file") if usable == 40 or row.title]

        def sampled(sample: int, seed: int, prompts=prompts, usable=usable) -> ValidationRows:
            return ValidationRows(half_titled, None, prompts, usable, sample, seed)

        places = [[row.sid_history for row in every].index(row.sid_history) for row in sampled(12, 3)]
        assert len(places) == 12 and places == sorted(places)
        assert [*sampled(12, 3)] == [*sampled(12, 3)] != [*sampled(12, 4)]
        assert sampled(12, 3).notes == [f"{half_titled}: validating on 12 of {usable} rows (--eval_sample)"]
        for all_of_them in (-1, usable, 1000):
            rows = sampled(all_of_them, 3)
            assert len([*rows]) == usable and not rows.notes and not rows.choice


@pytest.mark.parametrize("sample", [0, -2])
def test_a_sample_is_a_number_of_rows_or_all(files, base, tmp_path, sample):
    result = run_command("sft.py", **sft_flags(files, base, tmp_path / "run", eval_sample=sample))
    assert result.returncode == 2 and f"--eval_sample {sample}: must be above 0, or -1 for all rows" in result.stderr


@pytest.mark.parametrize("command", ["sft.py", "rl.py"])
def test_both_trainings_sample_their_validation_and_say_so(files, base, checkpoint_of, tmp_path, command):
    """A full run of SFT evaluates only on the sample; RL makes prompts of it."""
    if command == "sft.py":
        flags = sft_flags(files, base, tmp_path / "run", eval_sample=3, num_epochs=1, tasks="sid_history_to_sid")
        said = "validation examples: 3"
    else:
        flags = rl_flags(
            files, checkpoint_of("qwen2", num_key_value_heads=2), tmp_path / "run", eval_sample=3, num_train_epochs=1
        )
        said = "3 to validate"
    result = succeed(command, **flags)
    assert f"{files['valid']}: validating on 3 of 10 rows (--eval_sample)" in result.stdout and said in result.stdout


def test_training_takes_a_sample_of_the_rows_and_items_that_it_can_use(files, base, tmp_path):
    """One of a few that have a title, and not one of the many that have none."""
    with open(files["train"], encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    place = head.index("item_title")
    for row in rows[1:]:
        row[place] = ""
    with open(tmp_path / "train.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    items = json.loads(Path(files["item"]).read_text(encoding="utf-8"))
    for item in list(items)[1:]:
        del items[item]["title"]
    (tmp_path / "item.json").write_text(json.dumps(items), encoding="utf-8")
    flags = sft_flags(files, base, tmp_path / "run", sample=1, tasks="sid_history_to_title,title_to_sid")
    flags |= {"train_file": str(tmp_path / "train.csv"), "item_meta_path": str(tmp_path / "item.json")}
    inputs = read_input(SFTFlags(**{**flags, "output_dir": str(tmp_path / "run")}))
    (row,), (item,) = inputs.train_rows("interaction"), inputs.train_rows("item")
    assert row.title == rows[0][place] and item == next(iter(inputs.catalogue.items.values()))
