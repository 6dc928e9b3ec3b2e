import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import COLUMNS, evaluate_flags, refused, rl_flags, run_command, sft_flags, strings
from transformers import AutoTokenizer

import rl
from minionerec import RLFlags, SFTFlags
from minionerec.data.encoding import Encoder
from minionerec.data.examples import prompt_dataset
from minionerec.errors import InputError

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
    ({"base_model": __file__}, f"--base_model {__file__}: is a file, not a folder"),
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
    ({"result_json_data": __file__ + "/x/r.json"}, "is a file, not a folder"),
    ({"result_json_data": "new/"}, "--result_json_data 'new/': give the path of a file for the rankings"),
    ({"result_json_data": "/dev/null"}, "--result_json_data /dev/null: is a device or a pipe, not a file"),
    ({"length_penalty": 600}, "--length_penalty 600.0: must be from -10 to 10"),
    ({"prompt_file": "nowhere.json"}, "--prompt_file nowhere.json"),
    ({"train_file": "nowhere.csv"}, "--train_file nowhere.csv: no such file"),
    ({"K": "ten"}, "--K 'ten' is not valid; expected a whole number"),
]


@pytest.mark.parametrize(("flags", "message"), EVALUATE)
def test_evaluate_refuses(files, base, tmp_path, flags, message):
    good = {"base_model": base, "category": "bolts", "num_beams": 50}
    refused("evaluate.py", message, **{**evaluate_flags(files, tmp_path / "r.json", **good), **flags})
    assert not (tmp_path / "r.json").exists()


def test_a_wrong_path_is_the_only_problem(files, tmp_path):
    """Nobody is asked for the category of a checkpoint that is not there."""
    for script, name in (("evaluate.py", "base_model"), ("recommend.py", "model")):
        flags = {name: tmp_path, "info_file": files["info"]}
        flags |= {"history": "1"} if name == "model" else {"test_data_path": files["test"]}
        flags |= {} if name == "model" else {"result_json_data": tmp_path / "r.json"}
        done = run_command(script, **flags)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"--{name} {tmp_path}" in done.stderr


def test_validating_on_the_training_file_is_warned_of(files):
    flags = SFTFlags(train_file=files["train"], eval_file=files["train"])
    assert flags.notes[-1].startswith(f"warning: --eval_file {files['train']} is the training file")
    assert not SFTFlags(train_file=files["train"], eval_file=files["valid"]).notes
    chooses = RLFlags(train_file=files["train"], eval_file=files["train"])
    assert chooses.notes == flags.notes and not replace(chooses, test_during_training=False).notes


def test_an_info_file_of_another_catalogue_is_refused(files, base, tmp_path):
    (tmp_path / "info.txt").write_text("<z_1>\tBolt\t1\n")
    flags = {"base_model": base, "category": "bolts", "info_file": tmp_path / "info.txt"}
    message = f"has the target of no row of --test_data_path {files['test']}, such as '<a_"
    refused("evaluate.py", message, **evaluate_flags(files, tmp_path / "r.json", **flags))


def test_index_that_is_no_json(files, base, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps([1]))
    refused(
        "sft.py",
        "expected a non-empty object",
        **sft_flags(files, base, tmp_path / "run", sid_index_path=tmp_path / "index.json"),
    )


def test_evaluate_reports_all_problems_together(base):
    for model, wrong in (("", "--base_model is missing"), (base, "--category is missing")):
        result = run_command("evaluate.py", base_model=model, info_file="nowhere.txt", test_data_path="", num_beams=0)
        assert result.returncode == 2 and wrong in result.stderr
        # that, num_beams, result_json_data, info_file, test_data_path
        assert len(result.stderr.strip().splitlines()) == 5


def test_the_batch_must_divide_over_all_processes(files, base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = "--batch_size 16 is not a multiple of --micro_batch_size 8 x 3 processes; try --batch_size 24"
    refused("sft.py", message, **sft_flags(files, base, tmp_path / "run"))


RECOMMEND = [
    ({"histroy": "1"}, "unknown flag --histroy; did you mean --history?"),
    ({"model": ""}, "--model is missing"),
    ({"model": "./nowhere"}, "--model ./nowhere: no such folder"),
    ({"adapter": "nowhere"}, "--adapter nowhere: no adapter_config.json there"),
    ({"category": ""}, "--category is missing"),
    ({"prompt_file": "nowhere.json"}, "--prompt_file nowhere.json"),
    ({"info_file": ""}, "--info_file is missing"),
    ({"info_file": "nowhere.txt"}, "--info_file nowhere.txt: no such file"),
    ({"history": ""}, "--history is missing; give one, a file of --histories, or --serve 8000"),
    ({"history": "12,x"}, "\"history\": 'x' is no item id, SID or title of the info file"),
    ({"history": "[12"}, "--history '[12': is not a JSON list"),
    ({"history": "[]"}, '"history" is missing or empty'),
    ({"history": "[true]"}, '"history" must be a list of item ids, SIDs or titles, found True in it'),
    ({"histories": "nowhere.jsonl"}, "--history and --histories exclude each other"),
    ({"history": "", "histories": "nowhere.jsonl", "output": "o"}, "--histories nowhere.jsonl: no such file"),
    ({"history": "", "histories": "nowhere.jsonl"}, "--output ''"),
    ({"output": "o.jsonl"}, "--output has no effect without --histories"),
    ({"history": "", "histories": "x", "output": __file__ + "/x/o.jsonl"}, "is a file, not a folder"),
    ({"K": 0}, "--K 0: must be above 0"),
    ({"K": 51}, "--K 51: must be at most --num_beams 50"),
    ({"num_beams": 0}, "--num_beams 0: must be above 0"),
    ({"batch_size": 0}, "--batch_size 0: must be above 0"),
    ({"train_file": "nowhere.csv"}, "--train_file nowhere.csv: no such file"),
    ({"exclude_seen": "maybe"}, "--exclude_seen 'maybe' is not valid; expected True or False or earlier"),
    ({"allow": "nowhere.txt"}, "--allow nowhere.txt: no such file"),
    ({"deny": "nowhere.txt"}, "--deny nowhere.txt: no such file"),
    ({"deny": __file__}, "item id 'import json' is not in the info file"),
    ({"where": "title=x"}, "--where needs --item_meta_path"),
    ({"item_meta_path": "nowhere.json"}, "--item_meta_path nowhere.json: no such file"),
]


def recommend_flags(files, base, **more):
    return {"model": base, "info_file": files["info"], "history": "12", "category": "bolts", **more}


@pytest.mark.parametrize(("flags", "message"), RECOMMEND)
def test_recommend_refuses(files, base, flags, message):
    refused("recommend.py", message, **recommend_flags(files, base, **flags))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("title", "where 'title': give column=value, such as brand=3M"),
        ("title=", "where 'title=': give column=value"),
        ("brand=3M", "has no column 'brand'; it has description, title"),
        ("title=bolt 99", "where 'title=bolt 99': no item has this value; did you mean 'bolt "),
    ],
)
def test_recommend_refuses_conditions(files, base, where, message):
    refused("recommend.py", message, **recommend_flags(files, base, where=where, item_meta_path=files["item"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (b'{"history": ["1"]}\n{"history": [\n', "line 2: is not JSON"),
        (b"[" * 100_000, "line 1: is not JSON"),
        (b'{"history": ["1"], "K": 2, "K": 3}\n', "line 1: is not JSON: 'K' occurs twice in an object"),
        (b'["1"]', 'line 1: expected an object such as {"history": ["12", "40"]}, found [\'1\']'),
        (b'{"history": "1"}', "line 1: \"history\" must be a list of items, found '1'"),
        (b'{"history": [1.5]}', 'line 1: "history" must be a list of item ids, SIDs or titles, found 1.5 in it'),
        (b'{"history": ["\\ud800"]}', 'line 1: "history" must be a list of item ids, SIDs or titles'),
        (b'{"history": ["99"]}', "line 1: \"history\": '99' is no item id, SID or title of the info file"),
        (b'{"history": ["1"], "k": 3}', "line 1: 'k' is unknown; a request may have K, allow, deny"),
        (b'{"history": ["1"], "K": 51}', 'line 1: "K" must be a whole number from 1 to 50 (--num_beams), found 51'),
        (b'{"history": ["1"], "K": true}', 'line 1: "K" must be a whole number'),
        (b'{"history": ["1"], "exclude_seen": 1}', 'line 1: "exclude_seen" must be true, false or "earlier", found 1'),
        (b'{"history": ["1"], "allow": ["1", "x"]}', "line 1: \"allow\": 'x' is no item id"),
        (b'{"history": ["1"], "deny": {}}', 'line 1: "deny" must be a list of items, found {}'),
        (b'{"history": ["1"], "where": "brand=3M"}', 'line 1: "where" needs --item_meta_path'),
        (b'{"history": [' + b",".join([b"1"] * 1001) + b"]}", '"history" has 1,001 items; at most 1,000 are allowed'),
        (b"\xff", "is not UTF-8 text"),
    ],
)
def test_recommend_refuses_files(files, base, tmp_path, content, message):
    (tmp_path / "r.jsonl").write_bytes(content)
    flags = {"history": "", "histories": tmp_path / "r.jsonl", "output": tmp_path / "o.jsonl"}
    refused("recommend.py", message, **recommend_flags(files, base, **flags))
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("<a>\tBolt\t1\n<b>\tNut\t1\n", "item '1' is listed as <a> and as <b>"),
        ("<a>\tBolt\t\n", "<a> has no item id"),
        ("<a>\tBolt\t1\n<b>\tBolt\t2\n", "'Bolt' is the title of several items; give an id: 1, 2"),
    ],
)
def test_recommend_refuses_items_that_cannot_be_told_apart(files, base, tmp_path, lines, message):
    (tmp_path / "info.txt").write_text(lines)
    refused("recommend.py", message, **recommend_flags(files, base, info_file=tmp_path / "info.txt", history="Bolt"))


def test_recommend_refuses_a_catalogue_that_the_checkpoint_does_not_know(files, sft_run, tmp_path):
    (tmp_path / "info.txt").write_text("<a_0><b_0><c_0>\tBolt\t1\n<z_1>\tNut\t2\n")
    checkpoint = sft_run("lora") / "final_checkpoint"
    flags = recommend_flags(files, checkpoint, info_file=tmp_path / "info.txt", history="1")
    refused("recommend.py", f"info_file {tmp_path / 'info.txt'} belongs to a different catalogue", **flags)


def test_recommend_reports_all_problems_together(base, tmp_path):
    for model, wrong in (("", "--model is missing"), (base, "--category is missing")):
        flags = {"model": model, "info_file": "nowhere.txt", "K": 0, "output": tmp_path / "o", "where": "x=y"}
        result = run_command("recommend.py", **flags)
        assert result.returncode == 2 and wrong in result.stderr
        # that, K, history, output, where, info_file
        assert len(result.stderr.strip().splitlines()) == 6, result.stderr


@pytest.mark.parametrize("flag", ["info_file", "test_data_path", "train_file"])
def test_an_evaluation_does_not_overwrite_what_it_reads(files, sft_run, tmp_path, flag):
    given = {"info_file": files["info"], "test_data_path": files["test"], "train_file": files["train"]}
    copy = Path(shutil.copy(given[flag], tmp_path / "input.csv"))
    (tmp_path / "link.csv").symlink_to(copy)
    flags = {**given, flag: tmp_path / "link.csv", "base_model": sft_run("lora") / "final_checkpoint"}
    refused("evaluate.py", f"would overwrite --{flag} {tmp_path}/link.csv", **flags, result_json_data=copy)
    assert copy.read_bytes() == Path(given[flag]).read_bytes()


def test_recommendations_do_not_overwrite_the_requests(files, sft_run, tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"history": ["3"]}\n')
    flags = {"model": sft_run("lora") / "final_checkpoint", "info_file": files["info"], "histories": requests}
    refused("recommend.py", f"would overwrite --histories {requests}", **flags, output=requests)
    assert requests.read_text() == '{"history": ["3"]}\n'


@pytest.mark.parametrize("tasks", ["sid_history_to_sid", "sid_history_to_sid,title_to_sid", "title_to_sid"])
def test_an_rl_run_without_a_whole_step_is_refused(files, base, tmp_path, tasks):
    """The prompts that are counted are those of the training."""

    def read(**more) -> rl.RLInput:
        flags = rl_flags(files, base, tmp_path / "run", tasks=tasks, num_generations=2, reward_type="rule", **more)
        return rl.read_input(RLFlags(**strings(flags)))

    inputs = read(train_batch_size=2)
    encoder = Encoder(AutoTokenizer.from_pretrained(base), inputs.prompts, 512)
    prompts = len(prompt_dataset(encoder, inputs.train_rows, 500))
    read(train_batch_size=2 * prompts)
    left = prompts - int(rl.LEFT_OUT * prompts)
    read(train_batch_size=2 * left, sample_train=True)
    for more, found in (({}, prompts), ({"sample_train": True}, left)):
        with pytest.raises(InputError) as refused:
            read(train_batch_size=2 * found + 2, **more)
        (line,) = refused.value.problems
        assert f"--train_file {files['train']}: {found} prompts are less than the {found + 1} of a step" in line


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_what_random_generators_take(files, base, tmp_path, seed):
    message, output = f"--seed {seed}: must be from 0 to 4294967295", tmp_path / "out"
    refused("sft.py", message, **sft_flags(files, base, output, seed=seed))
    refused("rl.py", message, **rl_flags(files, base, output, seed=seed))
    for script, flags in (("make_base", {"item_meta_path": files["item"]}), ("train_sasrec", {})):
        done = run_command(f"scripts/{script}.py", **flags, output_dir=output, seed=seed)
        assert done.returncode == 2 and message in done.stderr
    assert not output.exists()


def test_a_card_is_named_for_a_dry_run_only(files, base, tmp_path):
    refused("sft.py", "--gpu_memory 12GB has no effect", **sft_flags(files, base, tmp_path / "out", gpu_memory="12GB"))
