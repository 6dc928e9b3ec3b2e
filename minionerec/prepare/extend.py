"""Adds new items to an existing data set, with IDs from its codebooks, and rows of later purchases; old items and rows
do not change."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import numpy as np

from minionerec.data.files import FileProblems, shorten
from minionerec.errors import InputError, Problems
from minionerec.prepare import cleaning, item_embeddings, semantic_ids, sources, writing
from minionerec.prepare.build import (
    ITEM_ROLES,
    LostZeros,
    ReadItems,
    encoder_of,
    input_of,
    layout_of,
    no_text,
    print_levels,
    read_interactions,
    read_items,
    software,
    texts_of,
    texts_without_column,
)
from minionerec.prepare.new_rows import add_rows, settings_of
from minionerec.prepare.recognize import open_source
from minionerec.prepare.settings import PrepareFlags


class OldItems(TypedDict):
    """The items of a data set, and the models that give codes to new ones: `codes` of each item, `embeddings` [items,
    d], `codebooks` [L, K, d + p]."""

    index: dict[str, list[str]]
    metadata: dict[str, dict[str, str]]
    embeddings: np.ndarray
    codebooks: np.ndarray
    codes: list[tuple[int, ...]]
    text_model: item_embeddings.TextModel  # where they were embedded by it


def extend(problems: Problems, flags: PrepareFlags) -> writing.Record:
    """Writes a data set with what `flags.dataset` has, the items of the file `flags.add_items` that it lacks, and rows
    of the later purchases of `flags.interactions`; returns its record. Old items and rows do not change.

    Raises InputError for unusable input; then nothing is written.
    """
    dataset = flags.dataset
    with writing.scratch_folder(flags.output_dir) as scratch:
        spool = cleaning.Spool(os.path.join(scratch, "interactions"), cleaning.INTERACTION)

        # Read all files, and report all problems together.
        record = problems.attempt(writing.read_record, dataset)
        if record is not None and flags.add_items:
            _check_embeddings(problems, record["embeddings"]["kind"], flags.encoder, flags.embeddings)
        old = problems.attempt(_read_catalogue, dataset, record) if record else None
        existing = {fields["original_id"] for fields in old["metadata"].values()} if old else set()
        zeros = LostZeros(existing)
        settings = problems.attempt(settings_of, flags, record) if record and flags.interactions else None
        layout = problems.attempt(layout_of, settings) if settings else None
        log = problems.attempt(open_source, flags.interactions, "interactions", layout) if layout else None
        read = None
        if flags.add_items or not flags.interactions:
            read = read_items(problems, flags, "add_items", lambda item: not zeros.wanted(item), log)
        bought = None
        if settings and log:
            bought = read_interactions(problems, settings, log, read.source if read else None, spool)
        unique = list(dict.fromkeys(problems))
        if unique:
            raise InputError(unique)
        assert record and old
        if read and not read.items and bought:  # a catalogue that is given every week has nothing new in some
            print("\n".join([*read.lines, f"note: --add_items {flags.add_items}: {_nothing_new(read)}"]))
            read = None

        # Write the files of the data set, those of old and new items, and the new rows.
        folder = os.path.join(scratch, "dataset")
        os.mkdir(folder)
        index, metadata, added = old["index"], old["metadata"], dict[str, Any]()
        if read and (remedy := zeros.remedy()):
            print(f"warning: {flags.add_items} has ids of {dataset} in another form, as new items: {remedy}")
        if read:
            index, metadata, added = _add_items(folder, flags, record, old, read)
        for name in record["files"] if read is None else writing.row_files_of(record):
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            shutil.copyfile(os.path.join(dataset, name), os.path.join(folder, name))
        if settings and bought:
            print("\n".join(bought.lines))
            sids = ["".join(sid) for sid in index.values()]
            made, latest = add_rows(folder, settings, record, bought, spool, metadata, sids, scratch)
            inputs = {**added.get("inputs", {}), **made.pop("inputs")}
            added = {**added, **made, "inputs": inputs}
            record["latest"] = latest
        record["added"] = [*record.get("added", []), {**added, "software": software()}]
        writing.write_record(folder, record)
        writing.publish(folder, flags.output_dir)
    return record


def _add_items(
    folder: str, flags: PrepareFlags, record: writing.Record, old: OldItems, read: ReadItems
) -> tuple[dict[str, list[str]], dict[str, dict[str, str]], dict[str, Any]]:
    """Writes the files of old and new items, and returns their index, their metadata, and what dataset.json records.

    A new item gets the nearest codes among those that old items use, because a model knows no others. If that ID is
    taken, it gets the nearest free last code, or the nearest free ID of codes that old items use, unless the data set
    keeps collisions.
    """
    dataset, encoder, embeddings = flags.dataset, flags.encoder, flags.embeddings
    new, found, given = read.items, read.counts, read.vectors
    if not new:
        raise InputError(f"--add_items {flags.add_items}: {_nothing_new(read)}")
    print("\n".join(read.lines))

    # Embed the new items as the old ones were.
    made_of = record["arguments"].get("text_columns", PrepareFlags.text_columns)
    texts = texts_of(new, made_of)
    if given is not None:
        vectors = given
    elif encoder:
        if record["embeddings"] != {**encoder_of(encoder), "width": record["embeddings"].get("width")}:
            raise InputError(
                f"--encoder {encoder}: {dataset} was made with another encoder, {record['embeddings'].get('name')}"
            )
        vectors = item_embeddings.embed_with_model(encoder, texts)
    else:
        vectors = old["text_model"].embed(texts)
    width = old["embeddings"].shape[1]
    if vectors.shape[1] != width:
        raise InputError(
            f"--embeddings {embeddings}: has width {vectors.shape[1]}, but the embeddings of {dataset} have {width}"
        )

    # Give them codes that old items use.
    mode = "keep" if record["arguments"]["collisions"] == "keep" else "move"
    final, resolved, report = _give_codes(old, vectors, mode)
    index = writing.index_of(final, len(old["index"]))
    tokens = {token for sid in old["index"].values() for token in sid}
    unknown = sorted({token for sid in index.values() for token in sid} - tokens)
    print(
        f"items: {found['rows']:,} read; {found['not_wanted']:,} that exist already, {found['untitled']:,} without a "
        f"title and {found['repeated']:,} with a repeated id were left out; {len(new):,} are new"
    )
    if old["codebooks"].shape[2] > width:
        print("IDs: the new items are placed by their texts, because no purchases of them are known")
    print_levels(report, old["codebooks"].shape[1], len(new), mode, resolved)
    for role in texts_without_column(made_of, read.columns) if given is None else ():
        if any(fields.get(role) for fields in old["metadata"].values()):
            print(f"warning: IDs of old items are made from the {role}, too; {read.source.path} has no {no_text(role)}")
    for note in _notes_on_titles(old, new, vectors if record["embeddings"]["kind"] == "tfidf" else None):
        print(note)
    if unknown:
        print(f"note: {', '.join(unknown)} are new tokens, which a model trained before does not know")

    # Write old and new items.
    metadata = {item: writing.metadata_of(fields) for item, fields in zip(index, new, strict=True)}
    index, metadata = {**old["index"], **index}, {**old["metadata"], **metadata}
    vectors = np.concatenate([old["embeddings"], vectors])
    writing.write_catalogue(folder, record["category"], index, metadata, vectors, old["codebooks"], old["text_model"])
    added = {
        "inputs": {"items": input_of(read.source, ITEM_ROLES, read.columns)},
        "items": {**found, "kept": len(new)},
        "semantic_ids": {"levels": report, **resolved},
    }
    return index, metadata, added


def _nothing_new(read: ReadItems) -> str:
    return f"none of its {read.counts['rows']:,} rows is a new item with a title"


def _give_codes(
    old: OldItems, vectors: np.ndarray, mode: str
) -> tuple[list[tuple[int, ...]], Counter[str], list[dict[str, float]]]:
    """Codes of new items with the embeddings `vectors` [items, d], how collisions were resolved, and how levels are
    used. Nobody has bought the items yet, so of the codebooks [L, K, d + p] only the columns of texts count."""
    codebooks = old["codebooks"][:, :, : vectors.shape[1]]
    levels, codes = codebooks.shape[:2]
    known: np.ndarray = np.zeros((levels, codes), bool)
    for row in old["codes"]:
        known[np.arange(levels), row[:levels]] = True
    assigned, residual = semantic_ids.code_with(vectors, codebooks, known)
    free = semantic_ids.FreeIds(codebooks, known)
    final, resolved = semantic_ids.resolve_collisions(
        *(assigned, residual, codebooks[-1], mode, np.flatnonzero(known[-1]), old["codes"]),
        elsewhere=lambda item, used: free.nearest(vectors[item], used),
    )
    return final, resolved, semantic_ids.level_report(assigned)


def _notes_on_titles(old: OldItems, new: Sequence[sources.RawItem], vectors: np.ndarray | None) -> list[str]:
    """Lines about new titles that say nothing or too much: without a word that the data set knows (where `vectors`
    [items, d] are of words), or the title of an item with another ID."""
    notes = []
    if vectors is not None:
        silent = [item.title for item, vector in zip(new, vectors, strict=True) if not vector.any()]
        if silent:
            notes.append(
                f"note: {len(silent):,} new items have no word that the items of the data set have, such as "
                f"{shorten(silent[0])}; their IDs do not depend on their texts"
            )
    known = {fields["title"] for fields in old["metadata"].values()}
    counted = Counter(item.title for item in new)
    again = [item.title for item in new if item.title in known or counted[item.title] > 1]
    if again:
        notes.append(
            f"note: {len(again):,} new items have the title of another item, such as {shorten(again[0])}; a request "
            "that names it must give an id"
        )
    return notes


def _check_embeddings(problems: Problems, kind: str, encoder: str, embeddings: str) -> None:
    """New items must be embedded as the old ones were."""
    needed = {"tfidf": "neither --encoder nor --embeddings", "encoder": "--encoder", "embeddings": "--embeddings"}[kind]
    if (kind == "encoder") != bool(encoder) or (kind == "embeddings") != bool(embeddings):
        problems.add(f"--add_items: the items of --dataset were embedded by {kind}; give {needed}")


def _read_catalogue(dataset: str, record: writing.Record) -> OldItems:
    """The items of a data set, and the models that give codes to new ones. Raises InputError if the files do not fit
    together."""
    paths = {name: os.path.join(dataset, path) for name, path in writing.files_of(record["category"]).items()}
    codebooks = semantic_ids.load_codebooks(paths["codebooks"])
    levels, num_codes = codebooks.shape[:2]
    try:
        with open(paths["index"], encoding="utf-8") as file:
            index = json.load(file)
        with open(paths["item"], encoding="utf-8") as file:
            metadata = json.load(file)
        embeddings = np.load(paths["embeddings"], allow_pickle=False)
        if list(index) != [str(i) for i in range(len(index))] or list(metadata) != list(index) or not index:
            raise ValueError("index and item file do not number the same items from 0")
        for fields in metadata.values():
            if not isinstance(fields["original_id"], str) or fields["title"] != " ".join(fields["title"].split()):
                raise ValueError("an item lacks its original_id, or its title is not one line of text")
        if embeddings.ndim != 2 or len(embeddings) != len(index) or embeddings.dtype != np.float32:
            raise ValueError("the embeddings are not float32, a row for each item")
        extra = codebooks.shape[2] - embeddings.shape[1]  # columns of co-purchases
        if extra < 0 or bool(extra) != bool(record["semantic_ids"].get("co_purchases")):
            raise ValueError("the embeddings do not fit the items and the codebooks")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"--dataset {dataset}: its items cannot be read: {error}") from None
    problems = FileProblems(paths["index"])
    codes = []
    for item, sid in index.items():
        row = semantic_ids.codes_of(sid)
        if row is None or not levels <= len(row) <= levels + 1 or max(row[:levels]) >= num_codes:
            problems.add(
                f", item {item!r}", f"expected the tokens of {levels} codes below {num_codes}, found {shorten(sid)}"
            )
        else:
            codes.append(row)
    problems.check()
    text_model = None
    if record["embeddings"]["kind"] == "tfidf":
        text_model = item_embeddings.TextModel.load(paths["tfidf"])
    return {
        "index": index,
        "metadata": metadata,
        "embeddings": embeddings,
        "codebooks": codebooks,
        "codes": codes,
        "text_model": cast(item_embeddings.TextModel, text_model),
    }
