import csv
import random

import numpy as np

from minionerec.prepare import row_files
from minionerec.prepare.cleaning import SPLITS


def test_rows_are_those_of_csv_and_of_lists(tmp_path, monkeypatch):
    """To the byte, whatever is in a title or the name of a user, in pieces of any size."""
    rng = random.Random(5)
    texts = ["".join(rng.choices("ab ,'\"\\é\x7f漢", k=rng.randint(0, 5))) for _ in range(60)]
    users, titles = [text or "u" for text in texts[:20]], texts[20:]
    sids = [f"<a_{i}><b_0>" for i in range(len(titles))]
    row = np.dtype([("user", "<i4"), ("item", "<i4"), ("time", "<i8"), ("split", "u1"), ("history", "<i4", (3,))])
    rows = np.zeros(500, row)
    for one in rows:
        past = [rng.randrange(len(titles)) for _ in range(rng.randint(1, 3))]
        one["user"], one["item"], one["split"] = rng.randrange(20), rng.randrange(len(titles)), rng.randrange(3)
        one["history"] = [-1] * (3 - len(past)) + past
    for number, chunk in enumerate((1, 2000, 1 << 24)):
        monkeypatch.setattr(row_files, "CHUNK", chunk)
        folder = tmp_path / str(number)
        folder.mkdir()
        paths = [str(folder / split / "any.csv") for split in SPLITS]
        row_files.write_rows(paths, [rows[:150], rows[150:]], users, sids, titles)
        for place, split in enumerate(SPLITS):
            with open(tmp_path / "expected.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(row_files.COLUMNS)
                for user, item, _, _, padded in rows[rows["split"] == place].tolist():
                    past = [i for i in padded.tolist() if i >= 0]
                    of_past = [titles[i] for i in past], [sids[i] for i in past]
                    writer.writerow((users[user], of_past[0], titles[item], past, item, of_past[1], sids[item]))
            assert (folder / split / "any.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
