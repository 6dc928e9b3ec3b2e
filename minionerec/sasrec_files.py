"""The folder of a SASRec model that scripts/train_sasrec.py wrote, read without torch."""

import hashlib
import os
from collections.abc import Iterable
from typing import NamedTuple

from minionerec.data.files import read_json, shorten
from minionerec.errors import InputError

RECORD, WEIGHTS_FILE = "sasrec.json", "sasrec.safetensors"


class Known(NamedTuple):
    """What a model was trained on: the SIDs, the fingerprint of their catalogue (None in folders of 0.1), and the
    training file (empty in folders that do not name it)."""

    sids: list[str]
    catalogue: str | None
    train_file: str


def files(folder: str) -> list[str]:
    """What a model consists of."""
    return [os.path.join(folder, name) for name in (RECORD, WEIGHTS_FILE)]


def known(folder: str, flag: str) -> Known:
    """What the model in the folder that a flag names knows. Raises InputError with one line if there is none."""
    if not folder:
        raise InputError(f"--{flag} is missing; give the folder of a model of scripts/train_sasrec.py")
    if not all(map(os.path.isfile, files(folder))):
        raise InputError(f"--{flag} {folder}: no SASRec model is there; train one with scripts/train_sasrec.py")
    data = read_json(os.path.join(folder, RECORD))
    sids = data.get("sids") if isinstance(data, dict) else None
    if not isinstance(sids, list) or not all(isinstance(sid, str) for sid in sids):
        raise InputError(f"--{flag} {folder}: {os.path.join(folder, RECORD)} does not list SIDs; train it again")
    train_file = data.get("train_file")
    return Known(sids, data.get("catalogue"), train_file if isinstance(train_file, str) else "")


def fingerprint(sid_of_item: Iterable[tuple[str, str]]) -> str:
    """A digest of a catalogue, pairs of item id and SID in any order. Titles do not count."""
    lines = sorted({f"{sid}\t{item}\n" for item, sid in sid_of_item})
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def check_within(folder: str, flag: str, sid_of_item: Iterable[tuple[str, str]], of: str) -> None:
    """Raises InputError with one line if the model in the folder that a flag names knows SIDs that are not in a
    catalogue, pairs of item id and SID from the file that `of` names, or if its SIDs stand for other items there."""
    pairs, model = list(sid_of_item), known(folder, flag)
    unknown = sorted(set(model.sids) - {sid for _, sid in pairs})
    if unknown:
        raise InputError(
            f"--{flag} {folder}: was trained on a different catalogue: {len(unknown)} of its SIDs are not in {of}, "
            f"such as {shorten(unknown[0])}; train it on this one"
        )
    check_items(folder, flag, model, pairs, of)


def check_items(folder: str, flag: str, model: Known, sid_of_item: Iterable[tuple[str, str]], of: str) -> None:
    """As `check_within`, where the model has the same SIDs as the catalogue. Of fewer SIDs, and of models of 0.1, it is
    not known which items they were."""
    pairs = list(sid_of_item)
    same = set(model.sids) == {sid for _, sid in pairs}
    if same and model.catalogue is not None and model.catalogue != fingerprint(pairs):
        raise InputError(
            f"--{flag} {folder}: was trained on a different catalogue: the SIDs of {of} are the same, but stand for "
            "other items; train it on this one"
        )
