"""Turns your own purchases into the files that training reads: cleaned rows, item embeddings, semantic IDs.

Reads CSV, TSV, JSON lines and Parquet, gzipped or not; also the Amazon Reviews of 2018 and 2023 as published.

    python scripts/prepare_data.py --interactions reviews.json.gz --items meta.json.gz --output_dir data/tools \\
        --category Tools
    DATA=data/tools CATEGORY=Tools bash scripts/pipeline.sh
    python scripts/prepare_data.py --add_items new.json.gz --dataset data/tools --output_dir data/tools_2
"""

import inspect
import os
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli, locks
from minionerec.checkpoint import check_model
from minionerec.errors import Problems
from minionerec.flags import check_new_folder, check_positive

LEVELS, CODES = 8, 65_536  # at most
FOR_ADDING = (
    "add_items",
    "dataset",
    "output_dir",
    "item_column",
    "title_column",
    "description_column",
    "encoder",
    "embeddings",
)


@locks.releasing()
def prepare_data(
    interactions: str = "",
    items: str = "",
    output_dir: str = "",
    category: str = "",
    user_column: str = "",
    item_column: str = "",
    time_column: str = "",
    title_column: str = "",
    description_column: str = "",
    min_interactions: int = 5,
    max_history: int = 10,
    start_date: str = "",
    end_date: str = "",
    split: str = "time",
    encoder: str = "",
    embeddings: str = "",
    levels: int = 3,
    codes: int = 256,
    collisions: str = "move",
    seed: int = 42,
    add_items: str = "",
    dataset: str = "",
) -> None:
    """Prepares a data set, or adds items to one.

    Args:
        interactions: file of purchases, with a user, an item and a time per row.
        items: file of items, with an id, a title and optionally a description per row.
        output_dir: folder to write, in the layout of the release; it must not exist yet.
        category: what the items are, for file names and prompts, such as Industrial_and_Scientific.
        user_column: name of the column with the user, if it is not recognized.
        item_column: name of the column with the item's id, in both files or one of them.
        time_column: name of the column with the time: seconds or milliseconds since 1970, or a date.
        title_column: name of the column with the title.
        description_column: name of the column with the description.
        min_interactions: users and items with fewer interactions are dropped, until all have at least this many
            (k-core).
        max_history: how many of the most recent items of a history are kept.
        start_date: drop earlier interactions: a year, month or day, such as 2016-10.
        end_date: drop later interactions; the year, month or day itself is kept.
        split: time (the last 10% of all rows are for the test, the 10% before them for validation) or last (for each
            user, the last item is for the test, the one before it for validation).
        encoder: folder or hub name of a model that embeds titles and descriptions; default is TF-IDF with SVD.
        embeddings: .npy file with a row for every row of items (or add_items), in the same order.
        levels: number of codes in a semantic ID.
        codes: size of the codebook of each level.
        collisions: what to do with items that share an ID: move (to the nearest free last code), extend (by one more
            code) or keep.
        seed: seed of every random choice; the same input and seed give the same files.
        add_items: file of new items, which get IDs from the codebooks of dataset; old items do not change.
        dataset: folder that this script wrote, for add_items.
    """
    flags = dict(locals())
    problems = Problems()
    check_new_folder(problems, output_dir)
    if not problems:
        locks.hold("output_dir", output_dir, locks.lock_of_new)
    if encoder:
        check_model(problems, "encoder", encoder)
    if encoder and embeddings:
        problems.add("--encoder and --embeddings exclude each other; keep one")
    columns = {role: flags[f"{role}_column"] for role in ("user", "item", "time", "title", "description")}
    if add_items or dataset:
        from minionerec.prepare.extend import add_items as extend

        defaults = {name: parameter.default for name, parameter in inspect.signature(prepare_data).parameters.items()}
        for name in flags:
            if name not in FOR_ADDING and flags[name] != defaults[name]:
                problems.add(f"--{name} is for a new data set; --add_items uses the settings of --dataset")
        extend(problems, add_items, dataset, output_dir, columns, encoder, embeddings)
        print(f"\nwrote {output_dir}")
        return

    from minionerec.prepare.build import build
    from minionerec.prepare.semantic_ids import COLLISIONS
    from minionerec.prepare.writing import check_category

    problems.attempt(check_category, category)
    check_positive(problems, min_interactions=min_interactions, max_history=max_history)
    if not 1 <= levels <= LEVELS:
        problems.add(f"--levels {levels}: must be between 1 and {LEVELS}")
    if not 2 <= codes <= CODES:
        problems.add(f"--codes {codes}: must be between 2 and {CODES}")
    if split not in ("time", "last"):
        problems.add(f"--split {split!r}: must be time or last")
    if collisions not in COLLISIONS:
        problems.add(f"--collisions {collisions!r}: must be one of {', '.join(COLLISIONS)}")
    if not 0 <= seed < 2**32 - LEVELS:
        problems.add(f"--seed {seed}: must be between 0 and {2**32 - LEVELS - 1}")
    build(
        problems,
        interactions,
        items,
        output_dir,
        category,
        columns,
        min_interactions,
        max_history,
        start_date,
        end_date,
        split,
        encoder,
        embeddings,
        levels,
        codes,
        collisions,
        seed,
    )
    settings = f"DATA={shlex.quote(output_dir)} CATEGORY={shlex.quote(category)}"
    print(f"\nwrote {output_dir}; train on it with: {settings} bash scripts/pipeline.sh")


if __name__ == "__main__":
    cli.run(prepare_data)
