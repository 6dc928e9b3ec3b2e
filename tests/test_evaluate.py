import json
import shutil

import pytest
from helpers import evaluate_flags, refused, run_command
from processes import start_command
from transformers import AutoModelForCausalLM, AutoTokenizer

from minionerec.data.files import read_info
from minionerec.metrics import rank_of, ranking_metrics


@pytest.fixture(scope="module")
def checkpoint(sft_run) -> str:
    return str(sft_run("lora") / "final_checkpoint")


def evaluated(files, result, **more) -> tuple[list, dict, str]:
    done = run_command("evaluate.py", **evaluate_flags(files, result, **more))
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(result.with_suffix(".metrics.json").read_text())
    return json.loads(result.read_text()), metrics, done.stdout


RANKING = ("HR@1", "HR@10", "NDCG@10", "HR@20", "MRR")


def test_rankings_and_metrics_of_an_adapter(files, base, checkpoint, tmp_path):
    rows, metrics, printed = evaluated(files, tmp_path / "r.json", base_model=checkpoint, train_file=files["train"])
    sids = set(read_info(files["info"]))
    assert len(rows) == 10
    for row in rows:
        assert set(row) == {"input", "output", "predict"}
        assert row["output"] in sids and row["input"].startswith("A customer bought these bolts")
        assert len(row["predict"]) == len(set(row["predict"])) == 20 and set(row["predict"]) <= sids
    expected = ranking_metrics([rank_of(row["output"], row["predict"]) for row in rows], 20)
    assert {name: metrics[name] for name in expected} == expected
    assert "popularity" in printed and "HR@K" in printed

    # The same adapter on a base it is told, and on one whose recorded place is gone.
    again, _, _ = evaluated(files, tmp_path / "b.json", base_model=base, adapter=checkpoint)
    assert again == rows
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/base"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    lost = run_command("evaluate.py", **evaluate_flags(files, tmp_path / "l.json", base_model=moved))
    assert lost.returncode == 2
    assert "its base /nowhere/base was not found; give the folder of the base as --base_model" in lost.stderr


@pytest.mark.slow
def test_two_processes_give_the_same_rankings(files, checkpoint, tmp_path):
    rows, metrics, _ = evaluated(files, tmp_path / "one.json", base_model=checkpoint, batch_size=2)
    flags = evaluate_flags(files, tmp_path / "two.json", base_model=checkpoint, batch_size=2)
    started = start_command("evaluate.py", flags, ranks=2)
    assert started.wait() == [0, 0], started.errors[-3000:]
    assert json.loads((tmp_path / "two.json").read_text()) == rows
    two = json.loads((tmp_path / "two.metrics.json").read_text())
    assert {name: two[name] for name in RANKING} == {name: metrics[name] for name in RANKING}


def test_a_whole_checkpoint_without_a_record(files, base, tmp_path):
    # Its tokenizer knows no SID tokens: they take many tokens each, and still every beam is a SID.
    rows, _, _ = evaluated(files, tmp_path / "r.json", base_model=base, category="bolts", num_beams=100)
    assert all(sorted(row["predict"]) == sorted(read_info(files["info"])) for row in rows)


def test_a_base_of_the_same_shape_with_other_weights_is_refused(files, base, checkpoint, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(base)
    other.get_input_embeddings().weight.data[3] += 0.1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    flags = evaluate_flags(files, tmp_path / "r.json", base_model=tmp_path / "other", adapter=checkpoint)
    refused("evaluate.py", f"{checkpoint} does not fit the base {tmp_path}/other: these are not the weights", **flags)


def test_what_differs_from_the_training_is_named(files, checkpoint, tmp_path):
    wording = {"tasks": {"sid_history_to_sid": {"instruction": "Which of the {category} comes next?"}}}
    (tmp_path / "prompts.json").write_text(json.dumps(wording))
    _, _, printed = evaluated(files, tmp_path / "r.json", base_model=checkpoint, category="nuts")
    assert f"warning: --category nuts is ignored: {checkpoint} was trained with bolts" in printed
    rows, _, printed = evaluated(
        files, tmp_path / "r.json", base_model=checkpoint, category="bolts", prompt_file=tmp_path / "prompts.json"
    )
    assert "warning: the wording of --prompt_file differs" in printed and "tasks sid_history_to_sid" in printed
    assert rows[0]["input"].startswith("Which of the bolts comes next?")
