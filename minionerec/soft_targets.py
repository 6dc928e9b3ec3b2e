"""What SASRec knows of the next purchase, as rows for SFT to learn next to the purchases themselves.

Each row is followed by one with the same history, whose target is sampled from the items that SASRec finds most likely.
On average the loss of both is half the cross-entropy with the purchase and half that with SASRec's probabilities, which
also name what else could have been bought. Where rows share their beginnings (token trees), such a row costs little
more than the tokens of a SID.

Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from minionerec.data.files import Interaction

BEST = 20  # of SASRec's items, which are sampled from
_BATCH = 512  # rows that SASRec scores together


def with_sampled(rows: Iterable[Interaction], folder: str, seed: int) -> Iterator[Interaction]:
    """The rows, each followed by one whose target is sampled from the BEST items of the SASRec model in a folder, by
    their probabilities. It has no title, so tasks that need one leave it out. The same seed samples the same targets.
    Raises InputError if the model cannot be loaded.
    """
    import numpy as np

    from minionerec import sasrec
    from minionerec.data.encoding import batches

    model, chance = sasrec.load(folder), np.random.default_rng(seed)
    for batch in batches(rows, _BATCH):
        logps, best = model.logps([row.sid_history for row in batch]).topk(min(BEST, len(model.sids)), dim=1)
        # The largest of log-probabilities with Gumbel noise is a sample of their distribution.
        places = (logps.numpy() + chance.gumbel(size=logps.shape)).argmax(axis=1)
        for row, items, place in zip(batch, best.tolist(), places.tolist(), strict=True):
            yield row
            if not model.number.keys().isdisjoint(row.sid_history):
                yield replace(row, sid=model.sids[items[place]], title="")
