"""The folder of a SASRec model that scripts/train_sasrec.py wrote, read without torch."""

import os
from typing import NamedTuple

from minionerec.checkpoint import read_json
from minionerec.data.files import shorten
from minionerec.errors import InputError

RECORD, WEIGHTS_FILE = "sasrec.json", "sasrec.safetensors"


class Known(NamedTuple):
    """The SIDs that a model was trained on, and the fingerprint of their catalogue; None in folders of 0.1."""

    sids: list[str]
    catalogue: str | None


def files(folder: str) -> list[str]:
    """What a model consists of."""
    return [os.path.join(folder, name) for name in (RECORD, WEIGHTS_FILE)]


def known(folder: str, flag: str) -> Known:
    """What the model in the folder that a flag names knows. Raises InputError with one line if there is none."""
    if not all(map(os.path.isfile, files(folder))):
        raise InputError(f"--{flag} {folder}: no SASRec model is there; train one with scripts/train_sasrec.py")
    data = read_json(os.path.join(folder, RECORD))
    sids = data.get("sids") if isinstance(data, dict) else None
    if not isinstance(sids, list) or not all(isinstance(sid, str) for sid in sids):
        raise InputError(f"--{flag} {folder}: {os.path.join(folder, RECORD)} does not list SIDs; train it again")
    return Known(sids, data.get("catalogue"))


def check_within(folder: str, flag: str, sids: set[str], of: str) -> None:
    """Raises InputError with one line if the model in the folder that a flag names knows items that are not among
    `sids`, those of the file that `of` names."""
    unknown = sorted(set(known(folder, flag).sids) - sids)
    if unknown:
        raise InputError(
            f"--{flag} {folder}: was trained on a different catalogue: {len(unknown)} of its SIDs are not in {of}, "
            f"such as {shorten(unknown[0])}; train it on this one"
        )
