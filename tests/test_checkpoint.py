"""What a checkpoint says about itself is input, checked before torch is imported: a record, wording, an adapter."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import validate_repo_id
from recorded import GOOD, evaluation, problems_of, record
from safetensors.torch import save_file

import evaluate
import merge_lora
import recommend
import rl
import sft
from minionerec import __version__
from minionerec.checkpoint import (
    HUB_NAME,
    LACKED_IN_0_1,
    Checkpoint,
    check_adapter,
    check_model,
    newest_checkpoint,
    run_record,
)
from minionerec.data.files import Catalogue, Item, read_info_items
from minionerec.data.prompts import RECOMMENDATION, load_prompts
from minionerec.errors import InputError, Problems
from minionerec.flags.rl import RLFlags
from minionerec.flags.sft import SFTFlags

HUGE = "{sid_history:>400000000}"


def task(**changes) -> dict:
    return {**next(t for t in GOOD["tasks"] if t["name"] == RECOMMENDATION), **changes}


PROMPTS = [
    ([task(input="Purchases: {sid_history} {sid}")], "input of task 'sid_history_to_sid' names unknown fields ['sid']"),
    ([task(input="Purchases: {sid_history} {title}")], "names unknown fields ['title']"),
    ([task(input=HUGE)], "write 'sid_history' without a conversion or format"),
    ([task(input="{sid_history!r}")], "without a conversion or format"),
    ([task(input="{sid_history.__class__}")], "names unknown fields ['sid_history.__class__']"),
    ([task(input="{sid_history[0]}")], "names unknown fields ['sid_history[0]']"),
    ([task(input="{}")], "names unknown fields ['']"),
    ([task(input="{")], "is not a format string"),
    ([task(input="x" * 10_001)], "has 10,001 characters; at most 10,000 are allowed"),
    ([task(input="{sid_history}" * 11)], "names a field more than 10 times"),
    ([task(input=5)], "input of task 'sid_history_to_sid' must be text, not 5"),
    ([task(instruction="\ud800")], "instruction of task 'sid_history_to_sid' must be text"),
    ([task(response="The SID is {sid}")], "must begin with {sid}"),
    ([task(response="{sid}{sid}")], "must begin with {sid}"),
    ([task(response="{sid:>400000000}")], "without a conversion or format"),
    ([task(response="")], "names no field"),
    ([task(weight=10**9)], "must be a whole number from 1 to 100, not 1000000000"),
    ([task(weight=True)], "must be a whole number from 1 to 100, not True"),
    ([task(weight="2")], "must be a whole number from 1 to 100, not '2'"),
    ([task(colour="red")], "has unknown keys ['colour']"),
    ([task(rows="item")], "task 'sid_history_to_sid' on rows 'item' is unknown"),
    ([task(), task()], "is unknown or listed twice"),
    ([task(name="nope")], "task 'nope' on rows 'interaction' is unknown"),
    ([task(name=["x"])], "task ['x'] on rows"),
    ([{}], "task None on rows None is unknown"),
    ([5], "tasks must be a list of objects"),
    ({RECOMMENDATION: task()}, "tasks must be a list of objects"),
]


WHOLE = [
    ({**GOOD, "template": "{input}"}, "template must contain {instruction} and {input}"),
    ({**GOOD, "template": "{instruction}{input:>400000000}"}, "template must contain {instruction} and {input}"),
    ({**GOOD, "template": "{instruction}" + "{input}" * 900}, "template must contain {instruction} and {input}"),
    ({**GOOD, "template": None}, "template must be text, not None"),
    ({**GOOD, "category": 5}, "category must be text, not 5"),
    ({**GOOD, "category": "x" * 10_001}, "category has 10,001 characters"),
    ({**GOOD, "more": 1}, "expected an object of template, category and tasks"),
    ({name: GOOD[name] for name in ("category", "tasks")}, "expected an object of template, category and tasks"),
]


@pytest.mark.parametrize(("prompts", "message"), [({**GOOD, "tasks": tasks}, m) for tasks, m in PROMPTS] + WHOLE)
def test_recorded_prompts_pass_the_checks_of_a_prompt_file(files, tmp_path, prompts, message):
    checkpoint = record(tmp_path / "c", prompts)
    (problem,) = problems_of(evaluate.evaluate, **evaluation(files, checkpoint))
    assert problem.startswith(f"{checkpoint}/minionerec.json, prompts: ") and message in problem
    assert problem.endswith("; correct it there, or give rl.py and evaluate.py --category and a --prompt_file")
    # And the remedy is one: what is recorded then plays no part.
    (tmp_path / "prompts.json").write_text("{}")
    assert Checkpoint.read(str(checkpoint)).prompts("bolts", str(tmp_path / "prompts.json")).category == "bolts"


def test_every_command_checks_them(files, tmp_path):
    bad = {**GOOD, "tasks": [task(input=HUGE), {**GOOD["tasks"][1], "input": "{sid}"}]}
    checkpoint = record(tmp_path / "c", bad)
    flags = {"model_path": checkpoint, "train_file": files["train"], "eval_file": files["valid"]}
    flags |= {"info_file": files["info"], "sid_index_path": files["index"], "item_meta_path": files["item"]}
    problems = problems_of(rl.train, **flags, output_dir=tmp_path / "out")
    assert len(problems) == 2 and all("minionerec.json, prompts: input of task" in line for line in problems)
    checkpoint = record(tmp_path / "c", bad, flags={"use_qlora": True, "eval_file": files["valid"], "category": "x"})
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "hub/base"}))
    flags = {"adapter": checkpoint, "into": "original", "sid_index_path": files["index"], "output_dir": tmp_path / "m"}
    problems = problems_of(merge_lora.merge, **flags)
    assert len(problems) == 2 and all("minionerec.json, prompts: input of task" in line for line in problems)


def test_a_blank_category_is_none(tmp_path):
    checkpoint = Checkpoint.read(str(record(tmp_path / "c", GOOD)))
    (tmp_path / "prompts.json").write_text("{}")
    for prompt_file in (None, str(tmp_path / "prompts.json")):
        assert checkpoint.prompts("  ", prompt_file).category == GOOD["category"]


def test_tasks_that_were_not_trained_end_as_those_that_were(tmp_path):
    checkpoint = str(record(tmp_path / "c", {**GOOD, "tasks": [task(response="{sid}\n")]}))
    tasks = (
        Checkpoint.read(checkpoint).prompts("", default=("description_to_sid", "sid_to_title", RECOMMENDATION)).tasks
    )
    assert [task.response for task in tasks.values()] == ["{sid}\n", "{sid}\n", "{title}"]


def test_a_task_that_was_not_taught_is_named(tmp_path):
    other = str(record(tmp_path / "other", load_prompts("bolts", tasks="title_to_sid").to_json()))
    (warning,) = Checkpoint.read(other).notes_on_wording(load_prompts("bolts"), "", None)
    assert warning.endswith("was trained on title_to_sid only, and is asked for sid_history_to_sid")
    good = Checkpoint.read(str(record(tmp_path / "good", GOOD)))
    assert not good.notes_on_wording(good.prompts(""), "", None)


def test_a_checkpoint_of_another_tool_is_asked_in_words_that_it_may_not_know(tmp_path):
    (tmp_path / "theirs").mkdir()
    theirs = Checkpoint.read(str(tmp_path / "theirs"))
    (warning,) = theirs.notes_on_wording(theirs.prompts("bolts"), "bolts", None)
    assert warning.endswith("the built-in one is used, unless --prompt_file gives another")
    assert not theirs.notes_on_wording(theirs.prompts("bolts"), "bolts", "words.json")


@pytest.mark.parametrize("content", ["[1]", "5", "{", "[" * 100_000, "\ud800"])
def test_a_record_that_is_no_object(files, tmp_path, content):
    checkpoint = record(tmp_path / "c")
    (checkpoint / "minionerec.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    (problem,) = problems_of(evaluate.evaluate, **evaluation(files, checkpoint))
    assert problem.startswith(f"{checkpoint}/minionerec.json: ")


ADAPTERS = [
    ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5 and must be text or null"),
    ({"peft_type": ["LORA"]}, "peft_type is ['LORA'] and must be LORA or TRAINABLE_TOKENS"),
    ({"peft_type": "FOO"}, "peft_type is 'FOO' and must be LORA or TRAINABLE_TOKENS"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS' and must be CAUSAL_LM or null"),
    ({"r": "8"}, "r is '8' and must be a whole number"),
    ({"r": 400_000_000}, "has rank 400000000, and its weights have 4 at most"),
    ({"rank_pattern": {"q_proj": 400_000_000}}, "has rank 400000000, and its weights have 4 at most"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4' and must be another start"),
    ({"rank_pattern": [1]}, "rank_pattern is [1] and must be an object of ranks"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x' and must be a number"),
    ({"use_dora": "yes"}, "use_dora is 'yes' and must be true or false"),
    ({"target_modules": {}}, "target_modules is {} and must be a list of names"),
    ({"target_modules": [5]}, "target_modules is [5] and must be a list of names"),
    ({"target_parameters": "x"}, "target_parameters is 'x' and must be a list of names"),
    ({"modules_to_save": [5]}, "modules_to_save is [5] and must be a list of names"),
    ({"megatron_config": {"x": 1}, "megatron_core": "os"}, "megatron_config is {'x': 1} and must be null"),
    ({"layer_replication": [[0, 2]] * 9}, "layer_replication is [[0, 2]"),
]


@pytest.mark.parametrize(("changes", "message"), ADAPTERS)
def test_an_adapters_configuration_is_checked(files, tmp_path, changes, message):
    base, adapter = record(tmp_path / "b"), record(tmp_path / "c")
    config = {"base_model_name_or_path": "hub/base", "peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"q_proj.lora_A.weight": torch.zeros(4, 8)}, adapter / "adapter_model.safetensors")
    ranking = evaluation(files, adapter)
    rewards = {"model_path": adapter, "output_dir": tmp_path / "rl", "use_lora": True}
    for command, flags in (
        (evaluate.evaluate, ranking),
        (evaluate.evaluate, {**ranking, "base_model": base, "adapter": adapter}),
        (merge_lora.merge, {"adapter": adapter, "output_dir": tmp_path / "m"}),
        (merge_lora.merge, {"adapter": adapter, "output_dir": tmp_path / "m", "base_model": "hub/base"}),
        (rl.train, rewards),
        (rl.train, {**rewards, "base_model": "hub/base"}),
    ):
        found = [line for line in problems_of(command, **flags) if message in line]
        assert found and all(line.startswith(f"{adapter}/adapter_config.json: ") for line in found)


@pytest.mark.parametrize(
    ("name", "config", "trains"),
    [
        ("q_proj.lora_A.weight", {}, True),
        ("q_proj.lora_magnitude_vector", {}, True),
        ("embed_tokens.token_adapter.trainable_tokens_delta", {}, True),
        ("base_model.model.lm_head.weight", {"modules_to_save": ["lm_head"]}, True),
        ("base_model.model.lm_head.weight", {}, False),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", {"bias": "lora_only"}, False),
    ],
)
def test_rl_refuses_an_adapter_with_weights_that_it_would_not_save(tmp_path, name, config, trains):
    record(tmp_path / "c")
    config = {"base_model_name_or_path": "hub/base", "peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(4, 8)}, tmp_path / "c" / "adapter_model.safetensors")
    flags = {"model_path": tmp_path / "c", "output_dir": tmp_path / "rl"}
    refusal = f"holds 1 weights of the base, such as {name}, which training it further would lose; merge it with"
    for adapted in (True, False):
        problems = problems_of(rl.train, **flags, use_lora=adapted)
        assert any(refusal in line for line in problems) == (adapted and not trains)


def of_release(folder: Path, version: str | None, **record: object) -> Checkpoint:
    folder.mkdir()
    run = {"command": "rl", "flags": {}, **({"version": version} if version else {}), **record}
    (folder / "minionerec.json").write_text(json.dumps(run))
    return Checkpoint.read(str(folder))


def test_what_0_1_0_did_without_a_flag_is_known(tmp_path):
    """A checkpoint says it, whether its release had the flag or not; its own word counts."""
    for number, version in enumerate(("0.1.0", "0.1.7", None)):
        old = of_release(tmp_path / str(number), version, flags={"sft_weight": 0.5})
        assert old.flags == {**LACKED_IN_0_1["rl"], "sft_weight": 0.5} and old.release == (0, 1)
    assert of_release(tmp_path / "new", "0.2.3").flags == {}
    assert of_release(tmp_path / "other", "0.1.0", command="merge").flags == {}


@pytest.mark.parametrize("version", ["0.3.0", "1.0", "0.1000.2"])
def test_a_checkpoint_of_a_later_release_is_refused(tmp_path, version):
    with pytest.raises(InputError) as error:
        of_release(tmp_path / "later", version)
    (problem,) = error.value.problems
    assert problem.endswith(f"by release {version} of minionerec-lora, and this is {__version__}; update it")


@pytest.mark.parametrize("version", ["", "new", "0", 2, "0.x", "0.99999999999999999999", "-1.2", None])
def test_a_release_that_is_none_is_named(tmp_path, version):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "minionerec.json").write_text(json.dumps({"version": version}))
    with pytest.raises(InputError, match=r"version is .* and must be a release such as"):
        Checkpoint.read(str(tmp_path / "odd"))


def test_only_complete_checkpoints_count(tmp_path):
    assert newest_checkpoint(str(tmp_path / "none")) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(str(tmp_path)) is None
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(str(tmp_path)).endswith("checkpoint-10")


def test_names_of_the_hub_are_those_that_its_library_takes():
    random.seed(0)
    names = ["".join(random.choices("aB1-._/é git", k=random.randint(1, 8))) for _ in range(20_000)]
    for name in ["Qwen/Qwen2.5-0.5B", "gpt2", *names]:
        try:
            validate_repo_id(name)
        except ValueError:
            assert not HUB_NAME.fullmatch(name), name
        else:
            assert HUB_NAME.fullmatch(name), name


def test_a_run_records_the_content_of_what_it_learns_from(tmp_path):
    """Also of item embeddings and of a SASRec model, which may be trained again between a stop and a resumption."""
    path, folder = tmp_path / "embeddings.npy", tmp_path / "sasrec"
    folder.mkdir()
    recorded = []
    for content in ("old", "new"):
        for file in (path, folder / "sasrec.safetensors"):
            file.write_text(content)
        flags = {"ada_path": str(path), "cf_path": str(folder), "train_file": "", "eval_file": str(tmp_path / "none")}
        recorded.append(run_record("rl", "full", flags, load_prompts("bolts"), None, Catalogue({}, [], {}))["data"])
    assert all(data.keys() == {"ada_path", "cf_path"} for data in recorded)
    assert all(recorded[0][name] != recorded[1][name] for name in recorded[0])


def test_a_run_records_the_sids_of_some_items():
    for count in (1, 5, 64, 65, 128, 1_000):
        items = {str(i): Item(f"<a_{i}>", "", "") for i in range(count)}
        kept = run_record("sft", "full", {}, load_prompts("bolts"), None, Catalogue(items, [], {}))["items"]
        assert len(kept) == min(count, 64) and all(kept[name] == items[name].sid for name in kept)
        assert count < 1_000 or max(map(int, kept)) > 900


def test_a_catalogue_that_gives_items_other_sids_is_named(files, tmp_path):
    """As data that were prepared again do. Their SIDs have the same tokens, so the tokenizer knows them all."""
    items = {item.id: item.sid for item in read_info_items(files["info"])}
    moved = dict(zip(items, [*items.values()][5:] + [*items.values()][:5], strict=True))
    data = {"train_file": files["train"], "eval_file": files["valid"], "category": "tools"}
    data |= {"sid_index_path": files["index"], "item_meta_path": files["item"]}
    for recorded, differs in ((moved, True), (items, False), ({**items, "gone": "<a_1>"}, False), ({}, False)):
        checkpoint = str(record(tmp_path / "checkpoint", items=recorded, version=__version__))
        asked = recommend.RecommendFlags(model=checkpoint, info_file=files["info"], history="1")
        tested = evaluate.EvaluateFlags(
            base_model=checkpoint,
            info_file=files["info"],
            test_data_path=files["test"],
            result_json_data=str(tmp_path / "result.json"),
        )
        updated = SFTFlags(base_model=checkpoint, output_dir=str(tmp_path / "sft"), **data)
        trained = RLFlags(model_path=checkpoint, output_dir=str(tmp_path / "rl"), info_file=files["info"], **data)
        commands = (recommend.read_input, asked), (evaluate.read_input, tested)
        for read, flags in (*commands, (rl.read_input, trained), (sft.read_input, updated)):
            found = [note for note in read(flags).notes if "belongs to a different catalogue" in note]
            assert len(found) == differs
            assert all(f"{len(items)} of {len(items)} items that were compared have other SIDs" in n for n in found)
        anew = sft.read_input(replace(updated, train_from_scratch=True)).notes
        assert not any("different catalogue" in note for note in anew)  # only a configuration is taken


def test_flags_that_an_adapter_of_peft_ignores_are_named(tmp_path):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": False, "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    flags = {"lora_r": 32, "lora_alpha": 16, "use_rslora": True, "use_dora": True, "lora_target_modules": "qkv"}
    assert Checkpoint.read(str(tmp_path)).differing_flags(flags, tuple(flags)) == [
        f"warning: --lora_r 32 is ignored: {tmp_path} was trained with 8",
        f"warning: --use_rslora True is ignored: {tmp_path} was trained with False",
    ]


def test_the_folder_of_a_run_and_a_file_are_no_checkpoints(tmp_path):
    """A run's folder, in place of the final_checkpoint in it, is what people give first."""
    (tmp_path / "run" / "final_checkpoint").mkdir(parents=True)
    for name in ("run/final_checkpoint/adapter_config.json", "model.safetensors"):
        (tmp_path / name).touch()
    problems = Problems()
    for path in ("run", "model.safetensors", "none"):
        check_model(problems, "model", str(tmp_path / path))
        check_adapter(problems, str(tmp_path / path))
    what = [problem.replace(str(tmp_path), "").partition(": ")[2] for problem in problems]
    assert what == [
        "the folder has no config.json and no adapter_config.json; did you mean /run/final_checkpoint?",
        "no adapter_config.json there; did you mean /run/final_checkpoint?",
        "is a file, not a folder",
        "no adapter_config.json there; give the folder of an adapter checkpoint",
        "no such folder",
        "no adapter_config.json there; give the folder of an adapter checkpoint",
    ]


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ({"target_modules": ["v_proj", "q_proj"]}, "q_proj,v_proj"),
        ({"target_modules": r".*\.(up|down)_proj"}, r".*\.(up|down)_proj"),
        ({"target_modules": None, "target_parameters": ["mlp.experts.gate_up_proj"]}, "mlp.experts.gate_up_proj"),
    ],
)
def test_an_adapter_of_peft_keeps_its_shape_where_no_run_recorded_one(files, tmp_path, targets, named):
    config = {"base_model_name_or_path": "hub/base", "peft_type": "LORA", "r": 8, "lora_alpha": 12.5, "use_dora": True}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **targets}))
    shape = {"lora_r": 8, "lora_alpha": 12.5, "lora_target_modules": named, "use_dora": True}
    assert Checkpoint.read(str(adapter)).adapter_shape == shape
    paths = {"info_file": files["info"], "sid_index_path": files["index"], "item_meta_path": files["item"]}
    data = {"train_file": files["train"], "eval_file": files["valid"], **paths}
    flags = RLFlags(model_path=str(adapter), output_dir="rl", category="bolts", use_lora=True, **data)
    assert rl.read_input(flags).flags == replace(flags, **shape)  # what the run then records
    record(adapter, flags={"lora_r": 16, "lora_alpha": 12.5})
    recorded = {"lora_r": 16, "lora_alpha": 12.5}
    assert Checkpoint.read(str(adapter)).adapter_shape == {**shape, **recorded}
