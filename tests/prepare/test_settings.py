"""The flags of scripts/prepare_data.py are checked, and all problems come together."""

import numpy as np
import pytest
from helpers import ROOT
from raw_bolts import flags_of, refused
from raw_files import problems_of

from scripts.prepare_data import prepare_data


def test_flags_that_do_nothing_are_refused(log):
    told = problems_of(
        prepare_data,
        **log,
        time_zone="Mars/Base",
        event_column="what",
        delimiter='"',
        encoding="klingon",
        session_gap=-1.0,
    )
    for message in (
        "--time_zone 'Mars/Base': is no time zone",
        "--event_column: without --events it does nothing",
        "--delimiter '\"': must not contain quotes",
        "--encoding klingon: is unknown",
        "--session_gap -1.0: must be 0 or more",
    ):
        assert message in told


BAD = [
    ({"category": ""}, "--category is missing"),
    ({"category": "../x"}, "--category '../x': is used in file names"),
    ({"min_interactions": 0}, "--min_interactions 0: must be above 0"),
    ({"max_history": 0}, "--max_history 0: must be above 0"),
    ({"levels": 0}, "--levels 0: must be between 1 and 8"),
    ({"codes": 1}, "--codes 1: must be between 2 and 65536"),
    ({"purchase_share": 1.0}, "--purchase_share 1.0: must be at least 0 and below 1"),
    ({"purchase_share": float("nan")}, "--purchase_share nan: must be at least 0 and below 1"),
    ({"split": "random"}, "--split 'random': must be time or last"),
    ({"collisions": "drop"}, "--collisions 'drop': must be one of move, extend, keep"),
    ({"seed": -1}, "--seed -1: must be between 0"),
    ({"start_date": "May"}, "--start_date 'May': expected a year, a month or a day"),
    (
        {"start_date": "2019"},
        "none of its 546 rows is between --start_date and --end_date; they are from 2017-07-14 to",
    ),
    ({"min_interactions": 50}, "--min_interactions 50: leaves nothing of 539 interactions of 60 users with 48 items"),
    ({"interactions": ""}, "--interactions is missing"),
    ({"items": "nowhere.csv"}, "--items nowhere.csv: no such file"),
    ({"items": "."}, "--items .: is a folder, not a file"),
    ({"encoder": "./nowhere"}, "--encoder ./nowhere: no such folder"),
    ({"embeddings": "nowhere.npy"}, "--embeddings nowhere.npy: cannot be read"),
    ({"output_dir": str(ROOT)}, "exists already; name another folder"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[next(iter(flags)) for flags, _ in BAD])
def test_bad_flags(raw, tmp_path, flags, message):
    refused({**flags_of(raw, tmp_path / "d"), **flags}, message)


def test_all_problems_come_together(tmp_path):
    (tmp_path / "reviews").write_text("who,item,time\nu,i,1\n")
    (tmp_path / "items").write_text('{"item": "i", "title": {"en": "T"}}\n{"item": null, "title": "T"}\n')
    np.save(tmp_path / "e.npy", np.ones(3))
    flags = {
        "interactions": str(tmp_path / "reviews"),
        "items": str(tmp_path / "items"),
        "output_dir": str(tmp_path / "d"),
    }
    refused(
        {**flags, "embeddings": str(tmp_path / "e.npy"), "encoder": "./nowhere", "levels": 9},
        "--encoder ./nowhere",
        "exclude each other",
        "--category is missing",
        "--levels 9",
        "no column is recognized as the user",
        "row 1, title: expected text or a list of texts, found {'en': 'T'}",
        "row 2, item: expected an item id, text or a whole number, found None",
        "e.npy: cannot be read",
    )
