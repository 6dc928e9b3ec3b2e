"""Builds a new data set: from raw files to a folder in the layout of the release."""

import contextlib
import os
import platform
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from minionerec.data.files import sha256_of, shorten
from minionerec.errors import InputError, Problems
from minionerec.prepare import cleaning, item_embeddings, row_files, semantic_ids, sources, writing
from minionerec.prepare.co_purchases import CoPurchases, joined
from minionerec.prepare.columns import find_columns
from minionerec.prepare.formats import Source
from minionerec.prepare.recognize import Layout, open_source
from minionerec.prepare.settings import PrepareFlags
from minionerec.version import __version__

ITEM_ROLES = ("item", "title", "description", "features", "brand", "categories", "price")
GUEST, GUEST_SHARE, GUEST_TIMES = 1000, 0.01, 100  # interactions of one user, of all, and of the mean, before a line
MOST_MOVED = 0.05  # of the items, before a line warns
SOFTWARE = ("numpy", "pyarrow", "scikit-learn", "scipy")
# The flags that dataset.json records as its arguments.
ARGUMENTS = (
    *("time_format", "time_zone", "events", "min_rating", "drop_repeats", "session_gap", "min_interactions"),
    *("max_history", "start_date", "end_date", "split", "text_columns"),
    *("purchase_share", "levels", "codes", "collisions", "seed"),
)


def layout_of(flags: PrepareFlags) -> Layout:
    """What the flags say about text files. Raises InputError for what cannot be."""
    names = {part.strip() for name in flags.columns.values() for part in (name, *name.split(","))} - {""}
    return Layout(flags.delimiter, flags.no_header, flags.encoding, frozenset(names))


@dataclass(frozen=True)
class ReadItems:
    """The items of a file.

    Attributes:
        source, columns: the file, and the columns of ITEM_ROLES.
        items, counts: as `sources.read_items` returns them.
        vectors: the rows of --embeddings that belong to the items, [items, d]; None without that flag.
        lines: about how it was read.
        lost_zeros: what `LostZeros` says about the ids.
    """

    source: Source
    columns: list[str | None]
    items: list[sources.RawItem]
    counts: dict[str, int]
    vectors: np.ndarray | None
    lines: list[str]
    lost_zeros: str = ""


def read_items(
    problems: Problems, flags: PrepareFlags, flag: str, wanted: Callable[[str], bool], other: Source | None = None
) -> ReadItems | None:
    """The items of the file that `flag` names, and their rows of --embeddings; None where `problems` says why not.

    Args:
        wanted: whether an item with this id counts.
        other: the file of interactions, whose columns may have the names that flags give.
    """
    layout = problems.attempt(layout_of, flags)
    source = problems.attempt(open_source, getattr(flags, flag), flag, layout)
    read = None
    if source:

        def find() -> list[str | None]:
            return find_columns(source, ITEM_ROLES, flags.columns, other.names if other else ())

        def read_them(columns: list[str | None]) -> tuple:
            return columns, *sources.read_items(source, columns, wanted, flags.skip_bad_rows)

        read = problems.attempt(sources.read_all, source, find, read_them)
    matrix = problems.attempt(item_embeddings.open_embeddings, flags.embeddings) if flags.embeddings else None
    if source is None or read is None:
        return None
    columns, items, counts, refused = read
    if flags.text_columns != PrepareFlags.text_columns:  # by default, a description is used if there is one
        for role in texts_without_column(flags.text_columns, columns):
            problems.add(f"--text_columns {flags.text_columns}: {source.path} has no {no_text(role)}")
    vectors = None
    if matrix is not None:
        rows = [item.row for item in items]
        vectors = problems.attempt(item_embeddings.rows_of_embeddings, flags.embeddings, matrix, counts["rows"], rows)
    return ReadItems(source, columns, items, counts, vectors, sources.summary(source, refused, columns))


@dataclass(frozen=True)
class ReadInteractions:
    """The interactions of a file: `source`, the `columns` of `roles`, what was read, and lines about how."""

    source: Source
    roles: tuple[str, ...]
    columns: list[str | None]
    raw: sources.RawInteractions
    lines: list[str]


def read_interactions(
    problems: Problems, flags: PrepareFlags, source: Source, other: Source | None, spool: cleaning.Spool
) -> ReadInteractions | None:
    """Reads the interactions of a file into `spool`; None where `problems` says why not."""
    zone = flags.zone if not any(problem.startswith("--time_zone") for problem in problems) else UTC
    window = problems.attempt(cleaning.time_window, flags.start_date, flags.end_date, zone)
    wanted = sources.Wanted(
        window=window or (0, sources.LATEST),
        events=flags.wanted_events,
        min_rating=flags.min_rating,
        time_format=flags.time_format,
        zone=zone,
        skip_bad_rows=flags.skip_bad_rows,
    )

    def find() -> list[str | None]:
        return find_columns(source, wanted.roles, flags.columns, other.names if other else ())

    def read(columns: list[str | None]) -> tuple:
        return columns, *sources.read_interactions(source, columns, wanted, spool)

    found = problems.attempt(sources.read_all, source, find, read)
    if found is None:
        return None
    columns, raw, refused = found
    return ReadInteractions(source, wanted.roles, columns, raw, sources.summary(source, refused, columns))


@dataclass(frozen=True)
class Step:
    """What is left after a step of the cleaning; None where it was not counted."""

    step: str
    interactions: int
    users: int | None = None
    items: int | None = None

    def to_json(self) -> dict[str, object]:
        """What dataset.json records."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def build(problems: Problems, flags: PrepareFlags) -> dict[str, object]:
    """Prepares a data set, prints the steps, and returns the record that is written to dataset.json.

    Args:
        problems: the problems of the flags, to which those of the files are added.

    Raises InputError for unusable input; then nothing is written.
    """
    with writing.scratch_folder(flags.output_dir) as scratch:
        spool = cleaning.Spool(os.path.join(scratch, "interactions"), cleaning.INTERACTION)

        # Read all files, and report all problems together.
        bought, sold = _read(problems, flags, spool)
        raw, catalogue, found, vectors = bought.raw, sold.items, sold.counts, sold.vectors
        print("\n".join([*bought.lines, *sold.lines]))

        # Clean.
        steps = [Step(step, left) for step, left in raw.steps.items()]
        sessions = _clean(spool, raw, sold, flags, steps)
        alive = cleaning.k_core(spool, len(raw.items), flags.min_interactions)
        while flags.drop_repeats and cleaning.drop_repeats(spool):  # an item between two equal ones may be gone
            alive = cleaning.k_core(spool, len(raw.items), flags.min_interactions)
        _note_core(spool, raw, flags, steps)
        kept = [place for place, item in enumerate(catalogue) if alive[raw.items[item.original_id]]]
        catalogue = [catalogue[place] for place in kept]
        item_ids: np.ndarray = np.full(len(raw.items), -1, np.int32)
        item_ids[[raw.items[item.original_id] for item in catalogue]] = np.arange(len(catalogue))
        rows, sizes = cleaning.rows_of(spool, os.path.join(scratch, "rows"), item_ids, flags.max_history, flags.split)
        print_steps(raw, steps)
        print(
            f"items: {found['rows']:,} read; {found['not_wanted']:,} without interactions, {found['untitled']:,} "
            f"without a title and {found['repeated']:,} with a repeated id were left out"
        )
        print("rows: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()))

        # Embed the items, and give them codes.
        texts = texts_of(catalogue, flags.text_columns)
        text_model, made_by = None, {"kind": "tfidf"}
        if vectors is not None:
            vectors, made_by = vectors[kept], {"kind": "embeddings", "sha256": sha256_of(flags.embeddings)}
        elif flags.encoder:
            vectors, made_by = item_embeddings.embed_with_model(flags.encoder, texts), encoder_of(flags.encoder)
        else:
            text_model = item_embeddings.TextModel.fit(texts, flags.seed)
            vectors = text_model.embed(texts)
        training = None
        if flags.purchase_share:
            batches = cleaning.in_time_order(rows, sum(sizes.values()), flags.split)
            training = CoPurchases.count(batches, len(catalogue), sizes["train"], flags.seed)
        codebooks, final, made = _give_ids(flags, vectors, training)

        # Write.
        folder = os.path.join(scratch, "dataset")
        os.mkdir(folder)
        index = writing.index_of(final)
        metadata = {str(i): writing.metadata_of(item) for i, item in enumerate(catalogue)}
        writing.write_catalogue(folder, flags.category, index, metadata, vectors, codebooks, text_model)
        batches = cleaning.in_time_order(rows, sum(sizes.values()), flags.split)
        sids, titles = ["".join(sid) for sid in index.values()], [item.title for item in catalogue]
        users = cleaning.session_names(list(raw.users), sessions) if flags.session_gap else list(raw.users)
        paths = [os.path.join(folder, writing.files_of(flags.category)[split]) for split in cleaning.SPLITS]
        row_files.write_rows(paths, batches, users, sids, titles)
        record: dict[str, object] = {
            "category": flags.category,
            "arguments": {name: getattr(flags, name) for name in ARGUMENTS},
            "inputs": {
                "interactions": input_of(bought.source, bought.roles, bought.columns),
                "items": input_of(sold.source, ITEM_ROLES, sold.columns),
            },
            "interactions": [
                {"step": "read", "interactions": raw.num_rows - raw.refused, "refused": raw.refused},
                *(step.to_json() for step in steps),
            ],
            "items": {**found, "kept": len(catalogue)},
            "rows": sizes,
            "latest": cleaning.latest(spool),
            "embeddings": {**made_by, "width": vectors.shape[1]},
            "semantic_ids": made,
            "software": software(),
        }
        writing.write_record(folder, record)
        writing.publish(folder, flags.output_dir)
    return record


def _give_ids(
    flags: PrepareFlags, vectors: np.ndarray, training: CoPurchases | None
) -> tuple[np.ndarray, list[tuple[int, ...]], dict[str, Any]]:
    """Gives codes to the items: by their texts, `vectors` [items, d], and by their co-purchases, if those count.

    Returns codebooks [L, K, d + p], the codes of each item, and what dataset.json records about them.
    """
    num_items, trust, used = len(vectors), None, None
    if training and (shares := training.trust()).any():
        purchases = training.embed(flags.seed)
        vectors, trust = joined(vectors, purchases, shares, flags.purchase_share)
        used = {"items": int((shares > 0).sum()), "width": purchases.shape[1]}
        print(f"IDs: from texts and co-purchases, which {used['items']:,} of {num_items:,} items have")
    else:
        print(f"IDs: from texts only{', because no training row has two different items' if training else ''}")
    codebooks, assigned, residual = semantic_ids.fit(vectors, flags.levels, flags.codes, flags.seed, trust)
    report = semantic_ids.level_report(assigned)
    final, resolved = semantic_ids.resolve_collisions(assigned, residual, codebooks[-1], flags.collisions, trust=trust)
    before, after = (semantic_ids.explained(vectors, codebooks, codes, trust) for codes in (assigned, final))
    print_levels(report, flags.codes, num_items, flags.collisions, resolved)
    print(f"the codes explain {before:.1%} of the variance of the items, {after:.1%} after collisions are resolved")
    _print_advice(flags.levels, flags.codes, num_items, resolved)
    explained = {"before_collisions": before, "after_collisions": after}
    return codebooks, final, {"levels": report, **resolved, "explained": explained, "co_purchases": used}


def texts_without_column(texts: str, columns: Sequence[str | None]) -> list[str]:
    """Those of the `texts` that IDs are made of, separated by commas, that none of the columns of ITEM_ROLES has."""
    found = {role for role, name in zip(ITEM_ROLES, columns, strict=True) if name is not None}
    return [
        text for text in texts.split(",") if text not in found and not (text == "description" and "features" in found)
    ]


def no_text(role: str) -> str:
    """What a file without the text of a role lacks, and what to do."""
    remedy = "name it with --description_column" if role == "description" else f"call the column {role} in the file"
    return f"column that is recognized as the {role}; {remedy}"


def texts_of(items: Sequence[sources.RawItem], columns: str) -> list[str]:
    """What the IDs of items are made of: these columns, a line each."""
    return ["\n".join(getattr(item, column) for column in columns.split(",")) for item in items]


def _read(problems: Problems, flags: PrepareFlags, spool: cleaning.Spool) -> tuple[ReadInteractions, ReadItems]:
    """Both files. Raises InputError with all problems of flags and files."""
    layout = problems.attempt(layout_of, flags)
    source = problems.attempt(open_source, flags.interactions, "interactions", layout)
    other = None
    if source and flags.items:
        with contextlib.suppress(InputError):  # `read_items` says it
            other = open_source(flags.items, "items", layout)
    bought = read_interactions(problems, flags, source, other, spool) if source else None
    known = bought.raw.items if bought else {}
    zeros = LostZeros(known)
    sold = read_items(problems, flags, "items", zeros.wanted, source)
    unique = list(dict.fromkeys(problems))
    if unique:
        raise InputError(unique)
    assert bought and sold  # nothing was wrong
    return bought, replace(sold, lost_zeros=zeros.remedy())


class LostZeros:
    """Notices ids of another file that are known ones but for leading zeros, which programs drop that take ids for
    numbers: 00012 becomes 12."""

    def __init__(self, known: Collection[str]):
        self.known, self._met, self._other = known, set[str](), dict[str, str]()
        self._bare = {item.lstrip("0"): item for item in known if item.startswith("0")}

    def wanted(self, item: str) -> bool:
        """Whether an id of the other file is known."""
        if item in self.known:
            self._met.add(item)
            return True
        bare = item.lstrip("0")
        ours = bare if bare in self.known else self._bare.get(bare)
        if ours is not None and bare.isdigit():
            self._other.setdefault(ours, item)
        return False

    def remedy(self) -> str:
        """How many known ids the other file has in another form only, and what to do; or ""."""
        lost = [(ours, other) for ours, other in self._other.items() if ours not in self._met]
        if not lost:
            return ""
        ours, other = lost[0]
        return f"{len(lost):,} differ by leading zeros only, such as {ours!r} and {other!r}; write them alike"


def _clean(
    spool: cleaning.Spool,
    raw: sources.RawInteractions,
    sold: ReadItems,
    flags: PrepareFlags,
    steps: list[Step],
) -> np.ndarray:
    """Drops interactions that do not count, before the k-core, and adds the counts after each step to `steps`. Returns
    the user of each session, if there are any."""
    note = partial(note_step, spool, raw, steps)
    if not note("in the time window"):
        if raw.earliest > raw.latest:
            raise InputError(f"--interactions {flags.interactions}: none of its {raw.num_rows} rows can be used")
        first, last = (datetime.fromtimestamp(time / 1e6, flags.zone).date() for time in (raw.earliest, raw.latest))
        raise InputError(
            f"--interactions {flags.interactions}: none of its {raw.num_rows} rows is between --start_date and "
            f"--end_date; they are from {first} to {last}"
        )
    cleaning.order_and_drop_duplicates(spool)
    note("without duplicates")
    _note_guests(spool, raw, steps[-1])
    known: np.ndarray = np.zeros(len(raw.items), bool)
    known[[raw.items[item.original_id] for item in sold.items]] = True
    cleaning.keep_items(spool, known)
    if not note("of items with a title"):
        remedy = sold.lost_zeros or "do the two files belong together? Name the column of the ids with --item_column"
        raise InputError(
            f"--items {flags.items}: has a title for none of the {len(raw.items)} items of {flags.interactions}, such "
            f"as {next(iter(raw.items))!r}; {remedy}"
        )
    if sold.lost_zeros:
        print(f"warning: ids of {flags.interactions} that have no title in {flags.items}: {sold.lost_zeros}")
    sessions: np.ndarray = np.empty(0, np.int32)
    if flags.session_gap:  # before repeats are dropped, which may bridge a gap
        sessions = cleaning.split_sessions(spool, round(min(flags.session_gap * 60e6, sources.LATEST)))
        note(f"in sessions ({flags.session_gap:g} min)")
    if flags.drop_repeats:
        cleaning.drop_repeats(spool)
        note("without repeats")
    return sessions


def _note_guests(spool: cleaning.Spool, raw: sources.RawInteractions, step: Step) -> None:
    """Prints a note if one user has so many of the interactions that many people may be behind it."""
    busiest, count = cleaning.busiest(spool)
    if count > max(GUEST, GUEST_SHARE * step.interactions, GUEST_TIMES * step.interactions / (step.users or 1)):
        print(
            f"note: {count:,} of {step.interactions:,} interactions are of user {shorten(list(raw.users)[busiest])}; "
            "if that stands for all guests of a shop, as 0 often does, leave its rows out of the log"
        )


def note_step(spool: cleaning.Spool, raw: sources.RawInteractions, steps: list[Step], step: str) -> int:
    """Adds what is left after a step, and returns the number of interactions."""
    steps.append(Step(step, **cleaning.counts_of(spool, len(raw.items))))
    return steps[-1].interactions


def _note_core(spool: cleaning.Spool, raw: sources.RawInteractions, flags: PrepareFlags, steps: list[Step]) -> None:
    """Adds what the k-core left. Raises InputError if that is nothing."""
    if not note_step(spool, raw, steps, f"{flags.min_interactions}-core"):
        before = steps[-2]
        raise InputError(
            f"--min_interactions {flags.min_interactions}: leaves nothing of {before.interactions} interactions of "
            f"{before.users} {'sessions' if flags.session_gap else 'users'} with {before.items} items; give a "
            "smaller number"
        )


def print_steps(raw: sources.RawInteractions, steps: list[Step]) -> None:
    """Prints what is left after each step of the cleaning."""
    print(f"{'':<24}{'interactions':>14}{'users':>12}{'items':>12}")
    print(f"{'read':<24}{raw.num_rows - raw.refused:>14,}")
    for step in steps:
        counts = [f"{count:>12,}" for count in (step.users, step.items) if count is not None]
        print(f"{step.step:<24}{step.interactions:>14,}{''.join(counts)}")


def print_levels(
    report: list[dict[str, float]], codes: int, num_items: int, collisions: str, resolved: dict[str, int]
) -> None:
    """Prints how the codes of each level are used, and how collisions were resolved."""
    print(f"\n{'level':<8}{'codes used':>12}{'perplexity':>12}{'largest':>10}{'items that share their ID so far':>36}")
    for level, row in enumerate(report):
        used = f"{row['used']} of {codes}"
        print(
            f"{chr(ord('a') + level):<8}{used:>12}{row['perplexity']:>12,.1f}{row['largest']:>10,}{row['sharing']:>36,}"
        )
    done = ", ".join(f"{count:,} {what}" for what, count in resolved.items()) or "none"
    print(f"collisions ({collisions}): {done}")
    moved = resolved.get("moved", 0)
    if moved > MOST_MOVED * num_items:
        print(
            f"warning: {moved:,} of {num_items:,} items ({moved / num_items:.1%}) have a code that is not the nearest, "
            "because another item has that ID"
        )


def _print_advice(levels: int, codes: int, num_items: int, resolved: dict[str, int]) -> None:
    """Prints which flags might give better IDs."""
    if resolved.get("moved", 0) + resolved.get("extended", 0) > MOST_MOVED * num_items:
        print("note: more --text_columns, --codes or --levels give fewer items the same ID")
    better = max(2, 1 << max(1, num_items // 8).bit_length() - 1)  # the power of 2 with 8 to 16 items per code
    while better**levels < 2 * num_items:  # room for all of them
        better *= 2
    if num_items < 4 * codes and better < codes:
        print(
            f"note: {num_items:,} items are few for {codes} codes per level: a model learns from codes that items "
            f"share; try --codes {better}"
        )


def input_of(source: Source, roles: tuple[str, ...], columns: list[str | None]) -> dict[str, object]:
    """What dataset.json records about a file that was read."""
    found = {role: name for role, name in zip(roles, columns, strict=True) if name is not None}
    return {"name": os.path.basename(source.path), "sha256": sha256_of(source.path), "columns": found}


def encoder_of(encoder: str) -> dict[str, Any]:
    """What dataset.json records about an encoder: enough to recognize it, without the path of its folder."""
    from minionerec.model import loading

    return {"kind": "encoder", "name": os.path.basename(encoder.rstrip("/")), "weights": loading.fingerprint(encoder)}


def software() -> dict[str, str]:
    """The versions on which the bytes of the files may depend."""
    return {
        "minionerec": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in SOFTWARE},
    }
