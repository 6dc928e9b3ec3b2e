"""recommend.py writes a file of requests in chunks, and continues after a kill."""

import pytest
from helpers import run_command
from processes import start_command
from recommended import flags_of, recommended, requests_file

from minionerec.serving import batch


def test_batches_stay_within_their_chunk(files, checkpoint, tmp_path, monkeypatch):
    """So a file is ranked in the same batches, whether its chunks come one by one or as many as there are processes."""
    from minionerec.decoding import ranking

    rows = [{"history": [str(i % 40) for i in range(n % 5 + 1)]} for n in range(20)]
    path = requests_file(tmp_path / "r", rows)
    batches = []

    def decode(model, input_ids, *args, real=ranking.constrained_beam_search, **more):
        batches.append(input_ids.tolist())
        return real(model, input_ids, *args, **more)

    monkeypatch.setattr(batch, "BATCHES", 2)
    monkeypatch.setattr(ranking, "constrained_beam_search", decode)
    written = []
    for processes in (1, 3):

        def several(*args, real=batch.write_recommendations, processes=processes):
            return real(*args[:5], args[5] * processes, args[6])

        with monkeypatch.context() as patch:
            patch.setattr(batch, "write_recommendations", several)
            recommended(files, checkpoint, tmp_path / "o.jsonl", histories=path, batch_size=4)
        written.append(((tmp_path / "o.jsonl").read_bytes(), batches[:]))
        batches.clear()
    assert written[0] == written[1] and len(written[0][1]) == 5


def test_a_recorded_penalty_is_no_part_of_the_model(tmp_path):
    """A run with --seen_penalty 1 continues after an evaluation that chose one meanwhile."""
    (tmp_path / "model.safetensors").write_text("weights")
    before = batch.settings_of({"seen_penalty": 1.0}, [], str(tmp_path))
    (tmp_path / "penalty-0123456789ab.json").write_text("{}")
    assert batch.settings_of({"seen_penalty": 1.0}, [], str(tmp_path)) == before
    (tmp_path / "adapter_config.json").write_text("{}")
    assert batch.settings_of({"seen_penalty": 1.0}, [], str(tmp_path)) != before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("garbage", [b"", b'{"history": ["half a li'])
def test_a_killed_run_continues_to_the_same_bytes(files, checkpoint, tmp_path, monkeypatch, garbage):
    """Killed after the first chunk of three, in the middle of a line or not; then with the last lines lost."""
    rows = [{"history": [str(i % 40) for i in range(n % 5 + 1)]} for n in range(20)]
    path = requests_file(tmp_path / "r", rows)
    monkeypatch.setattr(batch, "BATCHES", 2)
    flags = {"histories": path, "batch_size": 4}
    recommended(files, checkpoint, tmp_path / "whole.jsonl", **flags)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert whole.count(b"\n") == 20

    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    chunks = []

    def killing(chunk, real=batch._line):
        chunks.append(chunk)
        if len(chunks) > 8:
            raise Killed
        return real(chunk)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_line", killing)
        with pytest.raises(Killed):
            run_command("recommend.py", **flags_of(files, checkpoint, output, **flags))
    assert partial.read_bytes() == b"".join(whole.splitlines(keepends=True)[:8]) and not output.exists()
    with open(partial, "ab") as file:
        file.write(b"".join(whole.splitlines(keepends=True)[8:11]) + garbage)

    refused = run_command("recommend.py", **flags_of(files, checkpoint, output, **flags, K=3))
    assert refused.returncode == 2 and "holds rows of a run with other flags, files or model" in refused.stderr
    done = run_command("recommend.py", **flags_of(files, checkpoint, output, **flags))
    assert "11 of 20 rows are there already" in done.stdout
    assert output.read_bytes() == whole and sorted(tmp_path.glob("*.partial*")) == []


@pytest.mark.slow
def test_two_processes_write_what_one_writes(files, checkpoint, tmp_path):
    """The bytes: the file has several chunks of one process."""
    path = requests_file(tmp_path / "r", [{"history": [str(i % 40) for i in range(n % 5 + 1)]} for n in range(70)])
    recommended(files, checkpoint, tmp_path / "one.jsonl", batch_size=2, histories=path)
    flags = flags_of(files, checkpoint, tmp_path / "two.jsonl", batch_size=2, histories=path)
    started = start_command("recommend.py", {**flags, "histories": path}, ranks=2)
    assert started.wait() == [0, 0], started.errors[-3000:]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
