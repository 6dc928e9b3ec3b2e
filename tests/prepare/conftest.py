"""Raw files of a store, a log of views and purchases, and a data set: made once."""

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from helpers import encoded
from raw_bolts import flags_of, item_rows, review_rows
from raw_files import written

from scripts.prepare_data import prepare_data


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> dict[str, str]:
    """Raw reviews, items and new items."""
    folder = tmp_path_factory.mktemp("raw")
    new = [
        {"asin": "N1", "title": "Steel hex bolt, pack of 900", "description": ["A hex bolt.", "Of steel."]},
        {"asin": "N2", "title": item_rows()[3]["title"], "description": item_rows()[3]["description"]},
        {"asin": "B005", "title": "There already"},
        {"asin": "N3", "title": ""},
    ]
    contents = {"interactions": review_rows(), "items": item_rows(), "add_items": new}
    paths = {}
    for name, rows in contents.items():
        paths[name] = str(folder / f"{name}.json.gz")
        Path(paths[name]).write_bytes(encoded(rows, "json", zipped=True))
    return paths


@pytest.fixture(scope="session")
def prepared(raw, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data" / "bolts"
    prepare_data(**flags_of(raw, folder))
    return folder


@pytest.fixture
def log(tmp_path) -> dict[str, str]:
    """Views and purchases of 20 users, each item viewed before it is bought, in two sessions."""
    rng = random.Random(0)
    lines = ["user;item;when;what;stars"]
    for user in range(20):
        for step in range(8):
            day = datetime(2018, 1, 1 + step // 4, 10, step % 4 * 5, tzinfo=UTC)
            item = (user + step * rng.choice([1, 2])) % 12
            lines += [f"u{user};{item};{day:%m/%d/%Y %H:%M};{what};{1 + step % 5}" for what in ("view", "buy")]
    lines.append("u0;;01/01/2018 09:00;buy;5")
    written(tmp_path / "log.csv", "\n".join(lines))
    written(
        tmp_path / "items.tsv",
        "id\tname\n" + "\n".join(f"{i}\tRed {['nut', 'bolt'][i % 2]} {i}" for i in range(12)),
    )
    files = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.tsv")}
    times = {"time_column": "when", "time_format": "%m/%d/%Y %H:%M"}
    return {**files, **times, "category": "T", "codes": 4, "output_dir": str(tmp_path / "out")}
