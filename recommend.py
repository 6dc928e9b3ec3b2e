"""Recommends items for one history, for a file of histories, or over HTTP.

The prompts, the base and its storage are those that the checkpoint records, as in evaluate.py. What a request may say
is in minionerec/serving/requests.py.

    python recommend.py --model out/lora/final_checkpoint --info_file info.txt --history "12, 40, 7"
    python recommend.py --model ... --info_file info.txt --histories requests.jsonl --output recommendations.jsonl
    python recommend.py --model ... --info_file info.txt --serve 8000
"""

import os
import re
import socket
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from minionerec import cli, world
from minionerec.blending import Scoring
from minionerec.checkpoint import Checkpoint, read_model
from minionerec.data.files import (
    notes_on_titles,
    open_text,
    read_info_items,
    read_item_ids,
    read_json_object,
    with_original_ids,
)
from minionerec.data.items import ItemColumns, Items, read_item_list
from minionerec.data.prompts import Prompts
from minionerec.errors import InputError, Problems
from minionerec.flags import (
    DeviceFlags,
    PromptFlags,
    ScoreFlags,
    above_zero,
    command,
    flag,
    number_or_auto,
)
from minionerec.locks import hold, lock_of_new
from minionerec.process_memory import importing
from minionerec.serving.requests import Request, RequestReader

if TYPE_CHECKING:
    from minionerec.ranking import Ranker


SERVER_PACKAGES = ("fastapi", "uvicorn", "prometheus-client")


def _port(value: int) -> str | None:
    return None if 0 <= value < 65536 else "must be a port, from 1 to 65535"


@dataclass(frozen=True, kw_only=True)
class RecommendFlags(PromptFlags, ScoreFlags, DeviceFlags):
    """The flags of recommend.py."""

    model: str = flag("", "a whole checkpoint, or an adapter, which names its base.")
    adapter: str = flag("", "an adapter to load on model, instead of on the base that it names.")
    info_file: str = flag("", "the catalogue: a line per item with SID, title and item id, separated by tabs.")
    history: str = flag(
        "",
        "one history, oldest first: item ids or SIDs separated by commas, one title, or a JSON list of any of them.",
    )
    histories: str = flag(
        "",
        'a file of histories: JSON lines such as {"history": ["12", "40"]}, or a CSV file with the column history '
        "(lists of items) or history_item_sid.",
    )
    output: str = flag("", "file for the recommendations for histories, as JSON lines.")
    K: int = flag(10, "items to recommend.", above_zero)
    num_beams: int = flag(50, "SIDs to rank; more beams find better items.", above_zero)
    batch_size: int | Literal["auto"] = flag(
        8,
        "histories per forward pass; auto for as many as the memory of the GPU is predicted to hold (8 on a CPU). It "
        "is halved when memory runs out.",
        number_or_auto,
    )
    train_file: str = flag("", "CSV of training interactions; items that share a SID are ordered by popularity there.")
    exclude_seen: bool | Literal["earlier"] = flag(
        False, "do not recommend items of the history; earlier: all but the last one."
    )
    allow: str = flag("", "file of item ids, one per line; no others are recommended.")
    deny: str = flag("", "file of item ids, one per line, that are not recommended.")
    where: str = flag(
        "",
        "a condition on a column of item_meta_path, such as brand=3M or price<20 (also <=, > and >=); only items that "
        "meet it are recommended.",
    )
    item_meta_path: str = flag(
        "",
        "JSON of item id to title, description and other columns. It is needed for where, and for requests that name "
        "items by the shop's own ids (original_id).",
    )
    original_ids: bool = flag(
        False,
        "requests, allow and deny name items by the original_id of item_meta_path only. Without it they may use both "
        "ids, unless one could mean two items; answers have both.",
    )
    serve: int = flag(0, "port to recommend on over HTTP, with a page at /.", _port)
    host: str = flag(
        "127.0.0.1",
        "the address to listen on with serve; 0.0.0.0 for every network.",
        lambda value: None if value.strip() else "must be an address, such as 127.0.0.1",
    )
    api_key_file: str = flag("", "file of keys for serve, one per line; each request must then have one.")
    allowed_hosts: str = flag(
        "",
        "host names that requests may use for the server, separated by commas, such as shop.example,*.shop.example; * "
        "for any. By default any, or only localhost if the server listens to this machine only.",
    )
    max_waiting: int = flag(256, "requests that may wait with serve; further ones are refused (503).", above_zero)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.K > self.num_beams > 0:
            problems.add(f"--K {self.K}: must be at most --num_beams {self.num_beams}")
        ways = [name for name in ("history", "histories", "serve") if getattr(self, name)]
        if not ways:
            problems.add("--history is missing; give one, a file of --histories, or --serve 8000")
        elif len(ways) > 1:
            problems.add(f"--{' and --'.join(ways)} exclude each other; give one of them")
        if self.histories:
            self.check_output(problems, "output", "the recommendations", f"{self.output}.partial")
        elif self.output:
            problems.add("--output has no effect without --histories")
        if self.histories:
            world.check_world(problems)
        for name in ("where", "original_ids"):
            if getattr(self, name) and not self.item_meta_path:
                problems.add(f"--{name} needs --item_meta_path, the file with the columns of the items")
        if self.serve and not _port(self.serve):
            self._check_server(problems)
        for name in ("api_key_file", "allowed_hosts"):
            if getattr(self, name) and not self.serve:
                problems.add(f"--{name} has no effect without --serve")
        for name in self.hosts:
            if not re.fullmatch(r"(\*\.)?[\w.-]+|\[[\da-fA-F:.]+\]|\*", name):
                problems.add(f"--allowed_hosts {name!r}: must be a name such as shop.example, *.shop.example or [::1]")

    @property
    def url(self) -> str:
        """Where the server listens."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.serve}"

    @property
    def hosts(self) -> list[str]:
        """The names that a request may call the server. One that listens to this machine only answers to no other name:
        a page of another site could otherwise ask it, by a name that leads here."""
        if self.allowed_hosts:
            return [name.strip() for name in self.allowed_hosts.split(",")]
        local = self.host in ("localhost", "::1") or self.host.startswith("127.")
        names = ["localhost", "127.0.0.1", "[::1]"]
        return list(dict.fromkeys([*names, self.host.replace("::1", "[::1]")])) if local else ["*"]

    def _check_server(self, problems: Problems) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problems.add(f"--serve {self.serve}: one process serves; start it without torchrun")
        missing = [name for name in SERVER_PACKAGES if find_spec(name.replace("-", "_")) is None]
        if missing:
            problems.add(
                f"--serve {self.serve}: needs {' and '.join(missing)}; pip install {' '.join(SERVER_PACKAGES)}"
            )
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            with socket.create_server((self.host, self.serve), family=family):
                pass
        except (OSError, UnicodeError) as error:  # a name that cannot be one of a host raises the latter
            problems.add(f"--serve {self.serve}: cannot listen on --host {self.host}: {error}")


@dataclass(frozen=True)
class RecommendInput:
    """What recommends, checked: the checkpoint, where its base is, the wording, the catalogue, and what reads requests.

    Attributes:
        scoring: what changes the model's scores.
        requests: how many `histories` has.
        request: of --history.
        settings, done: of an output file (see `serving.batch`).
        keys: of --api_key_file.
    """

    checkpoint: Checkpoint
    base: str
    prompts: Prompts
    items: Items
    reader: RequestReader
    scoring: Scoring
    request: Request | None
    requests: int
    settings: dict[str, object]
    done: int
    keys: list[str]
    notes: list[str]


def read_input(flags: RecommendFlags) -> RecommendInput:
    """Checks the flags, the checkpoint, the catalogue and every request. Raises InputError with everything that is
    wrong."""
    problems = flags.problems()
    return read_files(problems, flags)


def read_files(problems: Problems, flags: RecommendFlags) -> RecommendInput:
    """`read_input` after the flags were checked: a server reads its files again when it takes a new checkpoint."""
    checkpoint, base, prompts = read_model(problems, "model", flags.model, flags.adapter, flags)
    purchases = problems.attempt(read_item_ids, flags.train_file, "train_file") if flags.train_file else None
    listed = problems.attempt(read_info_items, flags.info_file)
    path = flags.item_meta_path
    metadata = problems.attempt(read_json_object, path, "item_meta_path") if path else None
    listed = with_original_ids(listed, metadata) if listed and metadata else listed
    by_original = flags.original_ids and metadata is not None
    items = listed and problems.attempt(Items, listed, flags.info_file, purchases or (), by_original)
    reader = items and _reader(problems, flags, items, metadata)
    scoring = None
    if checkpoint and listed:
        which = flags, checkpoint, listed, flags.info_file
        scoring = problems.attempt(lambda: Scoring.read(*which).ready())
    request, count = None, 0
    if reader and flags.history:
        request = problems.attempt(lambda: reader.read({"history": reader.parse_history(flags.history)}))
    elif reader and flags.histories:
        count = problems.attempt(lambda: sum(1 for _ in reader.read_file(flags.histories))) or 0
    settings: dict[str, object] = {}
    done = 0
    if checkpoint and scoring and not problems and flags.output:
        from minionerec.serving.batch import check_output, settings_of

        names = ("info_file", "histories", "train_file", "allow", "deny", "item_meta_path", "prompt_file")
        files = [path for name in names if (path := getattr(flags, name))]
        files += scoring.blend.files if scoring.blend else []
        weight = {"blend_weight": scoring.blend.weight} if scoring.blend else {}
        numbers = {**weight, "seen_penalty": scoring.seen_penalty}
        settings = settings_of({**flags.to_dict(), "output": "", **numbers}, files, checkpoint.path)
        problems.attempt(hold, "output", flags.output, lock_of_new)  # before the rows that are there are counted
        done = problems.attempt(check_output, flags.output, settings) or 0
    keys = problems.attempt(_read_keys, flags.api_key_file) if flags.api_key_file else []
    problems.check()
    assert keys is not None
    assert checkpoint and base and prompts and items and reader and scoring  # nothing was wrong
    pairs = ((item.id, item.sid) for item in items.all)
    notes = checkpoint.notes_on_catalogue(pairs, f"--info_file {flags.info_file}")
    notes += notes_on_titles(items.all, metadata or {}, f"--item_meta_path {path}")
    notes += checkpoint.notes_on_wording(prompts, flags.category, flags.prompt_file) + items.notes
    notes += scoring.notes(flags.num_beams, flags.exclude_seen)
    return RecommendInput(
        checkpoint, base, prompts, items, reader, scoring, request, count, settings, done, keys, notes
    )


def _read_keys(path: str) -> list[str]:
    """The keys of a file, one per line."""
    with open_text(path, "api_key_file") as file:
        try:
            keys = [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"--api_key_file {path}: is not UTF-8 text: {error.reason}") from None
    bad = [number for number, key in enumerate(keys, 1) if not re.fullmatch(r"[!-~]+", key)]
    if bad:  # the key itself stays out of logs
        raise InputError(f"--api_key_file {path}: key {bad[0]} has spaces or other than ASCII; a header cannot have it")
    if not keys:
        raise InputError(f"--api_key_file {path}: lists no keys")
    return keys


def _reader(problems: Problems, flags: RecommendFlags, items: Items, metadata: dict | None) -> RequestReader:
    """What reads requests, with the constraints of the flags."""
    only = []
    if flags.allow and (allowed := problems.attempt(read_item_list, flags.allow, "allow", items)):
        only.append(allowed)
    if flags.deny and (denied := problems.attempt(read_item_list, flags.deny, "deny", items)):
        only.append(frozenset(range(len(items))) - denied)
    columns = problems.attempt(ItemColumns, flags.item_meta_path, items, metadata) if metadata is not None else None
    if flags.where and columns:
        try:
            only.append(columns.where(flags.where))
        except InputError as error:
            problems.add(f"--{error}")
    most = max(flags.num_beams, flags.K, 1)  # flags that do not fit together are reported by themselves
    return RequestReader(items, columns, max(flags.K, 1), most, flags.exclude_seen, tuple(only))


def load(flags: RecommendFlags, inputs: RecommendInput) -> "Ranker":
    """Loads the model and the trie of the catalogue."""
    with importing():
        from minionerec.ranking import Ranker

    return Ranker(
        inputs.checkpoint,
        inputs.prompts,
        inputs.items.sids,
        f"{'--adapter' if flags.adapter else '--model'} {inputs.checkpoint.path}",
        f"--info_file {flags.info_file} belongs to a different catalogue, or sft.py must make the checkpoint again",
        items=inputs.items,
        compile=flags.compile,
        num_beams=flags.num_beams,
        batch_size=flags.batch_size,
        blend=inputs.scoring.blend,
        seen_penalty=inputs.scoring.seen_penalty or 0.0,
    ).load_model(inputs.base, fast=True)


def serve(flags: RecommendFlags) -> None:
    """Recommends over HTTP until a signal stops it."""
    read = [read_input(flags)]  # taken out when it is loaded: no name keeps it after a reload
    keys = read[0].keys

    from minionerec.serving.connections import run
    from minionerec.serving.server import make_app, set_keys
    from minionerec.serving.worker import Loaded

    def load_checkpoint() -> Loaded:
        """In the thread that asks the model. From the second time on, the files are read again."""
        again = not read
        inputs = read_files(Problems(), flags) if again else read.pop()
        with importing():
            from tqdm import tqdm

            from minionerec.model import device

        device.process_state()
        for line in inputs.notes:
            print(line, flush=True)
        ranker = load(flags, inputs)
        set_keys(app, inputs.keys)  # a key that is no longer in the file opens nothing
        if not again:
            print(f"{flags.url} recommends from {len(inputs.items)} items; Ctrl-C stops", flush=True)
        return Loaded(inputs.reader, lambda requests: ranker.answer(requests, tqdm(disable=True)), ranker.batch_size)

    app = make_app(load_checkpoint, flags.max_waiting, keys, flags.hosts)
    run(app, flags.host, flags.serve)
    if app.state.worker.thread.is_alive():  # in the middle of a batch or of loading
        sys.stdout.flush()
        os._exit(0)  # Python would end the thread inside torch, which aborts the process


@command(RecommendFlags)
def recommend(flags: RecommendFlags) -> None:
    """Recommends items for one history, for a file of histories, or over HTTP."""
    # Over HTTP, until it is stopped. It says that the model is loading meanwhile.
    if flags.serve:
        serve(flags)
        return

    # Check the flags, the checkpoint, the catalogue and every request, before anything heavy is imported.
    inputs = read_input(flags)

    with importing():
        world.watch()
        from tqdm import tqdm

        from minionerec.model import device
        from minionerec.serving import batch
        from minionerec.training import nodes

    state = device.process_state()
    nodes.check_same(flags.to_dict())
    # An evaluation may have recorded other numbers since the first process read them.
    scoring = inputs.scoring
    inputs = replace(inputs, scoring=scoring.with_numbers(*nodes.first_decides(lambda: scoring.numbers)))
    for line in inputs.notes:
        state.print(line)
    ranker = load(flags, inputs)

    # One history: a line for each item.
    if inputs.request:
        (items,) = ranker.answer([inputs.request], tqdm(disable=True))
        if not items:
            state.print("nothing is left to recommend: the constraints allow no item of the catalogue")
        for place, item in enumerate(items, 1):
            ids = "  ".join(str(item[name]) for name in ("id", "original_id") if name in item)
            state.print(f"{place:>3}  {item['score']:9.4f}  {ids}  {item['sid']}  {item['title']}")
        return

    # A file of histories: a line of JSON for each. The processes of a distributed run divide its batches.
    kept = nodes.first_decides(lambda: inputs.done)
    if kept:
        state.print(f"{flags.output}.partial: {kept} of {inputs.requests} rows are there already")
    rows = inputs.reader.read_file(flags.histories)
    if flags.batch_size == "auto":
        state.print(f"--batch_size auto: {ranker.batch_size} histories")
    chunk = batch.BATCHES * ranker.batch_size
    with tqdm(total=inputs.requests, unit="row", leave=False, disable=not state.is_main_process) as bar:
        count = batch.write_recommendations(
            flags.output,
            inputs.settings,
            kept,
            rows,
            lambda requests: ranker.answer(requests, bar, chunk),
            chunk * state.num_processes,
            state.is_main_process,
        )
    if ranker.encoder.control_note:
        state.print(ranker.encoder.control_note)
    state.print(f"{count} rows in {flags.output}")
    if state.is_main_process and (empty := batch.count_empty(flags.output)):
        print(f"{empty} of them have no items: their constraints allow none of the catalogue")


if __name__ == "__main__":
    cli.run(recommend)
