"""Measures what SASRec costs when it ranks with a model: milliseconds of a request with it against those without it.

The same requests, batches of 1 and 8, one way after the other in each round; the ratio is that of the medians.

    python -m benchmarks.blend --model out/lora/final_checkpoint --blend out/sasrec --info_file info.txt \\
        --histories test.csv
"""

from itertools import islice

from benchmarks.common import interleaved_medians, print_json, print_table, quiet
from minionerec import cli
from minionerec.errors import Problems
from minionerec.flags import check_positive


def blend(
    model: str = "",
    blend: str = "",
    info_file: str = "",
    histories: str = "",
    category: str = "",
    num_beams: int = 50,
    requests: int = 16,
    repeats: int = 7,
) -> None:
    """Prints milliseconds per request and their ratio.

    Args:
        model: a checkpoint.
        blend: folder of a SASRec model.
        info_file: the catalogue.
        histories: requests, as recommend.py takes them.
        category: what the items are, for a checkpoint that does not record its prompts.
        num_beams: SIDs that are ranked.
        requests: of the file, from its start.
        repeats: timed rounds; the median is reported.
    """
    problems = Problems()
    check_positive(problems, num_beams=num_beams, requests=requests, repeats=repeats)
    problems.check()

    from minionerec.ranking import Ranker
    from minionerec.serving.requests import RequestReader

    quiet()
    ranker = Ranker.load(model, info_file, category=category, num_beams=num_beams, blend=blend, blend_weight=0.5)
    assert ranker.items is not None
    with_sasrec = ranker.blend
    asked = list(islice(RequestReader(ranker.items, None, 10, num_beams).read_file(histories), requests))

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
        seconds = interleaved_medians(ways, repeats)
        times = {f"ms, {name}": 1000 * value / len(asked) for name, value in seconds.items()}
        rows.append({"requests at once": batch_size, **times, "ratio": seconds["with SASRec"] / seconds["alone"]})
    print_table(rows)
    print_json("blend", model=model, beams=num_beams, results=rows)


if __name__ == "__main__":
    cli.run(blend)
