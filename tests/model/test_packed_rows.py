"""Completions and their prompts packed into rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import line_of
from models import adapted, make_model
from plain import batch

import lora_utils
from minionerec.decoding.probe import probe
from minionerec.flags import AdapterFlags
from minionerec.model import loading, packed_rows
from minionerec.model.packed_rows import attention_masks, plain_rows, shared_rows
from minionerec.training.logprobs import completion_logps
from minionerec.training.rollouts import Known, Rollouts


def test_completions_of_no_prompts():
    model = adapted("qwen2", True, "lora")
    prompts = torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.bool)
    answers = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool)
    assert [tensor.shape for tensor in completion_logps(model, *prompts, *answers)] == [(0, 2), (0, 2)]
    for pack in (plain_rows, shared_rows):
        _, wanted, place = pack(model, *prompts, *answers)
        assert wanted.shape[0] == place.shape[0] == 0
    nothing = torch.zeros(0)
    known = Known(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, bool)))
    completed, place, share = Rollouts(*prompts, *answers, known, nothing, nothing.sum(), *answers).with_targets()
    assert len(completed.completion_ids) == len(completed.known.groups) == len(place) == len(share) == 0


def test_a_prompt_goes_through_the_model_once():
    model = make_model()
    probe(model)
    seen = []
    model.model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"].shape), with_kwargs=True)
    completion_logps(model, *batch())
    assert seen == [(3, 5 + 3 * 3)]  # three prompts, at most 5 tokens and 3 completions, each without its last token


def test_the_packed_row_of_two_completions():
    names = ["p0", "p1", "a0", "a1", "b0", "b1"]
    ids = {name: i for i, name in enumerate([*names, "a2", "b2"])}
    config = SimpleNamespace(_attn_implementation="sdpa")
    config.get_text_config = lambda: config
    inputs, wanted, row = packed_rows.shared_rows(
        SimpleNamespace(config=config, dtype=torch.float32),
        torch.tensor([[ids["p0"], ids["p1"]]] * 2),
        torch.ones(2, 2, dtype=torch.bool),
        torch.tensor([[ids[f"{completion}{i}"] for i in range(3)] for completion in "ab"]),
        torch.ones(2, 3, dtype=torch.bool),
    )
    drawing = packed_rows.__doc__
    assert line_of(drawing, "sees").split() == [*names, "predicts"]
    assert inputs["input_ids"].tolist() == [[ids[name] for name in names]]
    assert inputs["position_ids"].tolist() == [[int(value) for value in line_of(drawing, "position").split()]]
    sources = wanted[row].tolist()
    predicted = {f"{name}{i}": source for name, of in zip("ab", sources, strict=True) for i, source in enumerate(of)}
    for query, name in enumerate(names):
        cells = line_of(drawing, name).replace(",", "").split()
        assert [cell == "x" for cell in cells[:6]] == (inputs["attention_mask"][0, 0, query] == 0).tolist(), name
        assert cells[6:] == [token for token, source in predicted.items() if source == query], name
        assert (query in wanted) == bool(cells[6:])


@pytest.mark.parametrize("flags", [{"use_qlora": True}, {"use_lora": True, "load_in_8bit": True}], ids=["4", "8"])
def test_masks_have_the_type_of_queries_on_a_quantized_base(tmp_path, flags):
    """Its adapter is in float32, and attention on a GPU takes no mask of another type."""
    make_model().save_pretrained(tmp_path)
    flags = AdapterFlags(**flags)
    model = loading.load_base(str(tmp_path), lora_utils.quantization_config(flags))
    model = lora_utils.add_lora(model, lora_utils.lora_config(model, [90], flags)).eval()
    seen = []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    visible, positions = torch.ones(1, 3, 3, dtype=torch.bool).tril(), torch.arange(3)[None]
    mask = attention_masks(model, visible, positions)
    with torch.no_grad():
        model(input_ids=positions + 5, attention_mask=mask, position_ids=positions, use_cache=False)
    assert seen == [mask.dtype] and mask.dtype != torch.float32
