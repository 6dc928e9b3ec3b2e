"""SASRec together with the model when items are ranked: whether it fits the catalogue, and how much it counts.

The score of an item is its log-probability under the model, and `weight` times that under SASRec. Both rank the best
items of either. The folder of a SASRec model keeps the weight that was chosen for a checkpoint, in a file of its own.

Only the standard library is imported.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from minionerec import sasrec_files
from minionerec.checkpoint import RUN_FILE, Checkpoint
from minionerec.data.files import InfoItem, read_json, shorten
from minionerec.errors import InputError
from minionerec.flags import HEAVIEST, weight_of_blend
from minionerec.metrics import watched_cutoff
from minionerec.output import writing
from minionerec.saving import write_json
from minionerec.validation import check_values

BEST = 15  # of SASRec's SIDs that are ranked with the beams
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # that are tried
ROWS = 2000  # of a validation file on which a weight is chosen, at most
_PART = 1_000_000  # bytes at both ends of a file of weights that tell checkpoints apart


def is_weight(value: object) -> bool:
    """Whether a value can be the weight of a second recommender."""
    return isinstance(value, int | float) and type(value) is not bool and weight_of_blend(value) is None


@dataclass(frozen=True)
class Blend:
    """A SASRec model that ranks with a checkpoint.

    Attributes:
        folder: of the model, written by scripts/train_sasrec.py.
        weight: how much it counts; None until one is chosen.
        path: the file that keeps the weight for this checkpoint.
        train_file: what the model was trained on; empty if that is not known.
    """

    folder: str
    weight: float | None
    path: str
    train_file: str

    @classmethod
    def read(
        cls,
        folder: str,
        weight: float | Literal["auto"],
        checkpoint: Checkpoint,
        items: Sequence[InfoItem],
        info_file: str,
    ) -> "Blend":
        """Checks that the model in a folder was trained on this catalogue. A weight of auto is the recorded one. Raises
        InputError with one line for what is wrong."""
        known = sasrec_files.known(folder, "blend")
        _check_catalogue(folder, known, items, info_file)
        path = os.path.join(folder, f"weight-{_digest(checkpoint.path)}.json")
        return cls(folder, _recorded(path) if weight == "auto" else float(weight), path, known.train_file)

    @property
    def files(self) -> list[str]:
        """What the model consists of."""
        return sasrec_files.files(self.folder)

    def ready(self) -> "Blend":
        """Itself. Raises InputError if no weight is known."""
        if self.weight is None:
            raise InputError(
                f"--blend {self.folder}: no weight is recorded for this checkpoint; evaluate.py with --blend chooses "
                "one on the validation file, or give --blend_weight 0.5"
            )
        return self

    def chosen(self, found: dict[float, float]) -> "Blend":
        """With the best of weights, by the metric that each has; of equals the smallest."""
        return replace(self, weight=max(found, key=lambda weight: (found[weight], -weight)))

    def record(self, checkpoint: str, eval_file: str, rows: int, found: dict[float, float], metric: str) -> None:
        """Writes the weight and what it was chosen by into the folder of the model. Raises RunError if it cannot be
        written."""
        tried = {f"{weight:g}": value for weight, value in found.items()}
        chosen = {"weight": self.weight, "checkpoint": checkpoint, "eval_file": eval_file, "rows": rows}
        with writing(self.path):
            write_json(self.path, {**chosen, "metric": metric, "tried": tried})


def metrics_by_weight(
    candidates: Sequence[Sequence[tuple[int, float]]],
    others: Sequence[Sequence[float]],
    targets: Sequence[int | None],
    length: int,
) -> dict[float, float]:
    """For each of WEIGHTS the NDCG at the cutoff that `length` SIDs are watched by.

    Args:
        candidates: of each row the number and the model's score of every SID that is ranked.
        others: their log-probabilities under SASRec.
        targets: the number of each row's target; None where the catalogue lacks it.
    """
    cutoff = watched_cutoff(length)
    gains = dict.fromkeys(WEIGHTS, 0.0)
    for ranked, other, target in zip(candidates, others, targets, strict=True):
        place = next((place for place, (number, _) in enumerate(ranked) if number == target), None)
        if place is None:
            continue
        for weight in WEIGHTS:
            scores = [score + weight * more for (_, score), more in zip(ranked, other, strict=True)]
            rank = sum(score > scores[place] for score in scores)
            gains[weight] += 1 / math.log2(rank + 2) if rank < cutoff else 0.0
    return {weight: gain / len(targets) for weight, gain in gains.items()}


def _check_catalogue(folder: str, known: sasrec_files.Known, items: Sequence[InfoItem], info_file: str) -> None:
    ours, theirs = {item.sid for item in items}, set(known.sids)
    if ours != theirs:
        example = shorten(min(ours ^ theirs))
        raise InputError(
            f"--blend {folder}: was trained on a different catalogue: {len(ours - theirs)} SIDs of {info_file} are not "
            f"in it, and {len(theirs - ours)} of its own are not in that file, such as {example}; train it on this one"
        )
    sasrec_files.check_items(folder, "blend", known, [(item.id, item.sid) for item in items], info_file)


def _recorded(path: str) -> float | None:
    if not os.path.isfile(path):
        return None
    remedy = "remove the file, and choose the weight again with evaluate.py"
    data = check_values(path, read_json(path), {"weight": (is_weight, f"a number from 0 to {HEAVIEST}")}, remedy)
    return float(data["weight"]) if "weight" in data else None


def _digest(checkpoint: str) -> str:
    """Tells checkpoints apart by their weights, wherever they are; a hub model by its name. Of large files
    only the ends are read: where a run trained rows between them (--freeze_LLM), its record tells."""
    digest = hashlib.sha256()
    names = sorted(os.listdir(checkpoint)) if os.path.isdir(checkpoint) else []
    weights = [os.path.join(checkpoint, name) for name in names if name.endswith(".safetensors")]
    for path in [*weights, *(os.path.join(checkpoint, name) for name in names if name == RUN_FILE and weights)]:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            digest.update(b"%d" % size + file.read(_PART))
            file.seek(max(size - _PART, 0))
            digest.update(file.read())
    return (digest if weights else hashlib.sha256(checkpoint.encode())).hexdigest()[:12]
