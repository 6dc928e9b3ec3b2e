"""Runs of recommend.py that rank files of requests."""

import json
from pathlib import Path

from helpers import succeed


def flags_of(files, checkpoint, output=None, **more) -> dict:
    flags = {"model": checkpoint, "info_file": files["info"], "num_beams": 20, "K": 20}
    flags |= {"histories": files["test"], "output": output} if output else {}
    return {**flags, **more}


def recommended(files, checkpoint, output, **more) -> list[dict]:
    succeed("recommend.py", **flags_of(files, checkpoint, output, **more))
    assert not list(output.parent.glob("*.partial*"))
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def requests_file(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
