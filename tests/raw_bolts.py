"""The raw files of a hardware store, and the data set that scripts/prepare_data.py makes of them."""

import os
import random
from pathlib import Path

import pytest
from helpers import read_rows

from minionerec.errors import InputError
from minionerec.prepare import writing
from scripts.prepare_data import prepare_data

KINDS = ["hex bolt", "wood screw", "lock nut", "flat washer", "epoxy resin", "super glue", "masking tape", "wire brush"]


ADJECTIVES = ["steel", "brass", "nylon", "zinc", "heavy", "small"]


CATEGORY = "Nuts & Bolts"


def item_rows() -> list[dict]:
    """48 items in the form of the Amazon metadata of 2018, some hostile, and four that must go."""
    items = [
        {
            "asin": f"B{i:03d}",
            "title": f"{a.title()} {k}, pack of {i}",
            "description": [f"A {k}.", f"Of {a}."],
            "brand": "O'D",
        }
        for i, (k, a) in enumerate((k, a) for k in KINDS for a in ADJECTIVES)
    ]
    items[0]["title"] = 'Tab\there, line\nthere, 5" "quoted" d\'Été <a_1><b_2><c_3> 🔩 螺丝'
    items[1]["title"] = items[2]["title"] = items[3]["title"]
    items[1]["description"] = items[2]["description"] = items[3]["description"]
    items[4]["description"] = "long " * 20_000
    items[5]["description"] = None
    items[7]["title"] = "Escaped &amp;lt;twice&amp;gt;"
    return [
        *items,
        {"asin": "B000", "title": "Again"},
        {"asin": "B900", "title": "Nobody bought it"},
        {"asin": "B901", "title": " "},
        {"asin": "B902"},
    ]


def review_rows() -> list[dict]:
    """60 users with 6 to 12 purchases, with duplicates and items that are not described."""
    rng = random.Random(0)
    reviews = []
    for user in range(60):
        for step in range(rng.randint(6, 12)):
            item = (user * 5 + step * rng.choice([1, 1, 2])) % 48
            when = 1_500_000_000 + rng.randrange(10**7)
            reviews.append({"reviewerID": f"A{user}", "asin": f"B{item:03d}", "unixReviewTime": when, "overall": 5.0})
    reviews += [*reviews[:5], {**reviews[0], "asin": "B901"}, {**reviews[0], "asin": "B999"}]
    return reviews


def flags_of(raw, output_dir, **more) -> dict:
    paths = {name: raw[name] for name in ("interactions", "items")}
    return {**paths, "output_dir": str(output_dir), "category": CATEGORY, "codes": 8, "min_interactions": 3, **more}


def path_of(folder: Path, name: str) -> str:
    return str(folder / writing.files_of(CATEGORY)[name])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def csv_rows(folder: Path, split: str) -> list[dict]:
    return read_rows(path_of(folder, split))


def refused(flags: dict, *messages: str) -> None:
    """The command refuses, in as many lines as messages, and leaves nothing."""
    output = Path(flags["output_dir"])
    there = sorted(os.listdir(output.parent))
    with pytest.raises(InputError) as error:
        prepare_data(**flags)
    problems = error.value.problems
    assert len(problems) == len(messages), problems
    for message, problem in zip(messages, problems, strict=True):
        assert message in problem and "\n" not in problem
    assert sorted(os.listdir(output.parent)) == there
