"""Measures what SASRec costs when it ranks with a model: milliseconds of a request with it against those without it.

The same requests, batches of 1 and 8, one way after the other in each round; the ratio is that of the medians.

    python -m benchmarks.blend --model out/lora/final_checkpoint --blend out/sasrec --info_file info.txt \\
        --histories test.csv
"""

from dataclasses import dataclass
from itertools import islice

from benchmarks.common import interleaved_medians, print_json, print_table, quiet
from minionerec import cli
from minionerec.flags import Flags, above_zero, command, flag


@dataclass(frozen=True, kw_only=True)
class BlendedFlags(Flags):
    """What ranks with what, and the requests."""

    model: str = flag("", "a checkpoint.")
    blend: str = flag("", "folder of a SASRec model.")
    info_file: str = flag("", "the catalogue.")
    histories: str = flag("", "requests, as recommend.py takes them.")
    category: str = flag("", "what the items are, for a checkpoint that does not record its prompts.")
    num_beams: int = flag(50, "SIDs that are ranked.", above_zero)
    requests: int = flag(16, "of the file, from its start.", above_zero)
    repeats: int = flag(7, "timed rounds; the median is reported.", above_zero)


@command(BlendedFlags)
def blend(flags: BlendedFlags) -> None:
    """Prints milliseconds per request and their ratio."""
    flags.problems().check()

    from minionerec.ranking import Ranker
    from minionerec.serving.requests import RequestReader

    quiet()
    ranker = Ranker.load(
        *(flags.model, flags.info_file),
        category=flags.category,
        num_beams=flags.num_beams,
        blend=flags.blend,
        blend_weight=0.5,
    )
    assert ranker.items is not None
    with_sasrec = ranker.blend
    reader = RequestReader(ranker.items, None, 10, flags.num_beams)
    asked = list(islice(reader.read_file(flags.histories), flags.requests))

    def answer(batch_size: int, blended: bool) -> None:
        ranker.blend = with_sasrec if blended else None
        for start in range(0, len(asked), batch_size):
            ranker.answer(asked[start : start + batch_size])

    rows = []
    for batch_size in (1, 8):
        ranker.batch_size = batch_size
        ways = {
            "alone": lambda size=batch_size: answer(size, False),
            "with SASRec": lambda size=batch_size: answer(size, True),
        }
        seconds = interleaved_medians(ways, flags.repeats)
        times = {f"ms, {name}": 1000 * value / len(asked) for name, value in seconds.items()}
        rows.append({"requests at once": batch_size, **times, "ratio": seconds["with SASRec"] / seconds["alone"]})
    print_table(rows)
    print_json("blend", model=flags.model, beams=flags.num_beams, results=rows)


if __name__ == "__main__":
    cli.run(blend)
