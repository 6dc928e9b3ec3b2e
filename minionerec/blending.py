"""What changes a model's scores when items are ranked: SASRec, and a penalty on items of the history.

The score of an item is its log-probability under the model, and `weight` times that under SASRec, less `seen_penalty`
if it is in the history. With SASRec, the best items of either are ranked. evaluate.py chooses both numbers together, on
validation rows, because they depend on each other. It records them for a checkpoint: in the folder of the SASRec model
that ranks with it, or, for the penalty of a checkpoint that ranks alone, in its own.

Only the standard library is imported.
"""

import hashlib
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from minionerec import sasrec_files
from minionerec.checkpoint import PENALTY_FILE, RUN_FILE, Checkpoint
from minionerec.data.files import InfoItem, read_json, shorten
from minionerec.data.items import ExcludeSeen
from minionerec.errors import InputError, Problems
from minionerec.flags import HEAVIEST, ScoreFlags, penalty_of_seen, weight_of_blend
from minionerec.metrics import watched_cutoff
from minionerec.output import writing
from minionerec.saving import write_json
from minionerec.validation import check_values, is_number

BEST = 15  # of SASRec's SIDs that are ranked with the beams
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # that are tried
PENALTIES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)  # that are tried; the last nearly leaves out
ROWS = 2000  # of a validation file on which they are chosen, at most
_PART = 1_000_000  # bytes at both ends of a file of weights that tell checkpoints apart

Pair = tuple[float, float]  # a weight of SASRec, 0 for none, and a penalty on items of the history


def is_weight(value: object) -> bool:
    """Whether a value can be the weight of a second recommender."""
    return is_number(value) and weight_of_blend(value) is None


def is_penalty(value: object) -> bool:
    """Whether a value can be a penalty on items of the history."""
    return is_number(value) and penalty_of_seen(value) is None


RECORD = {
    "weight": (is_weight, f"a number from 0 to {HEAVIEST}"),
    "seen_penalty": (is_penalty, "a number from 0"),
    "num_beams": (lambda value: type(value) is int and value >= 1, "a whole number from 1"),
    "length_penalty": (is_number, "a number"),
    "exclude_seen": (lambda value: isinstance(value, bool) or value == "earlier", "true, false or earlier"),
    "chosen": (lambda value: isinstance(value, list), "a list of flags"),
}


@dataclass(frozen=True)
class Blend:
    """A SASRec model that ranks with a checkpoint.

    Attributes:
        folder: of the model, written by scripts/train_sasrec.py.
        weight: how much it counts; None until one is chosen.
        train_file: what the model was trained on; empty if that is not known.
    """

    folder: str
    weight: float | None
    train_file: str

    @property
    def files(self) -> list[str]:
        """What the model consists of."""
        return sasrec_files.files(self.folder)


@dataclass(frozen=True)
class Scoring:
    """What changes the scores of a checkpoint, and what is recorded about it.

    Attributes:
        blend: a SASRec model that ranks with the checkpoint; None for none.
        seen_penalty: subtracted from the scores of SIDs in the history (nats); None until it is chosen.
        path: where one of the numbers is auto, the file that keeps both for this checkpoint and this SASRec model.
        recorded: what is there: the numbers, the number of beams, and which of the two flags were `chosen`, not given.
    """

    blend: Blend | None
    seen_penalty: float | None
    path: str
    recorded: dict

    @classmethod
    def read(cls, flags: ScoreFlags, checkpoint: Checkpoint, items: Sequence[InfoItem], info_file: str) -> "Scoring":
        """Checks that the SASRec model was trained on this catalogue. Numbers that are auto are the recorded ones, of
        penalties only one that was chosen: a weight may have been chosen with none. Raises InputError with one line for
        what is wrong."""
        known = None
        if flags.blend:
            known = sasrec_files.known(flags.blend, "blend")
            _check_catalogue(flags.blend, known, items, info_file)
        path, recorded = "", {}
        if flags.automatic:
            name = f"{'weight-' if known else PENALTY_FILE}{_digest(checkpoint.path)}.json"
            path = os.path.join(flags.blend or checkpoint.path, name)
            recorded = _recorded(path)
        chosen = recorded.get("seen_penalty") if "seen_penalty" in recorded.get("chosen", ()) else None
        weight = recorded.get("weight") if flags.blend_weight == "auto" else flags.blend_weight
        penalty = chosen if flags.seen_penalty == "auto" else flags.seen_penalty
        return cls(known and Blend(flags.blend, weight, known.train_file), penalty, path, recorded)

    @property
    def numbers(self) -> tuple[float | None, float | None]:
        """The weight, 0 without SASRec, and the penalty; None for what is not known yet."""
        return self.blend.weight if self.blend else 0.0, self.seen_penalty

    def with_numbers(self, weight: float | None, seen_penalty: float | None) -> "Scoring":
        """With another weight and penalty."""
        return replace(self, blend=self.blend and replace(self.blend, weight=weight), seen_penalty=seen_penalty)

    def ready(self) -> "Scoring":
        """Itself. Raises InputError for what is not known yet."""
        problems = Problems()
        if self.blend and self.blend.weight is None:
            problems.add(
                f"--blend {self.blend.folder}: no weight is recorded for this checkpoint; evaluate.py with --blend "
                "chooses one on the validation file, or give --blend_weight 0.5"
            )
        if self.seen_penalty is None:
            pair = f" with --blend {self.blend.folder}" if self.blend else ""
            problems.add(
                f"--seen_penalty auto: no penalty is recorded for this checkpoint{pair}; evaluate.py with "
                "--seen_penalty auto chooses one on the validation file, or give a number such as --seen_penalty 1"
            )
        problems.check()
        return self

    def notes(self, num_beams: int, exclude_seen: ExcludeSeen | None = None, length_penalty: float = 0.0) -> list[str]:
        """A line if what is recorded was chosen for other rankings than those of now: by another of the two numbers,
        with more or fewer beams, of another part of the history (None where requests say), or of other scores."""
        weight, penalty = self.numbers
        now: dict[str, object] = {"blend_weight": weight, "seen_penalty": penalty, "num_beams": num_beams}
        now |= {"length_penalty": length_penalty} | ({} if exclude_seen is None else {"exclude_seen": exclude_seen})
        then = {**self.recorded, "blend_weight": self.recorded.get("weight")}
        other = [name for name in now if then.get(name) not in (None, now[name])]
        if not other:
            return []
        was, is_now = (" ".join(f"--{name} {_shown(of[name])}" for name in other) for of in (then, now))
        return [f"{self.path} was chosen with {was}, not {is_now}; evaluate.py with --eval_file chooses it again"]

    def record(self, chosen: list[str], num_beams: int, found: dict[Pair, float], **more: object) -> None:
        """Writes the numbers, which flags were chosen, and by what. Raises RunError if that cannot be written."""
        weight, penalty = self.numbers
        tried: dict[str, dict[str, float]] = {}
        for (of_weight, of_penalty), value in found.items():
            tried.setdefault(f"{of_weight:g}", {})[f"{of_penalty:g}"] = value
        numbers = {"weight": weight, "seen_penalty": penalty, "num_beams": num_beams, "chosen": chosen}
        with writing(self.path):
            write_json(self.path, {**numbers, **more, "tried": tried})


def _shown(value: object) -> str:
    """A value of a flag, as it is given."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def metrics_of_pairs(
    candidates: Sequence[Sequence[tuple[int, float]]],
    others: Sequence[Sequence[float]],
    seen: Sequence[Collection[int]],
    targets: Sequence[int | None],
    length: int,
    pairs: Sequence[Pair],
) -> dict[Pair, float]:
    """For each pair of a weight and a penalty the NDCG at the cutoff that `length` SIDs are watched by.

    Args:
        candidates: of each row the number and the model's score of every SID that is ranked.
        others: their log-probabilities under SASRec; zeros for none.
        seen: the numbers of the SIDs in each row's history.
        targets: the number of each row's target; None where the catalogue lacks it.
    """
    cutoff = watched_cutoff(length)
    gains = dict.fromkeys(pairs, 0.0)
    for ranked, other, of_history, target in zip(candidates, others, seen, targets, strict=True):
        place = next((place for place, (number, _) in enumerate(ranked) if number == target), None)
        if place is None:
            continue
        rows = [(score, more, n in of_history) for (n, score), more in zip(ranked, other, strict=True)]
        for weight, penalty in pairs:
            scores = [score + weight * more - penalty * was_seen for score, more, was_seen in rows]
            rank = sum(score > scores[place] for score in scores)
            gains[weight, penalty] += 1 / math.log2(rank + 2) if rank < cutoff else 0.0
    return {pair: gain / len(targets) for pair, gain in gains.items()}


def best_pair(found: dict[Pair, float]) -> Pair:
    """The pair with the best metric; of equals that of the smallest weight, then of the smallest penalty."""
    return max(found, key=lambda pair: (found[pair], -pair[0], -pair[1]))


def _check_catalogue(folder: str, known: sasrec_files.Known, items: Sequence[InfoItem], info_file: str) -> None:
    ours, theirs = {item.sid for item in items}, set(known.sids)
    if ours != theirs:
        example = shorten(min(ours ^ theirs))
        raise InputError(
            f"--blend {folder}: was trained on a different catalogue: {len(ours - theirs)} SIDs of {info_file} are not "
            f"in it, and {len(theirs - ours)} of its own are not in that file, such as {example}; train it on this one"
        )
    sasrec_files.check_items(folder, "blend", known, [(item.id, item.sid) for item in items], info_file)


def _recorded(path: str) -> dict:
    if not os.path.isfile(path):
        return {}
    return check_values(path, read_json(path), RECORD, "remove the file, and choose again with evaluate.py")


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
