"""Measures `scripts/prepare_data.py`: seconds, CPU seconds (more reliable on a busy machine) in all and by stage, and
peak memory.

1. With `--release_dir DIR`: on raw reviews and metadata in the form of Amazon Reviews 2018, rebuilt from a release's
   train.csv, valid.csv, test.csv and *.item.json in DIR. The order of each user's purchases is that of the release, the
   times are made up. `--raw_dir` keeps the raw files.
2. Without it: on synthetic raw files of `--items` items and `--interactions` interactions of `--users` users.

    python -m benchmarks.prepare --release_dir data/Industrial_and_Scientific --min_interactions 2
    python -m benchmarks.prepare --items 100000 --interactions 1000000
    python -m benchmarks.prepare --items 50000 --interactions 5000000 --users 500000
"""

import ast
import csv
import gzip
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import in_fresh_process, print_json, print_table
from minionerec import cli
from minionerec.errors import Problems
from minionerec.flags import Flags, above_zero, check_new_folder, command, flag
from minionerec.prepare import cleaning, row_files, semantic_ids, sources, writing
from minionerec.process_memory import peak_rss_gb
from scripts.prepare_data import prepare_data

FIRST, LAST = 1_475_280_000, 1_541_030_400  # 2016-10-01 and 2018-11-01
DAY = 86_400
# The stages that are timed by themselves: functions that `prepare.build` calls, by the names of their columns.
STAGES = {
    "read": (sources, "read_interactions"),
    "order": (cleaning, "order_and_drop_duplicates"),
    "k-core": (cleaning, "k_core"),
    "histories": (cleaning, "rows_of"),
    "IDs": (semantic_ids, "fit"),
    "write": (row_files, "write_rows"),
    "digests": (writing, "write_record"),
}
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def raw_from_release(release: Path, folder: str) -> None:
    """Writes reviews.json.gz and meta.json.gz, from which a release could have been made."""
    metadata = json.loads(next(release.glob("*.item.json")).read_text(encoding="utf-8"))
    ids = {item: f"B{int(item):09d}" for item in metadata}
    purchases: dict[str, list[str]] = {}
    places: dict[tuple[str, int], int] = {}  # of held-out purchases, whose files are in the order of time
    for split in ("train", "valid", "test"):
        with open(release / f"{split}.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                user, past = row["user_id"], [str(item) for item in ast.literal_eval(row["history_item_id"])]
                known = purchases.setdefault(user, past)
                if known[-len(past) :] != past:  # a training row has only the last ten items
                    if split == "train" or len(past) < len(known):
                        continue
                    known[:] = past
                known.append(row["item_id"])
                if split != "train":
                    places[user, len(known) - 1] = len(places)
    rng = random.Random(0)
    border = FIRST + 0.75 * (LAST - FIRST)
    reviews = []
    for user, items in purchases.items():
        held_out = [places[user, i] for i in range(len(items)) if (user, i) in places]
        times = sorted(rng.uniform(FIRST, border) for _ in items[len(held_out) :])
        times += [border + (LAST - border) * place / len(places) for place in held_out]
        for item, when in zip(items, times, strict=True):
            reviews.append((int(when) // DAY * DAY, user, item))
    with gzip.open(os.path.join(folder, "reviews.json.gz"), "wt", encoding="utf-8", compresslevel=1) as file:
        for when, user, item in reviews:
            review = {"overall": 5.0, "verified": True, "reviewTime": time.strftime("%m %d, %Y", time.gmtime(when))}
            review |= {"reviewerID": user, "asin": ids[item], "style": {"Size:": " 1"}, "reviewerName": "A customer"}
            file.write(json.dumps({**review, "reviewText": "Works.", "unixReviewTime": when}) + "\n")
    with gzip.open(os.path.join(folder, "meta.json.gz"), "wt", encoding="utf-8", compresslevel=1) as file:
        for item, fields in metadata.items():
            try:
                description = ast.literal_eval(fields["description"])
            except (ValueError, SyntaxError):
                description = [fields["description"]]
            entry = {"category": ["Industrial & Scientific"], "tech1": "", "description": description, "fit": ""}
            entry |= {"title": fields["title"], "brand": fields.get("brand", "")}
            entry |= {"also_buy": [], "feature": [], "rank": "1"}
            file.write(json.dumps({**entry, "details": {}, "main_cat": "", "price": "", "asin": ids[item]}) + "\n")


def raw_made_up(folder: str, items: int, interactions: int, users: int) -> None:
    """Writes reviews.csv and meta.csv: families of items with similar titles, and random purchases."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(5000)]
    with open(os.path.join(folder, "meta.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "title", "description"])
        for item in range(items):
            if item % 8 == 0:
                family = rng.choices(words, k=5)
            text = [*family, *rng.choices(words, k=4)]
            writer.writerow([f"B{item:09d}", " ".join(text), " ".join(text + rng.choices(words, k=30))])
    with open(os.path.join(folder, "reviews.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "timestamp"])
        for number in range(interactions):
            user, item = number % users, int(items * rng.random() ** 2)
            writer.writerow([f"U{user:011d}", f"B{item:09d}", FIRST + rng.randrange(LAST - FIRST)])


def time_stages() -> dict[str, float]:
    """The CPU seconds of each stage, once it has run. Only for a process that ends afterwards: its functions stay
    replaced."""
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            started = time.process_time()
            result = function(*args, **kwargs)
            seconds[stage] = round(seconds.get(stage, 0) + time.process_time() - started, 1)
            print(f"{stage}: {seconds[stage]} CPU seconds, peak {peak_rss_gb():.2f} GB", flush=True)
            return result

        return call

    for stage, (module, name) in STAGES.items():
        setattr(module, name, timed(stage, getattr(module, name)))
    return seconds


def measured(folder: str, names: tuple[str, str], flags: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak memory of the command and its stages, run in this process."""
    stages = time_stages()
    started = time.perf_counter()
    reviews, meta = (os.path.join(folder, name) for name in names)
    output = os.path.join(folder, "prepared")
    prepare_data(interactions=reviews, items=meta, output_dir=output, category="benchmark", **flags)
    seconds = {"seconds": time.perf_counter() - started, "CPU seconds": time.process_time()}
    return {**seconds, **stages, "peak GB": peak_rss_gb()}


@dataclass(frozen=True, kw_only=True)
class RawFlags(Flags):
    """The raw files, and how they are prepared."""

    release_dir: str = flag(
        "", "folder with train.csv, valid.csv, test.csv and *.item.json, to rebuild raw files from."
    )
    raw_dir: str = flag("", "folder that keeps the raw files of release_dir and the prepared data set.")
    items: int = flag(100_000, "items of synthetic files.", above_zero)
    interactions: int = flag(1_000_000, "interactions of synthetic files.", above_zero)
    users: int = flag(100_000, "users of synthetic files.", above_zero)
    min_interactions: int = flag(5, "as for prepare_data.py.")
    levels: int = flag(3, "as for prepare_data.py.")
    codes: int = flag(256, "as for prepare_data.py.")

    def check(self, problems: Problems) -> None:
        super().check(problems)
        release = Path(self.release_dir)
        if self.release_dir and not all((release / f"{name}.csv").is_file() for name in ("train", "valid", "test")):
            problems.add(f"--release_dir {release}: needs train.csv, valid.csv, test.csv and *.item.json")
        if self.raw_dir:
            check_new_folder(problems, self.raw_dir)


@command(RawFlags)
def benchmark(flags: RawFlags) -> None:
    """Prepares a data set in a new process, and prints its time and memory."""
    flags.problems().check()
    settings = {name: getattr(flags, name) for name in ("min_interactions", "levels", "codes")}
    with tempfile.TemporaryDirectory() as folder:
        if flags.raw_dir:
            folder = flags.raw_dir
            os.makedirs(folder)
        if flags.release_dir:
            raw_from_release(Path(flags.release_dir), folder)
            names, size = ("reviews.json.gz", "meta.json.gz"), {}
        else:
            size = {name: getattr(flags, name) for name in ("items", "interactions", "users")}
            raw_made_up(folder, **size)
            names = "reviews.csv", "meta.csv"
        row = {**size, **in_fresh_process(measured, folder, names, settings)}
    print()
    print_table([row])
    print_json("prepare", table=[row], **settings)


if __name__ == "__main__":
    cli.run(benchmark)
