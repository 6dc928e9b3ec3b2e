import pytest

from minionerec.errors import InputError, Problems


def refuse(*lines: str) -> None:
    raise InputError(list(lines))


def test_problems_of_several_checks_are_reported_together():
    problems = Problems()
    problems.check()  # nothing is wrong yet
    problems.add("one")
    assert problems.attempt(refuse, "two", "three") is None and problems.attempt(max, 1, 2) == 2
    with pytest.raises(InputError) as error:
        problems.check()
    assert error.value.problems == ["one", "two", "three"] and str(error.value) == "one\ntwo\nthree"


def test_an_error_that_is_no_input_error_is_not_gathered():
    problems = Problems()
    with pytest.raises(ZeroDivisionError):
        problems.attempt(divmod, 1, 0)
    assert not problems
