import json
from pathlib import Path

import pytest
from helpers import COLUMNS, refused, run_command, sft_flags
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lora_utils

SFT = [
    ({"use_lroa": True}, "unknown flag --use_lroa; did you mean --use_lora?"),
    ({"lora_r": "many"}, "--lora_r 'many' is not valid; expected a whole number"),
    ({"lora_r": 8, "use_dora": True}, "--lora_r has no effect without --use_lora True or --use_qlora True"),
    ({"use_lora": True, "use_qlora": True}, "--use_lora and --use_qlora exclude each other"),
    ({"use_lora": True, "lora_r": 0}, "--lora_r 0"),
    ({"use_lora": True, "lora_dropout": 1}, "--lora_dropout 1.0"),
    ({"use_lora": True, "init_lora_weights": "pissa"}, "--init_lora_weights 'pissa'"),
    ({"use_lora": True, "lora_target_modules": "q_proj,nope"}, "nope matches no linear layer"),
    ({"load_in_8bit": True}, "--load_in_8bit"),
    ({"use_lora": True, "freeze_LLM": True}, "--freeze_LLM"),
    ({"use_lora": True, "train_from_scratch": True}, "train without an adapter"),
    ({"batch_size": 10, "micro_batch_size": 4}, "--batch_size 10 is not a multiple of --micro_batch_size 4"),
    ({"learning_rate": 0}, "--learning_rate 0.0: must be above 0"),
    ({"cutoff_len": 5}, "--cutoff_len 5"),
    ({"cutoff_len": 40}, "--cutoff_len 40: the instruction of task sid_history_to_sid has"),
    ({"category": " "}, "--category is missing"),
    ({"tasks": "title_to_sid"}, "needs a task on interactions to validate on"),
    ({"sample": 0}, "--sample 0"),
    ({"base_model": ""}, "--base_model is missing"),
    ({"base_model": "./nowhere"}, "--base_model ./nowhere: no such folder"),
    ({"train_file": "nowhere.csv"}, "--train_file nowhere.csv: no such file"),
    ({"item_meta_path": "nowhere.json"}, "--item_meta_path nowhere.json: no such file"),
    ({"prompt_file": "nowhere.json"}, "--prompt_file nowhere.json"),
    ({"tasks": "nope"}, "--tasks 'nope'"),
    ({"report_to": "carrier_pigeon"}, "--report_to 'carrier_pigeon'"),
    ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint 'nowhere': no such folder"),
]


@pytest.mark.parametrize(("flags", "message"), SFT)
def test_sft_refuses(files, base, tmp_path, flags, message):
    refused("sft.py", message, **sft_flags(files, base, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "column history_item_sid, item_sid"),
        (",".join(COLUMNS) + "\n", "has no rows"),
        (",".join(COLUMNS) + "\nu,['t'],t,[1],1,<a_0><b_0><c_0>,<a_0><b_0><c_0>\n", "line 2: history_item_sid must be"),
        (",".join(COLUMNS) + "\nu,['t'],t,[1],1,['<z>'],<a_0><b_0><c_0>\n", "line 2: SID '<z>' is not in the index"),
    ],
)
def test_sft_refuses_files(files, base, tmp_path, content, message):
    (tmp_path / "bad.csv").write_text(content)
    refused("sft.py", message, **sft_flags(files, base, tmp_path / "run", train_file=tmp_path / "bad.csv"))
    assert not (tmp_path / "run").exists()


def test_sft_does_not_overwrite_a_run(files, base, tmp_path):
    (tmp_path / "final_checkpoint").mkdir()
    refused("sft.py", "holds another run", **sft_flags(files, base, tmp_path))


def test_an_adapter_is_no_base(files, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("sft.py", "is an adapter, not a model", **sft_flags(files, tmp_path, tmp_path / "run"))


def test_all_problems_come_together(files, tmp_path):
    flags = sft_flags(files, "", tmp_path / "run", use_lora=True, lora_r=0, batch_size=10, micro_batch_size=4)
    flags |= {"eval_file": "nowhere.csv"}
    result = run_command("sft.py", **flags)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 4


EVALUATE = [
    ({"num_beam": 5}, "unknown flag --num_beam; did you mean --num_beams?"),
    ({"num_beams": 0}, "--num_beams 0: must be above 0"),
    ({"base_model": "./nowhere"}, "--base_model ./nowhere: no such folder"),
    ({"adapter": "nowhere"}, "--adapter nowhere: no adapter_config.json there"),
    ({"info_file": "nowhere.txt"}, "--info_file nowhere.txt: no such file"),
    ({"test_data_path": ""}, "--test_data_path is missing"),
    ({"result_json_data": ""}, "--result_json_data"),
    ({"max_new_tokens": 1}, "--max_new_tokens 1"),
    ({"K": -1}, "--K -1"),
    ({"K": 60}, "--K 60: must be between 0 and --num_beams 50"),
    ({"category": ""}, "--category is missing"),
    ({"result_json_data": __file__ + "/x/r.json"}, "cannot be written to"),
    ({"prompt_file": "nowhere.json"}, "--prompt_file nowhere.json"),
    ({"train_file": "nowhere.csv"}, "--train_file nowhere.csv: no such file"),
    ({"K": "ten"}, "--K 'ten' is not valid; expected a whole number"),
]


@pytest.mark.parametrize(("flags", "message"), EVALUATE)
def test_evaluate_refuses(files, base, tmp_path, flags, message):
    good = {
        "base_model": base,
        "info_file": files["info"],
        "test_data_path": files["test"],
        "result_json_data": tmp_path / "r.json",
        "category": "bolts",
    }
    refused("evaluate.py", message, **{**good, **flags})
    assert not (tmp_path / "r.json").exists()


def test_a_test_row_outside_the_info_file_is_named(files, base, tmp_path):
    lines = Path(files["info"]).read_text(encoding="utf-8").splitlines()
    (tmp_path / "info.json").write_text("\n".join(lines[:5]) + "\n", encoding="utf-8")
    refused(
        "evaluate.py",
        "is not in the index or info file",
        base_model=base,
        info_file=tmp_path / "info.json",
        test_data_path=files["test"],
        result_json_data=tmp_path / "r.json",
    )


def test_index_that_is_no_json(files, base, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps([1]))
    refused(
        "sft.py",
        "expected a non-empty object",
        **sft_flags(files, base, tmp_path / "run", sid_index_path=tmp_path / "index.json"),
    )


def test_evaluate_reports_all_problems_together(tmp_path):
    result = run_command("evaluate.py", base_model="", info_file="nowhere.txt", test_data_path="", num_beams=0)
    assert result.returncode == 2
    # base_model, num_beams, result_json_data, category, info_file, test_data_path
    assert len(result.stderr.strip().splitlines()) == 6


def test_evaluate_refuses_an_adapter_of_another_base(files, base, tmp_path):
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    deeper = AutoModelForCausalLM.from_config(config)
    adapter = lora_utils.add_lora(deeper, lora_utils.lora_config(deeper, [5]))
    adapter.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    refused(
        "evaluate.py",
        "does not fit the base",
        base_model=base,
        adapter=tmp_path / "adapter",
        category="bolts",
        info_file=files["info"],
        test_data_path=files["test"],
        result_json_data=tmp_path / "r.json",
        max_new_tokens=256,
    )
    assert not (tmp_path / "r.json").exists()


def test_the_batch_must_divide_over_all_processes(files, base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = "--batch_size 16 is not a multiple of --micro_batch_size 8 x 3 processes; try --batch_size 24"
    refused("sft.py", message, **sft_flags(files, base, tmp_path / "run"))
