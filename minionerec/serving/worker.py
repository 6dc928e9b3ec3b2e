"""The thread that owns the model of a server: loads it, asks it, and replaces it by a new checkpoint.

Requests that wait when it is free share a batch. Only this thread touches the model: loading one sets the default dtype
of the whole process, so no other model may compute meanwhile.
"""

import gc
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from minionerec.errors import InputError, RunError
from minionerec.serving.metrics import Metrics
from minionerec.serving.requests import Request, RequestReader

log = logging.getLogger("minionerec.serve")

ENDING_SECONDS = 1  # for a request to end after it has its answer

Recommended = list[dict[str, object]]


class TooManyWaiting(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint with its catalogue. A request is read and answered by the same one.

    Attributes:
        batch_size: most requests of a call of `recommend`.
    """

    reader: RequestReader
    recommend: Callable[[Sequence[Request]], list[Recommended]]
    batch_size: int


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that waits. `id` names it in the log; `client` is who asked."""

    request: Request
    loaded: Loaded
    id: str
    client: str
    answer: "Future[Recommended]" = field(default_factory=Future)


class Worker:
    """Loads a checkpoint as soon as it is made, then answers.

    Attributes:
        loaded: what answers now; None until the first checkpoint is loaded.
        error: why that could not be loaded.
        failing: whether the model failed when it was last asked.
    """

    def __init__(self, load: Callable[[], Loaded], max_waiting: int, metrics: Metrics):
        self.load, self.max_waiting, self.metrics = load, max_waiting, metrics
        self.loaded: Loaded | None = None
        self.error: BaseException | None = None
        self.failing = False
        self._waiting: deque[_Waiting | Future[Loaded]] = deque()  # a future of what is loaded asks for a reload
        self._reload: Future[Loaded] | None = None
        self._closed = False
        self._changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="recommend", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def submit(self, request: Request, loaded: Loaded, id: str, client: str = "") -> "Future[Recommended]":
        """The items of a request, in the future; cancelled, it is not asked for. Raises TooManyWaiting, here, or in the
        future where a client that waits for fewer takes the place."""
        waiting = _Waiting(request, loaded, id, client)
        with self._changed:
            if len(self._waiting) >= self.max_waiting:  # those whose clients left take no place
                self._drop_given_up()
            if len(self._waiting) >= self.max_waiting:
                self._make_place(client)
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.answer

    def reload(self) -> "Future[Loaded] | None":
        """A new checkpoint, in the future. Requests that wait are answered before by the one of now, and those that
        come until it is loaded wait. None while another reload is under way, or nothing is loaded."""
        with self._changed:
            if self.loaded is None or self._closed or (self._reload and not self._reload.done()):
                log.warning("a checkpoint is being loaded already")
                return None
            self._reload = Future()
            self._reload.set_running_or_notify_cancel()  # a client that leaves does not end it
            self._waiting.append(self._reload)
            self._changed.notify()
            return self._reload

    def close(self, seconds: float) -> None:
        """Drops what waits, and gives the thread `seconds` to end what it does."""
        with self._changed:
            self._closed = True
            for one in self._waiting:
                (one.answer if isinstance(one, _Waiting) else one).cancel()
            self._waiting.clear()
            self._changed.notify()
        self.thread.join(seconds)

    def _make_place(self, client: str) -> None:
        """Drops the last request of the client that waits for most, so that no client keeps the others out. Raises
        TooManyWaiting if that is this client, or as good as it."""
        waiting = [one for one in self._waiting if isinstance(one, _Waiting)]
        counts = Counter(one.client for one in waiting)
        greedy = max(counts, key=counts.__getitem__, default=client)
        if counts[greedy] <= counts[client] + 1:
            raise TooManyWaiting
        last = next(one for one in reversed(waiting) if one.client == greedy)
        self._waiting.remove(last)
        last.answer.set_exception(TooManyWaiting())

    def _drop_given_up(self) -> None:
        kept = deque(one for one in self._waiting if not (isinstance(one, _Waiting) and one.answer.cancelled()))
        self.metrics.dropped.inc(len(self._waiting) - len(kept))
        self._waiting = kept

    def _work(self) -> None:
        try:
            self.loaded = self.load()
        except BaseException as error:
            self.error = error
            return
        free_at = math.inf
        while True:
            with self._changed:
                left = None if free_at == math.inf else max(free_at - time.monotonic(), 0.0)
                self._changed.wait_for(lambda: self._waiting or self._closed, left)
                if self._closed:
                    return
                first = self._waiting[0] if self._waiting else None
                batch = self._take() if isinstance(first, _Waiting) else []
                if isinstance(first, Future):
                    self._waiting.popleft()
            if isinstance(first, _Waiting):
                self._answer(batch)
            elif first:
                self._replace(first)
            # A model that was replaced, or that did not load, is freed now, or when its last requests have ended.
            replaced = isinstance(first, Future) or (first is not None and first.loaded is not self.loaded)
            del first, batch
            if replaced or time.monotonic() >= free_at:
                gc.collect()
                free_at = time.monotonic() + ENDING_SECONDS if replaced else math.inf

    def _take(self) -> list[_Waiting]:
        """The next batch: requests to one checkpoint, without those whose clients have left."""
        batch: list[_Waiting] = []
        while self._waiting:
            one = self._waiting[0]
            if not isinstance(one, _Waiting) or len(batch) == one.loaded.batch_size:
                break
            if batch and one.loaded is not batch[0].loaded:
                break
            self._waiting.popleft()
            if one.answer.set_running_or_notify_cancel():
                batch.append(one)
            else:
                self.metrics.dropped.inc()
        return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        started = time.perf_counter()
        try:
            try:
                answers = batch[0].loaded.recommend([one.request for one in batch])
            finally:  # counted before anyone has an answer, and may ask for the counts
                self.metrics.batches.observe(len(batch))
                self.metrics.model_seconds.observe(time.perf_counter() - started)
            self.failing = False
            for one, items in zip(batch, answers, strict=True):
                one.answer.set_result(items)
            return
        except Exception as error:  # whatever it is, those who wait must know, and the next batch may do
            one_fails = isinstance(error, RunError) and len(batch) > 1
            if not one_fails:
                self.failing = True
                self.metrics.failures.inc()
                log.exception("the model failed on %s", ", ".join(one.id for one in batch))
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(_without_frames(error))
        if one_fails:  # one history may be what makes the model give NaN; halves find it in few passes
            self._answer(batch[: len(batch) // 2])
            self._answer(batch[len(batch) // 2 :])

    def _replace(self, reload: "Future[Loaded]") -> None:
        """Loads the checkpoint again. If that fails, the one of now stays."""
        log.info("loading the checkpoint again")
        try:
            self.loaded = self.load()
            self.failing = False
            log.info("loaded the checkpoint again: %d items", len(self.loaded.reader.items))
            reload.set_result(self.loaded)
        except Exception as error:
            if isinstance(error, InputError):
                log.error("the checkpoint stays as it was: %s", "; ".join(error.problems))
            else:
                log.exception("the checkpoint stays as it was")
            reload.set_exception(_without_frames(error))


def _without_frames(error: Exception) -> Exception:
    """An error that can be kept: the frames of its traceback hold the tensors of what failed."""
    if isinstance(error, InputError):
        return InputError(error.problems)
    return RuntimeError(f"{type(error).__name__}: {error}")
