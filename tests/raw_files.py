"""Raw files of interactions and items, and the readers of the package on one of them."""

import random
from pathlib import Path

import pytest

from minionerec.errors import InputError
from minionerec.prepare import cells, cleaning, sources
from minionerec.prepare.build import ITEM_ROLES
from minionerec.prepare.columns import find_columns
from minionerec.prepare.recognize import open_source

T0 = 1_500_000_000
ROWS = [("1", "Ä", T0), ("2", "7", T0 + 60), ("1", "9", T0 + 86400)]
ALWAYS = (0, cells.LATEST)
BAD_CSV = [
    b'a,"5,1500000000',  # opens a quote
    b'"a,5,1500000000',
    b'a,"5"x,1500000000',
    b"a,5",
    b"a,5,1500000000,9",
    b",5,1500000000",
    b",,",
    b'"","",""',
    b"nan,5,1500000000",
    b"a,,1500000000",
    b"a,1.2345678901234568e+17,1500000000",
    b"a,5,soon",
    b"a,5,",
    b"\xff,5,1500000000",
]


def read_raw(path, wanted=None, layout=None, **given):
    """The interactions of a file, part by part, as (user, item, microseconds), what was read, and what was refused."""
    wanted = wanted or sources.Wanted()
    source = open_source(str(path), "interactions", layout)
    spool = cleaning.Spool(f"{path}.{random.random()}", cleaning.INTERACTION)
    raw, refused = sources.read_all(
        source,
        lambda: find_columns(source, wanted.roles, given),
        lambda columns: sources.read_interactions(source, columns, wanted, spool),
    )
    users, items = list(raw.users), list(raw.items)
    return [(users[u], items[i], t) for part in spool for u, i, t in part.tolist()], raw, refused


def read_seconds(path, wanted=None, layout=None, **given):
    """As `read_raw`, with the times in seconds."""
    rows, raw, refused = read_raw(path, wanted, layout, **given)
    return [(user, item, time / 1e6) for user, item, time in rows], raw, refused


def read(path, window=ALWAYS, **given) -> list[tuple[str, str, int]]:
    """The interactions of a file alone."""
    return read_raw(path, sources.Wanted(window), **given)[0]


def read_items(path, wanted=lambda item: True, skip=False, layout=None, **given):
    """The items of a file, how many rows became what, and what was refused."""
    source = open_source(str(path), "items", layout)
    return sources.read_all(
        source,
        lambda: find_columns(source, ITEM_ROLES, given),
        lambda columns: sources.read_items(source, columns, wanted, skip),
    )


def table(delimiter=",", header=True, rows=ROWS, end="\n") -> str:
    lines = [("user", "item", "time")] * header + rows
    return "".join(delimiter.join(map(str, row)) + end for row in lines)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problems_of(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert all("\n" not in problem and len(problem) < 1000 for problem in error.value.problems)
    return "\n".join(error.value.problems)
