"""Turns your own purchases into the files that training reads: cleaned rows, item embeddings, semantic IDs.

Reads CSV, TSV, JSON and Parquet, compressed or not; also the Amazon Reviews of 2018 and 2023 as published.

    python scripts/prepare_data.py --interactions reviews.json.gz --items meta.json.gz --output_dir data/tools \\
        --category Tools
    DATA=data/tools CATEGORY=Tools bash scripts/pipeline.sh
    python scripts/prepare_data.py --add_items new.json.gz --dataset data/tools --output_dir data/tools_2
    python scripts/prepare_data.py --interactions longer.json.gz --dataset data/tools --output_dir data/tools_3
"""

import os
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli, locks
from minionerec.flags import command
from minionerec.prepare.settings import PrepareFlags

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@command(PrepareFlags)
def prepare_data(flags: PrepareFlags) -> None:
    """Turns purchases and items into the files that training reads, or adds new ones to such a data set."""
    problems = flags.problems()
    if not problems:
        locks.hold("output_dir", flags.output_dir, locks.lock_of_new)
    if flags.adds:
        from minionerec.prepare.extend import extend

        extend(problems, flags)
        print(f"\nwrote {flags.output_dir}")
        return

    from minionerec.prepare.build import build

    build(problems, flags)
    folder, script = flags.output_dir, "scripts/pipeline.sh"
    if os.path.realpath(os.curdir) != os.path.realpath(ROOT):  # where the script's relative paths start
        folder, script = os.path.abspath(folder), os.path.join(ROOT, script)
    settings = f"DATA={shlex.quote(folder)} CATEGORY={shlex.quote(flags.category)}"
    print(f"\nwrote {flags.output_dir}; train on it with: {settings} bash {shlex.quote(script)}")


if __name__ == "__main__":
    cli.run(prepare_data)
