"""The rows that new SID tokens start with."""

import pytest
import torch
from helpers import newest, sft_flags, tensors_of
from transformers import AutoModelForCausalLM

import sft
from minionerec.data.files import read_catalogue
from minionerec.model import int8_rows, loading
from minionerec.model.sid_start import start_sid_rows


def started(files, base, way, quantized=False, untied=False):
    """Rows of both ends of a model before and after its SID rows were started one way; tokenizer, catalogue."""
    catalogue = read_catalogue(files["index"], files["item"])
    tokenizer, model = loading.load_tokenizer(base), loading.load_base(base)
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    if quantized:
        int8_rows.quantize_embeddings(model.requires_grad_(False), torch.device("cpu"))
    loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    every = torch.arange(len(tokenizer))
    before = [end.weight[every].detach().clone() for end in ends]
    start_sid_rows(model, tokenizer, catalogue.sid_tokens, catalogue, way)
    return before, [end.weight[every].detach().clone() for end in ends], tokenizer, catalogue


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "8 bits"])
def test_rows_from_titles_are_the_mean_of_their_items(files, base, quantized, untied):
    before, after, tokenizer, catalogue = started(files, base, "text", quantized, untied)
    ids = tokenizer.convert_tokens_to_ids(catalogue.sid_tokens)
    for old, new in zip(before, after, strict=True):
        for token in catalogue.sid_tokens:
            titles = [item.title for item in catalogue.items.values() if token in catalogue.tokens_of[item.sid]]
            means = [old[tokenizer(title, add_special_tokens=False)["input_ids"]].mean(dim=0) for title in titles]
            want, got = torch.stack(means).mean(dim=0), new[tokenizer.convert_tokens_to_ids(token)]
            step = want.abs().max() / 127 if quantized else 0
            torch.testing.assert_close(got, want, atol=float(0.51 * step) + 1e-6, rtol=1e-5)
        others = sorted(set(range(len(tokenizer))) - set(ids))
        assert torch.equal(old[others], new[others])
    assert torch.equal(after[0], after[1]) != untied


def test_mean_and_random_rows(files, base):
    before, after, tokenizer, catalogue = started(files, base, "mean")
    ids = tokenizer.convert_tokens_to_ids(catalogue.sid_tokens)
    words = [token for token in range(len(tokenizer)) if token not in ids]
    torch.testing.assert_close(after[0][ids], before[0][words].mean(dim=0).expand(len(ids), -1))
    before, after, *_ = started(files, base, "random")
    assert torch.equal(before[0], after[0])


def test_tokens_whose_items_have_no_title_get_the_mean_row(files, base):
    catalogue = read_catalogue(files["index"])
    tokenizer, model = loading.load_tokenizer(base), loading.load_base(base)
    loading.add_sid_tokens(model, tokenizer, catalogue.sid_tokens)
    start_sid_rows(model, tokenizer, catalogue.sid_tokens, catalogue, "text")
    rows = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(catalogue.sid_tokens)]
    assert torch.equal(rows, rows[:1].expand_as(rows))


@pytest.mark.parametrize("method", [{}, {"use_lora": True}, {"use_qlora": True}, {"freeze_LLM": True}], ids=str)
def test_a_run_starts_from_them(files, base, tmp_path, method):
    """At a rate of almost 0 the saved rows are those of the start."""
    rows = {}
    for way in ("text", "random"):
        output = tmp_path / way
        sft.train(**sft_flags(files, base, output, **method, learning_rate=1e-12, sid_init=way))
        tensors = tensors_of(newest(output) if "freeze_LLM" in method else output / "final_checkpoint")
        rows[way] = next(t for name, t in tensors.items() if "token_adapter" in name or "embed_tokens" in name)
    _, after, tokenizer, catalogue = started(files, base, "text")
    ids = tokenizer.convert_tokens_to_ids(catalogue.sid_tokens)
    got = rows["text"][ids] if len(rows["text"]) == len(tokenizer) else rows["text"]
    want = after[0][ids]
    atol = 0.01 * float(want.abs().max()) if "use_qlora" in method else 1e-6
    torch.testing.assert_close(got.float(), want.float(), atol=atol, rtol=0)
    assert not torch.allclose(rows["random"].float(), rows["text"].float(), atol=0.01)


def test_rows_that_a_base_has_are_kept(files, base, tmp_path):
    """SFT from a whole checkpoint of another run does not forget its SID rows."""
    sft.train(**sft_flags(files, base, tmp_path / "first", learning_rate=1e-2))
    first = str(tmp_path / "first" / "final_checkpoint")
    sft.train(**sft_flags(files, first, tmp_path / "second", learning_rate=1e-12, sid_init="text"))
    models = [
        AutoModelForCausalLM.from_pretrained(str(tmp_path / run / "final_checkpoint")) for run in ("first", "second")
    ]
    torch.testing.assert_close(*[model.get_input_embeddings().weight.float() for model in models])
