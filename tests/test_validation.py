"""Values of a record have types and ranges, checked before torch is imported."""

import math

import pytest
from recorded import evaluation, problems_of, record

import evaluate
from minionerec.validation import is_number

FLAGS = [
    ({"flags": {"cutoff_len": 10**9, "use_qlora": "no"}}, "use_qlora is 'no' and must be true or false"),
    ({"flags": {"cutoff_len": 3}}, "cutoff_len is 3 and must be a whole number from 32"),
    ({"flags": {"cutoff_len": 512.0}}, "cutoff_len is 512.0 and must be"),
    ({"flags": {"cutoff_len": True}}, "cutoff_len is True and must be"),
    ({"flags": {"load_in_8bit": 1}}, "load_in_8bit is 1 and must be true or false"),
    ({"flags": {"category": ["x"]}}, "category is ['x'] and must be text"),
    ({"flags": {"eval_file": 5}}, "eval_file is 5 and must be text"),
    ({"flags": {"lora_r": 0}}, "lora_r is 0 and must be a whole number from 1"),
    ({"flags": []}, "flags is [] and must be an object"),
    ({"seconds": "x"}, "seconds is 'x' and must be a number from 0"),
    ({"seconds": -1}, "seconds is -1 and must be a number from 0"),
    ({"peak_memory_gb": "x"}, "peak_memory_gb is 'x' and must be a number from 0"),
    ({"base_fingerprint": 5}, "base_fingerprint is 5 and must be text or null"),
    ({"method": {}}, "method is {} and must be text"),
    ({"prompts": "x"}, "prompts is 'x' and must be an object"),
]


def test_numbers_are_finite():
    """JSON may write one with 400 digits, which no float holds."""
    good = [0, -3, 1.5, 10**300]
    assert all(map(is_number, good)) and not any(map(is_number, [10**400, -(10**400), math.inf, math.nan, True, "1"]))


@pytest.mark.parametrize(("changes", "message"), FLAGS)
def test_recorded_values_have_types_and_ranges(files, tmp_path, changes, message):
    checkpoint = record(tmp_path / "c", **changes)
    (problem,) = problems_of(evaluate.evaluate, **evaluation(files, checkpoint))
    assert problem.startswith(f"{checkpoint}/minionerec.json") and message in problem and "correct it there" in problem
