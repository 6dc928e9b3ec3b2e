import json

import pytest

from minionerec.data.prompts import RECOMMENDATION, TASKS, Prompts, load_prompts
from minionerec.errors import InputError


def override(tmp_path, data) -> str:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def test_braces_in_titles_stay():
    prompts = load_prompts("bolts")
    text = prompts.render(prompts.tasks["title_to_sid"], {"title": "{sid} {}", "sid": "<a>", "description": ""})
    assert "Title: {sid} {}" in text


def test_known_categories_are_spelled_out_and_others_kept():
    assert load_prompts("Industrial_and_Scientific").category == "industrial and scientific items"
    assert load_prompts("garden gnomes").category == "garden gnomes"


def test_a_prompt_file_replaces_wording(tmp_path):
    tasks = {RECOMMENDATION: {"instruction": "Next {category}?", "input": "H {sid_history}", "weight": 3}}
    prompts = load_prompts("x", override(tmp_path, {"template": "{instruction}|{input}|", "tasks": tasks}))
    fields = {"sid_history": "<a>", "title_history": "", "sid": "<b>", "title": ""}
    assert prompts.render(prompts.tasks[RECOMMENDATION], fields) == "Next x?|H <a>|"
    assert prompts.tasks[RECOMMENDATION].weight == 3
    assert prompts.tasks["title_to_sid"] == TASKS["title_to_sid"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tasks": {"nope": {}}}, "unknown task"),
        ({"tasks": {RECOMMENDATION: {"input": "{sid}"}}}, "unknown fields ['sid']"),
        ({"tasks": {RECOMMENDATION: {"input": "{sid_history.__class__}"}}}, "unknown fields"),
        ({"tasks": {RECOMMENDATION: {"input": "{"}}}, "is not a format string"),
        ({"tasks": {RECOMMENDATION: {"weight": 0}}}, "weight"),
        ({"tasks": {RECOMMENDATION: {"weight": 101}}}, "a whole number from 1 to 100, not 101"),
        ({"tasks": {RECOMMENDATION: {"colour": "red"}}}, "unknown keys"),
        ({"tasks": {RECOMMENDATION: {"response": "It is {sid}"}}}, "must begin with {sid}"),
        ({"tasks": {RECOMMENDATION: {"response": "{sid} {title}"}}}, "must begin with {sid}"),
        ({"tasks": {RECOMMENDATION: {"response": "{sid}{"}}}, "is not a format string"),
        ({"tasks": {"title_to_sid": {"input": "{title} {sid}"}}}, "unknown fields ['sid']"),
        ({"tasks": {"sid_to_title": {"response": "{sid}"}}}, "unknown fields ['sid']"),
        ({"tasks": {"sid_to_title": {"response": "none"}}}, "names no field"),
        ({"tasks": {RECOMMENDATION: {"instruction": "\ud800"}}}, "must be text"),
        ({"template": "{instruction}{input}{input}"}, "each once"),
        ({"tasks": {RECOMMENDATION: {"input": "{sid_history:{sid}}"}}}, "without a conversion or format"),
        ({"tasks": {RECOMMENDATION: {"input": "{sid_history!z}"}}}, "without a conversion or format"),
        ({"tasks": {RECOMMENDATION: {"input": "{title}"}}}, "unknown fields ['title']"),
        ({"tasks": {RECOMMENDATION: []}}, "must be an object"),
        ({"tasks": {RECOMMENDATION: {"response": 5}}}, "must be text"),
        ({"tasks": []}, "tasks must be an object"),
        ({"template": "{input}"}, "template must contain"),
        ({"template": "{instruction:d}{input}"}, "template must contain"),
        ({"wording": 1}, "expected an object"),
    ],
)
def test_a_bad_prompt_file_is_refused(tmp_path, data, message):
    with pytest.raises(InputError, match="prompt_file") as error:
        load_prompts("x", override(tmp_path, data))
    assert message in str(error.value)


def test_all_problems_of_a_prompt_file_come_together(tmp_path):
    tasks = {"nope": {}, RECOMMENDATION: {"input": "{sid}"}, "title_to_sid": {"weight": 0}}
    with pytest.raises(InputError) as error:
        load_prompts("x", override(tmp_path, {"tasks": tasks}))
    assert len(error.value.problems) == 3


def test_a_fixed_text_may_follow_the_sid(tmp_path):
    tasks = {RECOMMENDATION: {"response": "{sid}\n{{}}"}, "sid_to_title": {"response": "Title: {title}"}}
    tasks = load_prompts("x", override(tmp_path, {"tasks": tasks})).tasks
    endings = {name: task.ending for name, task in tasks.items()}
    assert endings[RECOMMENDATION] == "\n{}" and endings["title_to_sid"] == "" and endings["sid_to_title"] is None
    assert tasks[RECOMMENDATION].response.format(sid="<a>") == "<a>\n{}"


def test_tasks_are_chosen_by_name():
    assert list(load_prompts("x", tasks="title_to_sid, sid_history_to_sid").tasks) == [RECOMMENDATION, "title_to_sid"]
    for tasks in ("nope", ""):
        with pytest.raises(InputError, match="--tasks"):
            load_prompts("x", tasks=tasks)


def test_validation_asks_for_the_recommendation_where_it_is_trained():
    assert list(load_prompts("x").for_validation().tasks) == [RECOMMENDATION]
    text = load_prompts("x", tasks="title_history_to_title,sid_to_title")
    assert list(text.for_validation().tasks) == ["title_history_to_title"]
    assert text.need_titles and not load_prompts("x", tasks=RECOMMENDATION).need_titles


def test_prompts_are_recorded_whole():
    prompts = load_prompts("x")
    assert Prompts.from_json(json.loads(json.dumps(prompts.to_json()))) == prompts


def test_what_the_table_says_survives():
    good = load_prompts("tools").to_json()
    assert Prompts.from_json(json.loads(json.dumps(good)), "here").to_json() == good
