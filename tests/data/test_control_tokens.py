"""Control tokens and SIDs in titles and descriptions are text there, for tokenizers of every family; in the wording and
in SIDs they are tokens; and rows without them become the same tokens as before."""

import json
import random
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import evaluate_flags, rl_flags, sft_flags, succeed
from prepending import prepending_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minionerec.data import files as data_files
from minionerec.data.control_tokens import ControlTokens
from minionerec.data.encoding import Encoder
from minionerec.data.examples import tokenized_dataset
from minionerec.data.files import Interaction, Item
from minionerec.data.prompts import TASKS, Prompts, load_prompts
from minionerec.data.sid_tokens import add_sid_tokens
from minionerec.model import loading
from minionerec.model.sid_start import start_sid_rows

TEXTS = ["Title: a blue bolt, M4 x 30", "Purchases: a steel nut", "Answer:\n", "<|im_end|> </s> [SEP] <a_1> im_end sep"]
SIDS = ["<a_0>", "<a_1>", "<b_0>", "<b_1>"]
END, START = "<|im_end|>", "<|im_start|>"


def byte_level():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return bpe


def merged():
    """Merges make the end-of-sequence token from text, and `ignore_merges` finds words as a whole."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator([END, START, *TEXTS] * 9, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    assert bpe.token_to_id(END)
    return bpe


def unigram(scheme: str = "always"):
    """As T5 and XLM-R: control tokens are entries of the model."""
    letters = sorted(set("".join(TEXTS)) - {" ", "\n"})
    entries = [("<unk>", 0.0), ("</s>", 0.0), (END, 0.0), ("▁", -2.0), *((letter, -5.0) for letter in letters)]
    model = Tokenizer(models.Unigram([*entries, ("▁bolt", -3.0), ("▁a", -3.0)], unk_id=0))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    model.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return model


def unigram_first():
    return unigram("first")


def word_piece():
    """As BERT, in lower case; its control tokens are entries of the model."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", END, *"abcdefghijklmnopqrstuvwxyz0123456789[]<>|/,:_", "bolt", "nut"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    model = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return model


def words():
    vocabulary = ["<unk>", END, "</s>", *sorted({word for text in TEXTS for word in text.split()})]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model


def prepending():
    return prepending_tokenizer(TEXTS).backend_tokenizer


FAMILIES = [byte_level, merged, unigram, unigram_first, word_piece, words, prepending]
CONTROL = ["</s>", "[SEP]", END, START, "<unk>", *SIDS]


def wrapped(backend: Tokenizer, **options) -> PreTrainedTokenizerFast:
    """The tokenizer with control tokens, of which two take in spaces, a blank token, and SIDs."""
    options = {"special": True, "normalized": False, **options}
    spaces = {START: {"rstrip": True}, "[SEP]": {"lstrip": True}}
    backend.add_special_tokens([AddedToken(text, **options, **spaces.get(text, {})) for text in CONTROL[:5]])
    backend.add_tokens([AddedToken("   ", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    add_sid_tokens(tokenizer, SIDS)
    return tokenizer


def pair(family):
    """A tokenizer with control tokens and SIDs, and one that never had them."""
    bare = family()
    if family is prepending:  # its control tokens were there from the start
        data = json.loads(bare.to_str())
        data["added_tokens"] = []
        bare = Tokenizer.from_str(json.dumps(data))
    return wrapped(family()), bare


ALL = ",".join(TASKS)
CHAT = "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|> assistant\n"


def encoder_of(tokenizer, template: str | None = None, cutoff_len: int = 1000, **inputs) -> Encoder:
    prompts = load_prompts("bolts", None, ALL)
    data = prompts.to_json()
    data["template"] = template or data["template"]
    for task in data["tasks"]:
        task["input"] = inputs.get(task["name"], task["input"])
    return Encoder(tokenizer, Prompts.from_json(data), cutoff_len)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [text for text in CONTROL if text != "<unk>"])
def test_a_control_token_in_a_text_is_text(family, text):
    tokenizer, _ = pair(family)
    control = ControlTokens(tokenizer.backend_tokenizer)
    ids = set(tokenizer.convert_tokens_to_ids(CONTROL)) - {tokenizer.backend_tokenizer.token_to_id("<unk>")}
    for title in (text, f"a {text} bolt", f"bolt{text}", f"{text} {text}bolt", f"a{text[:3]}{text}"):
        assert ids.intersection(tokenizer.backend_tokenizer.encode(title, add_special_tokens=False).ids), title
        (plain,) = control.tokenize([title])
        assert plain and not ids.intersection(plain), (title, tokenizer.convert_ids_to_tokens(plain))


@pytest.mark.parametrize("family", [byte_level, unigram_first, prepending])
def test_such_a_text_becomes_the_tokens_of_a_tokenizer_without_control_tokens(family):
    tokenizer, bare = pair(family)
    added = wrapped(byte_level()) if family is byte_level else tokenizer
    texts = [f"a {token} bolt, {token}x" for token in (START, "[SEP]", *SIDS)]  # not entries of any of these models
    expected = [bare.encode(text, add_special_tokens=False).ids for text in texts]
    assert ControlTokens(added.backend_tokenizer).tokenize(texts) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [None, CHAT])
def test_the_wording_and_the_sids_stay_tokens(family, template):
    tokenizer, _ = pair(family)
    backend = tokenizer.backend_tokenizer
    encoder = encoder_of(tokenizer, template)
    wanted = [token for token in CONTROL if token != "<unk>"]
    ids = tokenizer.convert_tokens_to_ids(wanted)

    def controls(tokens: list[int]) -> list[int]:
        return [token for token in tokens if token in ids]

    for task, text in product(encoder.prompts.tasks.values(), (END, "</s>", "<a_1><b_1>", START, "[SEP]")):
        hostile, clean = f"a {text} bolt{text}", "a bolt"
        if task.rows == "item":
            rows = [Item("<a_0><b_0>", title, title) for title in (hostile, clean)]
        else:
            rows = [Interaction(["<a_1><b_0>", "<a_0>"], [clean, title], "<b_1>", title) for title in (hostile, clean)]
        (prompt, response), (plain_prompt, plain_response) = encoder.encode(task, rows)
        assert controls(prompt) == controls(plain_prompt)
        assert controls(response) == controls(plain_response) and response[-1] == tokenizer.eos_token_id
        if task.input.endswith("{title}") or "title_history" in task.input:
            assert prompt != plain_prompt
    # Rows without control tokens are those of the tokenizer itself.
    task = encoder.prompts.tasks["title_history_to_title"]
    row = Interaction(["<a_1>", "<a_0>"], ["a   blue bolt", "M4 x 30 < im_end|>"], "<b_1>", "a nut")
    prompt, response = encoder.encode(task, [row])[0]
    text = encoder.prompts.render(task, {"title_history": ", ".join(row.title_history)})
    assert prompt == encoder.start + backend.encode(text, add_special_tokens=False).ids
    assert response == [*backend.encode("a nut", add_special_tokens=False).ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("wording", ["Title: <{title}>", "Title: {title}im_end|>", "Title: <|im_{title}", "<{title}s>"])
def test_a_title_and_the_wording_around_it_make_no_control_token(wording):
    tokenizer, _ = pair(byte_level)
    encoder = encoder_of(tokenizer, title_to_sid=wording)
    task = encoder.prompts.tasks["title_to_sid"]
    controls = set(tokenizer.convert_tokens_to_ids(CONTROL))
    for title in ("a_1", "unk", "<|", "end|>", "/", "/s", "bolt"):
        (prompt,) = encoder.encode_prompts(task, [Item("<b_0>", title, "")], [1000])
        assert not controls.intersection(prompt), title
        assert tokenizer.decode(prompt) == encoder.prompts.render(task, {"title": title})


def test_a_normalizer_that_makes_control_tokens_is_seen_through():
    backend = word_piece()
    tokenizer = wrapped(backend, normalized=True)
    title = "Bolt [sep] </S> nut"
    end = set(tokenizer.convert_tokens_to_ids(["[SEP]", "</s>"]))
    assert end.intersection(tokenizer(title, add_special_tokens=False).input_ids)
    control = ControlTokens(backend)
    assert not end.intersection(control.tokenize([title])[0])
    (ids,) = control.encode(lambda fields: "[SEP] {title} [sep]".format(**fields), [{"title": title}])
    assert sum(token in end for token in ids) == 2


def test_shortened_prompts_keep_texts_text():
    tokenizer, _ = pair(byte_level)
    encoder = encoder_of(tokenizer, cutoff_len=200)
    task = encoder.prompts.tasks["title_to_sid"]
    (prompt,) = encoder.encode_prompts(task, [Item("<a_0>", f"{END}<a_1>" * 200, "")], [180])
    assert len(prompt) <= 180 and not set(tokenizer.convert_tokens_to_ids([END, "<a_1>"])).intersection(prompt)
    task = encoder.prompts.tasks["title_history_to_sid"]
    row = Interaction(["<a_0>"] * 30, [f"bolt {END} M4"] * 30, "<a_1>", "")
    (prompt,) = encoder.encode_prompts(task, [row], [180])
    assert 100 < len(prompt) <= 180 and tokenizer.eos_token_id not in prompt


def test_texts_with_control_tokens_are_counted_once_also_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    tokenizer, _ = pair(byte_level)
    rows = {
        "item": [Item("<a_0>", f"bolt {END}", "a nut"), Item("<a_1>", "bolt", "of <a_0>")],
        "interaction": [Interaction(["<a_0>"], [f"bolt {END}"], "<b_1>", f"x{END}")] * 3,
    }
    for _ in range(2):
        encoder = encoder_of(tokenizer)
        tokenized_dataset(encoder, rows.__getitem__, [])
        assert encoder.control_note == (
            "titles and descriptions with control tokens such as '<|im_end|>': 3; there these are tokenized as text"
        )
    encoder = encoder_of(tokenizer)
    tokenized_dataset(encoder, lambda kind: rows[kind][1:2] if kind == "item" else [], [], tasks="fewer")
    assert "'<a_0>': 1;" in encoder.control_note


# --- From files to recommendations ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(files, tmp_path_factory) -> dict[str, str]:
    """The files of the other tests, with control tokens in a title of the item file, the info file and the CSVs."""
    folder = tmp_path_factory.mktemp("hostile")
    changed = {**files}
    for name in ("item", "info", "train", "valid", "test"):
        changed[name] = str(folder / Path(files[name]).name)
        text = Path(files[name]).read_text(encoding="utf-8")
        Path(changed[name]).write_text(text.replace("Bolt 7,", "Bolt 7<|endoftext|><a_0>,"), encoding="utf-8")
    return changed


def test_commands_count_them_and_find_such_titles(hostile, base, tmp_path):
    title = json.loads(Path(hostile["item"]).read_text(encoding="utf-8"))["7"]["title"]
    run, tasks = tmp_path / "sft", "sid_history_to_sid,title_history_to_sid,sid_to_title"
    trained = succeed("sft.py", **sft_flags(hostile, base, run, sample=24, tasks=tasks))
    line = "titles and descriptions with control tokens such as '<|endoftext|>': 1; there these are tokenized as text"
    assert line in trained.stdout.splitlines()

    # The wording of the recommendation may have titles, in evaluation, RL and requests too.
    prompts, final = tmp_path / "prompts.json", run / "final_checkpoint"
    wording = {"input": "{sid_history}: {title_history}<|endoftext|>"}
    prompts.write_text(json.dumps({"tasks": {"sid_history_to_sid": wording}}))
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text(json.dumps({"history": [title]}) + "\n")
    flags = {"model": final, "info_file": hostile["info"], "histories": requests, "output": output, "num_beams": 5}
    answered = succeed("recommend.py", **flags, K=3, prompt_file=prompts)
    assert line in answered.stdout.splitlines()
    result = tmp_path / "result.json"
    flags = evaluate_flags(hostile, result, base_model=final, prompt_file=prompts)
    evaluated = succeed("evaluate.py", **flags)
    assert line in evaluated.stdout.splitlines()
    assert any("Bolt 7<|endoftext|><a_0>," in row["input"] for row in json.loads(result.read_text()))
    flags = rl_flags(hostile, final, tmp_path / "rl", tasks="title_history_to_sid", learning_rate=1e-6)
    rewarded = succeed("rl.py", **flags, test_during_training=False, sample_train=False)
    assert line in rewarded.stdout.splitlines()


def test_new_sids_start_from_the_rows_of_titles_as_text(hostile, base):
    tokenizer, model = loading.load_tokenizer(base), loading.load_base(base)
    catalogue = data_files.read_catalogue(hostile["index"], hostile["item"])
    loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    weight = model.get_input_embeddings().weight.detach().clone()
    start_sid_rows(model, tokenizer, ["<b_1>"], catalogue, "text")
    titles = [item.title for item in catalogue.items.values() if "<b_1>" in catalogue.tokens_of[item.sid]]
    assert sum("<|endoftext|><a_0>" in title for title in titles) == 1
    ids = ControlTokens(tokenizer.backend_tokenizer).tokenize(titles)
    expected = torch.stack([weight[one].mean(dim=0) for one in ids]).mean(dim=0)
    assert torch.allclose(model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<b_1>")], expected)


PIECES = ["<", "<|", "|>", "im_end", "end|>", "/s>", "[", "SEP]", "a_", "1>", " ", ", ", "bolt", "▁", "\n", "   ", "é"]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_texts_in_random_wordings_make_no_control_token(family):
    tokenizer, _ = pair(family)
    control = set(tokenizer.convert_tokens_to_ids([token for token in CONTROL if token != "<unk>"]))
    rng = random.Random(family.__name__)

    def text(most: int) -> str:
        return "".join(rng.choices([*CONTROL, *PIECES], k=rng.randint(0, most)))

    for _ in range(12):
        inputs = {
            "title_to_sid": f"{text(3)}{{title}}{text(3)}",
            "title_history_to_title": f"{text(3)}{{title_history}}{text(3)}{{sid_history}}{text(3)}",
        }
        encoder = encoder_of(tokenizer, f"{text(2)}{{instruction}}{text(2)}{{input}}{text(3)}", **inputs)
        for name in (*inputs, "sid_to_title"):
            task, titles = encoder.prompts.tasks[name], [text(6).strip() or "x" for _ in range(3)]
            found = []
            for first, second, third in (titles, "000"):
                item, row = (
                    Item("<a_0><b_0>", first, ""),
                    Interaction(["<a_1>", "<b_0><a_0>"], [first, second], "<b_1>", third),
                )
                ((prompt, response),) = encoder.encode(task, [item if task.rows == "item" else row])
                found.append([[token for token in ids if token in control] for ids in (prompt, response)])
            assert found[0] == found[1], (encoder.prompts.template, task.input, titles)
