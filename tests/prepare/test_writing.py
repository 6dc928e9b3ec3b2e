"""A data set is written atomically, and its record says what was done."""

import json
import os
import signal

import pytest
from raw_bolts import contents, flags_of, review_rows
from raw_files import problems_of

from minionerec.data.files import sha256_of
from minionerec.errors import RunError
from minionerec.prepare import semantic_ids, writing
from scripts.prepare_data import prepare_data


def test_the_record_says_what_was_done(prepared, raw):
    record = json.loads((prepared / "dataset.json").read_text())
    reviews = len(review_rows())
    assert [(step["step"], step["interactions"]) for step in record["interactions"]] == [
        ("read", reviews),
        ("in the time window", reviews),
        ("without duplicates", reviews - 5),
        ("of items with a title", reviews - 7),
        ("3-core", reviews - 7),
    ]
    assert record["items"] == {"rows": 52, "not_wanted": 2, "repeated": 1, "untitled": 1, "refused": 0, "kept": 48}
    assert record["inputs"]["interactions"]["columns"] == {
        "user": "reviewerID",
        "item": "asin",
        "time": "unixReviewTime",
    }
    assert record["inputs"]["items"]["sha256"] == sha256_of(raw["items"])
    assert record["arguments"]["seed"] == 42 and len(record["semantic_ids"]["levels"]) == 3
    assert {*record["files"], "dataset.json"} == set(contents(prepared))
    text = json.dumps(record)
    assert str(prepared) not in text and os.path.dirname(raw["items"]) not in text


def test_a_full_disk_leaves_nothing(raw, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(semantic_ids, "fit", lambda *args: full())
    with pytest.raises(RunError, match=r"a/d cannot be written: .*No space"):
        prepare_data(**flags_of(raw, tmp_path / "a" / "d"))
    assert os.listdir(tmp_path) == []


def test_a_dangling_link_and_a_lost_race_are_refused(log, tmp_path):
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    assert "exists already" in problems_of(prepare_data, **{**log, "output_dir": str(tmp_path / "link")})
    (tmp_path / "made").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "was created in the meantime" in problems_of(
        writing.publish, str(tmp_path / "made"), str(tmp_path / "other")
    )


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """nohup ignores SIGHUP, and the terminal may be closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with writing.scratch_folder(str(tmp_path / "out")) as folder:
            os.kill(os.getpid(), signal.SIGHUP)
            assert os.path.isdir(folder)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_ended_leaves_no_scratch_folder(tmp_path, number):
    under_nohup = signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, writing.scratch_folder(str(tmp_path / "out")) as folder:
        assert os.path.isdir(folder)
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # again, while it is removed
    assert end.value.code == 128 + number and os.listdir(tmp_path) == [] and signal.getsignal(number) == before
    signal.signal(number, under_nohup)
