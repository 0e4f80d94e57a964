"""What the server tells Prometheus."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server, apart from those of any other in the process."""

    def __init__(self, sizes: tuple[int, ...]):
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "crossvit_requests", "Requests that were answered", ["endpoint", "status"], registry=self._registry
        )
        self.request_seconds = self._seconds("request", "From a request to the end of its answer", ["endpoint"])
        self.decode_seconds = self._seconds("decode", "Decoding a picture and making the model's input of it")
        self.queue_seconds = self._seconds("queue", "A picture's waiting for its batch")
        self.compute_seconds = self._seconds("compute", "Computing a batch")
        self.batch = Histogram(
            "crossvit_batch_pictures", "Pictures in a batch, without padding", buckets=sizes, registry=self._registry
        )
        self.queue = Gauge("crossvit_queue_pictures", "Pictures that wait for a batch", registry=self._registry)
        self.held = Gauge(
            "crossvit_held_pictures", "Pictures in the server: read, waiting or computed", registry=self._registry
        )
        self.ready = Gauge("crossvit_ready", "1 while the server takes pictures", registry=self._registry)

    def _seconds(self, name: str, what: str, labels: Sequence[str] = ()) -> Histogram:
        title = f"crossvit_{name}_seconds"
        return Histogram(title, what, labels, buckets=_SECONDS, registry=self._registry)

    def count(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self.requests.labels(endpoint, status).inc()
        self.request_seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus's format."""
        return generate_latest(self._registry)
