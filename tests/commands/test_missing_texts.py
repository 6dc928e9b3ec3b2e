"""Titles and descriptions that are not there: read as empty, left out of the tasks that need them, and counted."""

import contextlib
import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import COLUMNS, read_rows, sft_flags
from models import config_of
from prepending import prepending_tokenizer
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

import evaluate
import lora_utils
import rl
import sft
from minionerec.checkpoint import Checkpoint
from minionerec.data import files as data_files
from minionerec.data import texts
from minionerec.data.encoding import Encoder
from minionerec.data.examples import prompt_dataset, tokenized_dataset
from minionerec.data.prompts import RECOMMENDATION, load_prompts
from minionerec.errors import InputError, Problems
from minionerec.model import loading
from minionerec.training import rl_trainer

NAN = float("nan")


def catalogue_of(tmp_path, **fields) -> data_files.Catalogue:
    (tmp_path / "index.json").write_text('{"0": ["<a>"], "1": ["<b>"]}')
    (tmp_path / "item.json").write_text(json.dumps({"0": {"title": "Bolt"}, "1": fields}))
    return data_files.read_catalogue(str(tmp_path / "index.json"), str(tmp_path / "item.json"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (NAN, ""),
        (None, ""),
        ("", ""),
        (" \n", ""),
        ([], ""),
        (["", NAN, None, "  "], ""),
        ("nan", ""),  # what Python writes for a NaN
        (["nan"], ""),
        *((f" {word}\n", "") for word in sorted(data_files.MISSING)),
        *((word, word) for word in ("Nan", "NAN", "none", "NONE", "Null", "na", "Na", "N/A-7", "null and void", "-")),
        (["A bolt.", NAN, "", " M8 "], "A bolt. M8"),
        (" Nan bread ", "Nan bread"),
        ("None such", "None such"),
        ("<p>Line one</p>\n\n中文 😀 &amp;", "<p>Line one</p>\n\n中文 😀 &amp;"),
    ],
)
def test_what_is_missing_is_empty(tmp_path, value, text):
    item = catalogue_of(tmp_path, title=value, description=value).items["1"]
    assert (item.title, item.description) == (text, text)
    if text:
        assert text in data_files.read_titles_and_descriptions(str(tmp_path / "item.json"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("['A bolt.', 'M8']", "A bolt. M8"),
        ("['A bolt.', nan, None, '']", "A bolt."),
        ("[nan]", ""),
        ("[]", ""),
        ("['A bolt.', 8]", "['A bolt.', 8]"),  # no list of texts: a text
        ("[{[]}]", "[{[]}]"),
        ("{'a': 1}", "{'a': 1}"),
        ("[see below]", "[see below]"),
    ],
)
def test_a_description_may_be_the_text_of_a_list(tmp_path, value, text):
    assert catalogue_of(tmp_path, description=value).items["1"].description == text


@pytest.mark.parametrize(
    "value", [{"a": 1}, {}, 5, 0, True, False, 1.5, float("inf"), [["x"]], ["x", {"a": 1}], ["x", 5]]
)
@pytest.mark.parametrize("name", ["title", "description"])
def test_what_is_no_text_is_refused(tmp_path, name, value):
    with pytest.raises(InputError) as error:
        catalogue_of(tmp_path, **{name: value})
    (problem,) = error.value.problems
    assert problem.startswith(
        f"--item_meta_path {tmp_path}/item.json, item '1': {name} must be text or a list of texts, found "
    )
    with pytest.raises(InputError) as again:
        data_files.read_titles_and_descriptions(str(tmp_path / "item.json"))
    assert again.value.problems == [problem]


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(["u", titles, title, "[]", "0", "['<a>', '<b>']", "<a>"] for titles, title in rows)
    return str(path)


@pytest.mark.parametrize(
    ("cells", "titles", "title"),
    [
        (("['x', 'y']", ""), ["x", "y"], ""),
        (("['x', 'y']", "nan"), ["x", "y"], ""),
        (("['x', nan]", "z"), ["x", ""], "z"),  # a list of pandas' with NaN in it
        (("[None, 'nan']", " z "), ["", ""], "z"),
        (("['', ' ']", "none"), ["", " "], "none"),
        (("[' NaN ', 'NULL']", "None"), ["", ""], ""),
        (("[NaN, null]", "<NA>"), ["", ""], ""),
        (("[nan, '\\u00e9']", "Nan"), ["", "é"], "Nan"),
    ],
)
def test_missing_titles_of_interactions(tmp_path, cells, titles, title):
    (row,) = data_files.read_interactions(write(tmp_path / "t.csv", [cells]), "train_file")
    assert (row.title_history, row.title) == (titles, title)


@pytest.mark.parametrize("cell", ["[nope]", "[nan, 5]", "[nan, ['x']]", "nan", "{'x', nan}", "[nan, __import__('os')]"])
def test_other_names_in_a_list_of_titles_are_refused(tmp_path, cell):
    with pytest.raises(InputError, match="line 2: history_item_title must be a list of texts"):
        list(data_files.read_interactions(write(tmp_path / "t.csv", [(cell, "z")]), "train_file"))


def test_a_history_of_sids_misses_nothing(tmp_path):
    path = write(tmp_path / "t.csv", [("['x', 'y']", "z")])
    Path(path).write_text(Path(path).read_text().replace("['<a>', '<b>']", "['<a>', nan]"))
    with pytest.raises(InputError, match="line 2: history_item_sid must be a list of texts"):
        list(data_files.read_interactions(path, "train_file"))


def test_rows_are_examples_of_the_tasks_whose_texts_they_have():
    prompts = load_prompts("bolts", tasks=",".join(load_prompts("x").tasks) + ",description_to_sid")
    whole = data_files.Interaction(["<a>"], ["x"], "<b>", "y")
    untitled, no_history = replace(whole, title=""), replace(whole, title_history=[""])
    bare = replace(untitled, title_history=[" "])
    item = data_files.Item("<a>", "x", "y")
    suited = {
        name: [row for row in (whole, untitled, no_history, bare) if task.suits(row)]
        for name, task in prompts.tasks.items()
        if task.rows == "interaction"
    }
    assert suited == {
        "sid_history_to_sid": [whole, untitled, no_history, bare],
        "sid_history_to_title": [whole, no_history],
        "title_history_to_title": [whole],
        "title_history_to_sid": [whole, untitled],
    }
    items = [item, replace(item, title=""), replace(item, description="")]
    suited = {
        n: [i for i, row in enumerate(items) if t.suits(row)] for n, t in prompts.tasks.items() if t.rows == "item"
    }
    assert suited == {"title_to_sid": [0, 2], "sid_to_title": [0, 2], "description_to_sid": [0, 1]}


# --- From files to recommendations, on a tokenizer that prepends, with a line feed after every SID --------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """20 items, of which 0, 1 and 2 lack their title and 3, 4 and 5 their description; 24 + 8 + 8 interactions."""
    folder = tmp_path_factory.mktemp("missing")
    index = {str(i): [f"<a_{i % 4}>", f"<b_{i // 4}>"] for i in range(20)}
    items = {str(i): {"title": f"Bolt {i}", "description": ["A bolt.", NAN]} for i in range(20)}
    items["0"], items["1"]["title"], items["2"]["title"] = {}, None, NAN
    items["3"]["description"], items["4"]["description"], items["5"]["description"] = NAN, [""], "[nan]"
    items["6"] |= {"title": "<s>old</s> {sid} &amp; <b>中文</b> 😀", "description": "<p>x</p>\n\ny"}
    title_of = {i: item.get("title") for i, item in items.items()}
    paths = {}
    for split, count in (("train", 24), ("valid", 8), ("test", 8)):
        paths[split] = str(folder / f"{split}.csv")
        with open(paths[split], "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for user in range(count):
                *past, target = [str((user * 3 + step) % 20) for step in range(2 + user % 3)]
                titles = [title_of[i] for i in past]
                sids = ["".join(index[i]) for i in past]
                title = title_of[target] if isinstance(title_of[target], str) else ["", "nan"][user % 2]
                writer.writerow([f"u{user}", titles, title, past, target, sids, "".join(index[target])])
    for name, content in (("index", index), ("item", items)):
        paths[name] = str(folder / f"{name}.json")
        Path(paths[name]).write_text(json.dumps(content), encoding="utf-8")
    paths["info"] = str(folder / "info.txt")
    Path(paths["info"]).write_text("".join(f"{''.join(sid)}\t\t{i}\n" for i, sid in index.items()))
    names = [*load_prompts("x").tasks, "description_to_sid"]
    tasks = {name: {"response": "{sid}\n"} for name in names if name.endswith("to_sid")}
    paths["prompts"] = str(folder / "prompts.json")
    Path(paths["prompts"]).write_text(json.dumps({"tasks": tasks}))
    return paths


@pytest.fixture(scope="module")
def base(files, tmp_path_factory) -> str:
    """A tiny model whose tokenizer prepends."""
    folder = str(tmp_path_factory.mktemp("prepending") / "base")
    tokenizer = prepending_tokenizer(data_files.read_titles_and_descriptions(files["item"]))
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    AutoModelForCausalLM.from_config(config_of("qwen2", **size, max_position_embeddings=512)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected_rows(files) -> dict[str, int]:
    """Rows of train.csv, and items, that have the texts of each task."""
    rows = read_rows(files["train"])
    titled = [row["item_title"] not in ("", "nan") for row in rows]
    history = ["Bolt" in row["history_item_title"] or "<s>" in row["history_item_title"] for row in rows]
    return {
        "sid_history_to_sid": len(rows),
        "sid_history_to_title": sum(titled),
        "title_history_to_title": sum(a and b for a, b in zip(titled, history, strict=True)),
        "title_history_to_sid": sum(history),
        "title_to_sid": 17,
        "sid_to_title": 17,
        "description_to_sid": 16,
    }


@pytest.fixture(scope="module")
def trained(files, base, tmp_path_factory):
    """(folder, metrics, what it printed) of sft.py over all tasks."""
    output, printed = tmp_path_factory.mktemp("run") / "run", io.StringIO()
    flags = sft_flags(files, base, str(output), tasks=",".join(expected_rows(files)), learning_rate=1e-2)
    with contextlib.redirect_stdout(printed):
        metrics = sft.train(**flags, prompt_file=files["prompts"], use_lora=True)
    return output, metrics, printed.getvalue()


def test_sft_trains_on_the_rows_that_have_the_texts(files, base, trained, capsys):
    _, metrics, printed = trained
    rows = expected_rows(files)
    assert 0 < rows["title_history_to_title"] < min(rows["sid_history_to_title"], rows["title_history_to_sid"]) < 24
    assert metrics["train_examples"] == sum(rows.values())
    lacking = 24 - rows["sid_history_to_title"]
    assert (
        f"{files['train']}: {lacking} of 24 rows lack a text that sid_history_to_title needs; this task skips them"
        in printed.splitlines()
    )
    assert f"{files['item']}: 4 of 20 rows lack a text that description_to_sid needs" in printed
    assert "sid_history_to_sid needs" not in printed
    # The dry run counts the same, and prints a line for a task that has no row at all.
    flags = sft_flags(files, base, "nowhere", tasks=",".join(rows), prompt_file=files["prompts"])
    sft.train(**flags, dry_run=True)
    printed = capsys.readouterr().out
    for name, count in rows.items():
        assert any(line.split()[:2] == [name, str(count)] for line in printed.splitlines()), name
    assert f"\n{sum(rows.values())} examples; " in printed


def test_the_ranking_equals_scoring_every_sid_and_its_ending(files, trained, tmp_path):
    """One by one, without a trie or a cache: SID, line feed, end-of-sequence token."""
    checkpoint = str(trained[0] / "final_checkpoint")
    evaluate.evaluate(
        base_model=checkpoint,
        info_file=files["info"],
        test_data_path=files["test"],
        result_json_data=str(tmp_path / "r.json"),
        num_beams=20,
    )
    results = json.loads((tmp_path / "r.json").read_text())
    tokenizer = loading.load_tokenizer(checkpoint)
    model = lora_utils.load_adapted(Checkpoint.read(checkpoint), tokenizer, Checkpoint.read(checkpoint).base()).eval()
    prompts = load_prompts("bolts", files["prompts"], RECOMMENDATION)
    sids = data_files.read_info(files["info"])
    for row, result in zip(data_files.read_interactions(files["test"], "test_data_path"), results, strict=True):
        text = prompts.render(prompts.tasks[RECOMMENDATION], {"sid_history": ", ".join(row.sid_history)})
        prompt = tokenizer(text).input_ids
        assert prompt[0] == tokenizer.bos_token_id
        scores = {}
        for sid in sids:
            answer = tokenizer(f"{sid}\n", add_special_tokens=False).input_ids
            assert len(answer) > 2 and tokenizer.decode(answer[2:]).endswith("\n")
            answer.append(tokenizer.eos_token_id)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            scores[sid] = sum(logps[i, token].item() for i, token in enumerate(answer))
        assert result["predict"] == sorted(sids, key=scores.get, reverse=True)


def test_rl_writes_the_ending_and_takes_its_log_probabilities(files, trained, tmp_path, monkeypatch, capsys):
    written = []
    real = rl_trainer.completion_logps

    def spy(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *args, **kwargs):
        written.extend(zip(completion_ids.tolist(), completion_mask.tolist(), strict=True))
        return real(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *args, **kwargs)

    monkeypatch.setattr(rl_trainer, "completion_logps", spy)
    checkpoint = str(trained[0] / "final_checkpoint")
    flags = rl_flags(files, checkpoint, tmp_path / "rl", reward_type="ranking", beam_search=True)
    metrics = rl.train(**flags)
    rows = expected_rows(files)
    names = ("sid_history_to_sid", "title_to_sid", "description_to_sid", "title_history_to_sid")
    assert metrics["train_prompts"] == sum(rows[name] for name in names)
    assert f"{files['item']}: 4 of 20 rows lack a text that description_to_sid needs" in capsys.readouterr().out
    tokenizer = loading.load_tokenizer(str(tmp_path / "rl" / "final_checkpoint"))
    texts = {
        tuple(tokenizer(f"{sid}\n", add_special_tokens=False).input_ids) for sid in data_files.read_info(files["info"])
    }
    assert written
    for ids, mask in written:
        assert all(mask) and ids[-1] == tokenizer.eos_token_id and tuple(ids[:-1]) in texts


def rl_flags(files, checkpoint: object, output: Path, **more) -> dict:
    flags = {"train_file": files["train"], "eval_file": files["valid"], "info_file": files["info"]}
    flags |= {"sid_index_path": files["index"], "item_meta_path": files["item"], "use_lora": True}
    flags |= {"num_generations": 4, "train_batch_size": 16, "test_beam": 5, "eval_step": 0.5, "save_steps": 0.5}
    return {"model_path": str(checkpoint), "output_dir": str(output), **flags, **more}


def problem_of(command, **flags) -> str:
    with pytest.raises(InputError) as error:
        command(**flags)
    (problem,) = error.value.problems
    return problem


def test_rl_refuses_tasks_that_end_differently(files, trained, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"tasks": {"title_to_sid": {"response": "{sid}\n"}}}))
    flags = rl_flags(files, trained[0] / "final_checkpoint", tmp_path / "rl", category="bolts")
    problem = problem_of(rl.train, **flags, prompt_file=str(prompts), tasks="title_to_sid")
    assert "what follows the SID differs between the responses" in problem


def test_a_tokenizer_that_takes_sids_apart_is_refused_before_a_model_is_loaded(
    files, base, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "load_base", None)
    # A checkpoint of an older release: its SID tokens are matched after the normalizer.
    old = tmp_path / "old"
    shutil.copytree(trained[0] / "final_checkpoint", old)
    tokenizer = json.loads((old / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["normalized"] = token["content"].startswith(("<a_", "<b_"))
    (old / "tokenizer.json").write_text(json.dumps(tokenizer))
    ranking = {"base_model": str(old), "info_file": files["info"], "test_data_path": files["test"]}
    problem = problem_of(evaluate.evaluate, **ranking, result_json_data=str(tmp_path / "r.json"))
    assert f"--base_model {old}: SID '<a_0><b_0>' becomes " in problem and "instead of its own 2; " in problem
    assert problem.endswith("or sft.py must make the checkpoint again")
    problem = problem_of(rl.train, **rl_flags(files, old, tmp_path / "rl"))
    assert f"--model_path {old}: SID '<a_0><b_0>' becomes " in problem
    assert problem.endswith(f"start from a checkpoint that sft.py made with {files['index']}")
    # A base with a token of its own that begins before a SID.
    other = loading.load_tokenizer(base)
    other.add_tokens([AddedToken("es: <a_0>", normalized=False)])
    shutil.copytree(base, tmp_path / "base")
    other.save_pretrained(tmp_path / "base")
    problem = problem_of(sft.train, **sft_flags(files, str(tmp_path / "base"), str(tmp_path / "run")))
    assert f"--base_model {tmp_path}/base: SID '<a_0><b_0>' becomes ['<b_0>'] in a prompt of task" in problem
    assert f"rename the SID tokens in --sid_index_path {files['index']}" in problem
    assert not (tmp_path / "run").exists() and not (tmp_path / "rl").exists()


def test_a_file_without_a_title_is_refused_where_every_task_needs_one(tmp_path):
    path = write(tmp_path / "t.csv", [("['', '']", ""), ("[nan, None]", "nan")])
    prompts = load_prompts("x", tasks="title_history_to_title,sid_history_to_title")
    problems = Problems()
    texts.check_interactions(problems, "eval_file", path, None, prompts)
    (problem,) = problems
    assert problem == (
        f"--eval_file {path}: no row has the titles that sid_history_to_title, title_history_to_title need; choose "
        "other --tasks"
    )
    problems = Problems()
    checked = texts.check_interactions(problems, "train_file", path, None, load_prompts("x"))
    assert not problems and checked.num_usable == 2
    assert len(checked.notes) == 3 and "2 of 2 rows" in checked.notes[0]


def test_tasks_without_a_row_make_no_examples(base):
    tokenizer = loading.load_tokenizer(base)
    encoder = Encoder(tokenizer, load_prompts("x", tasks="title_history_to_title,title_to_sid"), 512)
    row, item = data_files.Interaction(["<a>"], [""], "<b>", ""), data_files.Item("<a>", "", "text")
    rows = {"interaction": [row], "item": [item, replace(item, title="Bolt")]}
    assert len(tokenized_dataset(encoder, rows.__getitem__, [])) == 1
    encoder = Encoder(tokenizer, load_prompts("x", tasks="title_history_to_sid,title_to_sid"), 512)
    assert prompt_dataset(encoder, rows.__getitem__, 256)["target"][:] == ["<a>"]
