"""Builds a new data set: from raw files to a folder in the layout of the release."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from minionerec import __version__
from minionerec.errors import InputError, Problems
from minionerec.prepare import cleaning, item_embeddings, semantic_ids, sources, writing

ITEM_ROLES = ("item", "title", "description", "features", "brand", "categories")
USER_ROLES = ("user", "item", "time")
SOFTWARE = ("numpy", "pyarrow", "scikit-learn", "scipy")


def build(
    problems: Problems,
    interactions: str,
    items: str,
    output_dir: str,
    category: str,
    columns: dict[str, str],
    min_interactions: int,
    max_history: int,
    start_date: str,
    end_date: str,
    split: str,
    encoder: str,
    embeddings: str,
    levels: int,
    codes: int,
    collisions: str,
    seed: int,
) -> dict[str, Any]:
    """Prepares a data set, prints the steps, and returns the record that is written to dataset.json.

    Args:
        problems: the problems of the flags, to which those of the files are added.
        columns: role -> column name, or "" to find it.

    Raises InputError for unusable input; then nothing is written.
    """
    with writing.scratch_folder(output_dir) as scratch:
        spool = cleaning.Spool(os.path.join(scratch, "interactions"), cleaning.INTERACTION)

        # Read all files, and report all problems together.
        window = problems.attempt(cleaning.time_window, start_date, end_date)
        bought = problems.attempt(sources.open_source, interactions, "interactions")
        sold = problems.attempt(sources.open_source, items, "items")
        bought_columns = sold_columns = raw = described = None
        if bought:
            other = sold.names if sold else ()
            bought_columns = problems.attempt(sources.find_columns, bought, USER_ROLES, columns, other)
        if sold:
            other = bought.names if bought else ()
            sold_columns = problems.attempt(sources.find_columns, sold, ITEM_ROLES, columns, other)
        if bought and bought_columns:
            window = window or (0, sources.LATEST)
            raw = problems.attempt(sources.read_interactions, bought, bought_columns, window, spool)
        if sold and sold_columns:
            wanted = raw.items.__contains__ if raw else lambda item: False
            described = problems.attempt(sources.read_items, sold, sold_columns, wanted)
        matrix = problems.attempt(item_embeddings.open_embeddings, embeddings) if embeddings else None
        given = None
        if described and matrix is not None:
            given = problems.attempt(
                item_embeddings.rows_of_embeddings,
                embeddings,
                matrix,
                described[1]["rows"],
                [item.row for item in described[0]],
            )
        problems.check()
        assert bought and bought_columns and sold and sold_columns and raw and described
        catalogue, found = described

        # Clean.
        steps: list[dict[str, Any]] = []
        alive = _clean(spool, raw, catalogue, min_interactions, steps, interactions, items)
        kept = [place for place, item in enumerate(catalogue) if alive[raw.items[item.original_id]]]
        catalogue = [catalogue[place] for place in kept]
        item_ids: np.ndarray = np.full(len(raw.items), -1, np.int32)
        item_ids[[raw.items[item.original_id] for item in catalogue]] = np.arange(len(catalogue))
        rows, sizes = cleaning.rows_of(spool, os.path.join(scratch, "rows"), item_ids, max_history, split)
        _print_steps(raw.num_rows, steps, found, sizes)

        # Embed the items, and give them codes.
        texts = [f"{item.title}\n{item.description}" for item in catalogue]
        text_model, made_by = None, {"kind": "tfidf"}
        if given is not None:
            vectors, made_by = given[kept], {"kind": "embeddings", "sha256": writing.digest(embeddings)}
        elif encoder:
            vectors, made_by = item_embeddings.embed_with_model(encoder, texts), encoder_of(encoder)
        else:
            text_model = item_embeddings.TextModel.fit(texts, seed)
            vectors = text_model.embed(texts)
        codebooks, assigned, residual = semantic_ids.fit(vectors, levels, codes, seed)
        report = semantic_ids.level_report(assigned)
        final, resolved = semantic_ids.resolve_collisions(assigned, residual, codebooks[-1], collisions)
        print_levels(report, codes, len(catalogue), collisions, resolved)

        # Write.
        folder = os.path.join(scratch, "dataset")
        os.mkdir(folder)
        index = writing.index_of(final)
        metadata = {str(i): writing.metadata_of(item) for i, item in enumerate(catalogue)}
        writing.write_catalogue(folder, category, index, metadata, vectors, codebooks, text_model)
        batches = cleaning.in_time_order(rows, sum(sizes.values()), split)
        sids, titles = ["".join(sid) for sid in index.values()], [item.title for item in catalogue]
        writing.write_rows(folder, category, batches, list(raw.users), sids, titles)
        record = {
            "category": category,
            "arguments": {
                "min_interactions": min_interactions,
                "max_history": max_history,
                "start_date": start_date,
                "end_date": end_date,
                "split": split,
                "levels": levels,
                "codes": codes,
                "collisions": collisions,
                "seed": seed,
            },
            "inputs": {
                "interactions": input_of(bought, USER_ROLES, bought_columns),
                "items": input_of(sold, ITEM_ROLES, sold_columns),
            },
            "interactions": [{"step": "read", "interactions": raw.num_rows}, *steps],
            "items": {**found, "kept": len(catalogue)},
            "rows": sizes,
            "embeddings": {**made_by, "width": vectors.shape[1]},
            "semantic_ids": {"levels": report, **resolved},
            "software": software(),
        }
        writing.write_record(folder, record)
        writing.publish(folder, output_dir)
    return record


def _clean(
    spool: cleaning.Spool,
    raw: sources.RawInteractions,
    catalogue: list[sources.RawItem],
    min_interactions: int,
    steps: list[dict[str, Any]],
    interactions: str,
    items: str,
) -> np.ndarray:
    """Drops interactions that do not count, and adds the counts after each step to `steps`. Returns whether each item
    is left, [items]."""

    def note(step: str) -> int:
        steps.append({"step": step, **cleaning.counts_of(spool, len(raw.items))})
        return steps[-1]["interactions"]

    if not note("in the time window"):
        first, last = (datetime.fromtimestamp(time / 1e6, UTC).date() for time in (raw.earliest, raw.latest))
        raise InputError(
            f"--interactions {interactions}: none of its {raw.num_rows} rows is between --start_date and --end_date; "
            f"they are from {first} to {last}"
        )
    cleaning.order_and_drop_duplicates(spool)
    note("without duplicates")
    known: np.ndarray = np.zeros(len(raw.items), bool)
    known[[raw.items[item.original_id] for item in catalogue]] = True
    cleaning.keep_items(spool, known)
    if not note("of items with a title"):
        raise InputError(
            f"--items {items}: has a title for none of the {len(raw.items)} items of {interactions}, such as "
            f"{next(iter(raw.items))!r}; do the two files belong together? Name the column of the ids with "
            "--item_column"
        )
    alive = cleaning.k_core(spool, len(raw.items), min_interactions)
    if not note(f"{min_interactions}-core"):
        raise InputError(
            f"--min_interactions {min_interactions}: leaves nothing of {steps[-2]['interactions']} interactions of "
            f"{steps[-2]['users']} users with {steps[-2]['items']} items; give a smaller number"
        )
    return alive


def _print_steps(num_rows: int, steps: list[dict[str, Any]], found: dict[str, int], sizes: dict[str, int]) -> None:
    """Prints what is left after each step of the cleaning."""
    print(f"{'':<24}{'interactions':>14}{'users':>12}{'items':>12}")
    print(f"{'read':<24}{num_rows:>14,}")
    for step in steps:
        print(f"{step['step']:<24}{step['interactions']:>14,}{step['users']:>12,}{step['items']:>12,}")
    print(
        f"items: {found['rows']:,} read; {found['not_wanted']:,} without interactions, {found['untitled']:,} without a "
        f"title and {found['repeated']:,} with a repeated id were left out"
    )
    print("rows: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()))


def print_levels(
    report: list[dict[str, Any]], codes: int, num_items: int, collisions: str, resolved: dict[str, int]
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
    better = max(2, 1 << max(1, num_items // 8).bit_length() - 1)  # the power of 2 with 8 to 16 items per code
    if num_items < 4 * codes and better < codes:
        print(
            f"note: {num_items:,} items are few for {codes} codes per level: a model learns from codes that items "
            f"share; try --codes {better}"
        )


def input_of(source: sources.Source, roles: tuple[str, ...], columns: list[str | None]) -> dict[str, Any]:
    """What dataset.json records about a file that was read."""
    found = {role: name for role, name in zip(roles, columns, strict=True) if name is not None}
    return {"name": os.path.basename(source.path), "sha256": writing.digest(source.path), "columns": found}


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
