"""Every SID becomes its own tokens and no others, whatever the tokenizer does to text."""

import json
from dataclasses import replace

import pytest
from models import config_of
from prepending import prepending_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minionerec.data.encoding import Encoder
from minionerec.data.files import Catalogue, Interaction
from minionerec.data.prompts import RECOMMENDATION, load_prompts
from minionerec.data.sid_tokens import add_sid_tokens, check_sids, sid_responses
from minionerec.errors import InputError
from minionerec.model.loading import load_tokenizer

TOKENS = [[f"<a_{i % 3}>", f"<b_{i % 4}>", f"<c_{i}>"] for i in range(12)]


def catalogue_of(tokens: list[list[str]]) -> Catalogue:
    return Catalogue({}, sorted({t for sid in tokens for t in sid}), {"".join(sid): sid for sid in tokens})


CATALOGUE = catalogue_of(TOKENS)


def lowercasing_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "purchases", "answer", ":", ",", "<", "a"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


TOKENIZERS = {"prepending": prepending_tokenizer, "lowercasing": lowercasing_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def responses(tokenizer, catalogue, ending="", known=True, prompts=None):
    """What a model writes for the SIDs of a catalogue; without `known` only their texts are known."""
    encoder = Encoder(tokenizer, prompts or load_prompts("bolts"), 512)
    sids = list(catalogue.tokens_of)
    ids = sid_responses(encoder, sids, ending, catalogue if known else None, "--model_path X", "train it again")
    return [[i for i in row if i >= 0] for row in ids.tolist()]


def refusal(*args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        responses(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "tokens",
    [
        TOKENS,
        [["<A_1>", "<B_1>"], ["<a_1>", "<b_1>"]],  # differ in what a normalizer may take away
        [["a 1", " b "], ["a 1", "b"], ["ﬁ", "é"], ["fi", "e\u0301"]],
        [["<a", "<a_1", "<a_12>"], ["<a_1", "<b>"]],  # one is the beginning of another
        [["a", "1"], ["sid"]],
    ],
)
def test_every_sid_becomes_its_own_tokens_and_stays_so(tokenizer, tokens, tmp_path):
    catalogue = catalogue_of(tokens)
    before = len(tokenizer)
    add_sid_tokens(tokenizer, catalogue.sid_tokens)
    assert len(tokenizer) - before <= len(catalogue.sid_tokens)
    own = [tokenizer.convert_tokens_to_ids(sid) for sid in tokens]
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    encoder = Encoder(again, load_prompts("bolts"), 512)
    check_sids(encoder, catalogue, "", "")
    for known in (True, False):
        assert responses(tokenizer, catalogue, known=known) == responses(again, catalogue, known=known) == own
    assert [again.convert_tokens_to_ids(sid) for sid in tokens] == own
    for token in again.added_tokens_decoder.values():
        if token.content in catalogue.sid_tokens:
            assert not (token.normalized or token.lstrip or token.rstrip or token.single_word or token.special)

    # In a text, after a prompt as in it: what decoding appends to a prompt is what training saw after it.
    task, sids = encoder.prompts.tasks[RECOMMENDATION], list(catalogue.tokens_of)
    ((prompt, response),) = encoder.encode(task, [Interaction(sids, [], sids[0], "")])
    text = encoder.prompts.render(task, {"sid_history": ", ".join(sids)})
    assert prompt + response == [*again(text + sids[0]).input_ids, again.eos_token_id]
    assert response == [*own[0], again.eos_token_id]


def test_what_was_added_as_text_is_mended_before_training_and_refused_after_it(tmp_path):
    """As a checkpoint of an older release has it."""
    tokenizer = prepending_tokenizer()
    tokenizer.add_tokens(CATALOGUE.sid_tokens)
    tokenizer.save_pretrained(tmp_path / "old")
    old = load_tokenizer(str(tmp_path / "old"))
    ids = old.convert_tokens_to_ids(CATALOGUE.sid_tokens)
    for known in (True, False):
        message = refusal(old, CATALOGUE, known=known)
        assert message.startswith("--model_path X: SID '<a_0><b_0><c_0>' becomes 11 tokens, ['▁<a_0>', '<0x3C>', 'b'")
        assert message.endswith("instead of its own 3; train it again")
    add_sid_tokens(old, CATALOGUE.sid_tokens)
    old.save_pretrained(tmp_path / "new")
    new = load_tokenizer(str(tmp_path / "new"))
    assert new.convert_tokens_to_ids(CATALOGUE.sid_tokens) == ids and len(new) == len(tokenizer)
    assert responses(new, CATALOGUE) == [new.convert_tokens_to_ids(sid) for sid in TOKENS]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized", "special"])
def test_tokens_that_look_at_what_stands_next_to_them(flag):
    tokenizer = prepending_tokenizer()
    added = [AddedToken(token, **{"normalized": False, flag: True}) for token in CATALOGUE.sid_tokens]
    tokenizer.add_tokens(added, special_tokens=flag == "special")
    ids = tokenizer.convert_tokens_to_ids(CATALOGUE.sid_tokens)
    add_sid_tokens(tokenizer, CATALOGUE.sid_tokens)
    assert tokenizer.convert_tokens_to_ids(CATALOGUE.sid_tokens) == ids
    prompts = load_prompts("bolts")
    task = prompts.tasks[RECOMMENDATION]
    glued = replace(prompts, tasks={RECOMMENDATION: replace(task, input="it{sid_history}it")})
    assert responses(tokenizer, CATALOGUE, prompts=glued) == [tokenizer.convert_tokens_to_ids(sid) for sid in TOKENS]


def test_a_sid_that_another_token_takes_apart_is_named():
    # Alone: the first token of one SID and the second together begin like a longer token.
    tokenizer, catalogue = prepending_tokenizer(), catalogue_of([["<a", "1", "2>"], ["<a1"]])
    add_sid_tokens(tokenizer, catalogue.sid_tokens)
    assert "SID '<a12>' becomes 2 tokens, ['<a1', '2>'], instead of its own 3" in refusal(tokenizer, catalogue)
    # In a prompt: by a word of its wording, or by what stands between two SIDs.
    tokenizer = prepending_tokenizer()
    tokenizer.add_tokens([AddedToken("s: <a_0>", normalized=False)])
    add_sid_tokens(tokenizer, CATALOGUE.sid_tokens)
    message = refusal(tokenizer, CATALOGUE)
    assert "SID '<a_0><b_0><c_0>' becomes ['<b_0>', '<c_0>'] in a prompt of task sid_history_to_sid" in message
    tokenizer = prepending_tokenizer()
    tokenizer.add_tokens([AddedToken(", <a_1>", normalized=False)])
    add_sid_tokens(tokenizer, CATALOGUE.sid_tokens)
    message = refusal(tokenizer, CATALOGUE)
    assert "SID '<a_1><b_1><c_1>' becomes" in message and "as '<a_0><b_0><c_0>, <a_1><b_1><c_1>'" in message
    tokenizer = prepending_tokenizer()
    tokenizer.add_tokens([AddedToken(t, normalized=False, single_word=True) for t in CATALOGUE.sid_tokens])
    prompts = load_prompts("bolts")
    glued = replace(prompts.tasks[RECOMMENDATION], input="it{sid_history}")
    message = refusal(tokenizer, CATALOGUE, known=False, prompts=replace(prompts, tasks={RECOMMENDATION: glued}))
    assert "SID '<a_0><b_0><c_0>' becomes ['<b_0>', '<c_0>']" in message


def test_sids_of_another_catalogue_are_named():
    tokenizer = prepending_tokenizer()
    add_sid_tokens(tokenizer, CATALOGUE.sid_tokens)
    other = catalogue_of([*TOKENS, ["<a_0>", "<d_7>"]])
    assert "its tokenizer lacks 1 SID tokens of the index, such as '<d_7>'" in refusal(tokenizer, other)
    message = refusal(tokenizer, other, known=False)
    assert (
        "SID '<a_0><d_7>' becomes 7 tokens, ['<a_0>', '▁', " in message
        and "the tokenizer does not know all of its tokens" in message
    )


def test_a_base_that_knows_no_sid_takes_them_as_text():
    rows = responses(prepending_tokenizer(), CATALOGUE, known=False)
    assert all(len(row) > 10 for row in rows) and len(set(map(tuple, rows))) == len(TOKENS)
    twins, blank = catalogue_of([["<A>"], ["<a>"]]), catalogue_of([["\u00a0"]])
    assert "SID '<a>' becomes the same tokens as another one" in refusal(lowercasing_tokenizer(), twins, known=False)
    assert "becomes no token at all" in refusal(lowercasing_tokenizer(), blank, known=False)


def test_tokens_with_another_meaning_are_no_sid_tokens():
    tokenizer = prepending_tokenizer()
    with pytest.raises(InputError, match=r"SID token '</s>' is the .*_token of the tokenizer; rename it"):
        add_sid_tokens(tokenizer, ["<a_0>", "</s>"])
    assert "<a_0>" not in tokenizer.get_vocab() and tokenizer.added_tokens_decoder[2].special
    assert "or the text after it contains the end-of-sequence token" in refusal(
        tokenizer, catalogue_of([["<unk>", "</s>"]])
    )


def test_what_follows_a_sid_is_written_after_it(tokenizer):
    add_sid_tokens(tokenizer, CATALOGUE.sid_tokens)
    own = [tokenizer.convert_tokens_to_ids(sid) for sid in TOKENS]
    prompts = load_prompts("bolts")
    task = replace(prompts.tasks[RECOMMENDATION], response="{sid}, a a")
    prompts = replace(prompts, tasks={RECOMMENDATION: task})
    for known in (True, False):
        rows = responses(tokenizer, CATALOGUE, task.ending, known, prompts)
        assert [row[:3] for row in rows] == own
        assert len({tuple(row[3:]) for row in rows}) == 1 and len(rows[0]) > 3
        encoder = Encoder(tokenizer, prompts, 512)
        asked = [Interaction(["<a_0><b_0><c_0>"], [], sid, "") for sid in CATALOGUE.tokens_of]
        assert encoder.responses(task, asked) == [[*row, tokenizer.eos_token_id] for row in rows]
    assert "or the text after it contains the end-of-sequence token" in refusal(tokenizer, CATALOGUE, "</s>")
    message = refusal(tokenizer, CATALOGUE, ", a" * 300)
    assert "tokens to write, more than half of cutoff_len 512" in message


def test_what_begins_a_text_begins_every_prompt():
    tokenizer = prepending_tokenizer()
    assert Encoder(tokenizer, load_prompts("x"), 512).start == [tokenizer.bos_token_id]
    assert Encoder(lowercasing_tokenizer(), load_prompts("x"), 512).start == []
    tokenizer.add_tokens(["[gMASK]", "<sop>"], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[gMASK] <sop> $A </s>", None, [("[gMASK]", ids[0]), ("<sop>", ids[1]), ("</s>", 2)]
    )
    assert Encoder(tokenizer, load_prompts("x"), 512).start == ids


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "nothing"}}', "{}"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    prepending_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="no tokenizer can be loaded") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_its_file_is_named(tmp_path):
    """transformers makes one without any words from the model's type."""
    config_of("qwen2").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 5
    with pytest.raises(InputError, match=r"has no vocabulary; is tokenizer.json missing\?"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_is_what_its_file_says(tmp_path):
    """Whatever the type of the model next to it: transformers would make one over bytes of it, which drops spaces."""
    whole = prepending_tokenizer()
    whole.save_pretrained(tmp_path)
    config_of("qwen2").save_pretrained(tmp_path)
    text = "a blue <a_0> bolt\n漢"
    assert "\n" not in AutoTokenizer.from_pretrained(tmp_path).decode(
        AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    )
    assert load_tokenizer(str(tmp_path))(text).input_ids == whole(text).input_ids


def test_no_text_is_cut_or_padded(tmp_path):
    tokenizer = prepending_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(pad_id=2, pad_token="</s>", length=8)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(str(tmp_path))
    add_sid_tokens(loaded, CATALOGUE.sid_tokens)
    assert responses(loaded, CATALOGUE, ", a blue bolt")[0][:3] == loaded.convert_tokens_to_ids(TOKENS[0])
    prompt = Encoder(loaded, load_prompts("bolts"), 512).encode_prompts(
        load_prompts("bolts").tasks[RECOMMENDATION], [Interaction(list(CATALOGUE.tokens_of), [], "", "")], [512]
    )[0]
    assert len(prompt) > 40 and loaded.pad_token_id not in prompt
