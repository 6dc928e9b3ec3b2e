"""What a server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server. Paths are those of the interface, so a client cannot add series."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, processor time and open files
        self.requests = Counter(
            "minionerec_requests",
            "Requests by path and status; 499: the client left.",
            ("path", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "minionerec_request_seconds", "Seconds of a request.", ("path",), registry=registry, buckets=SECONDS
        )
        self.batches = Histogram(
            "minionerec_batch_size", "Requests of a batch.", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.model_seconds = Histogram(
            "minionerec_model_seconds", "Seconds of the model for a batch.", registry=registry, buckets=SECONDS
        )
        self.failures = Counter("minionerec_model_failures", "Batches on which the model failed.", registry=registry)
        self.dropped = Counter(
            "minionerec_dropped", "Requests whose clients left before their turn.", registry=registry
        )
        self.refused = Counter("minionerec_refused_connections", "Connections refused or closed.", registry=registry)
        self._waiting = Gauge("minionerec_waiting", "Requests that wait for the model.", registry=registry)

    def watch(self, waiting: Callable[[], int]) -> None:
        """Reads the number of waiting requests from `waiting`."""
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """The numbers, in the text format of Prometheus."""
        return generate_latest(self.registry)
