"""What /metrics tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..engine_thread import EngineStats, RequestStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1)


class Metrics:
    """The numbers of one server. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._prompt_tokens = self._counter("trtc_prompt_tokens", "Prompt tokens of ended requests")
        self._output_tokens = self._counter("trtc_generation_tokens", "Output tokens of ended requests")
        self._requests = self._counter(
            "trtc_requests", "Ended engine requests: stop, length, abort (cancelled), error", "outcome"
        )
        self._responses = self._counter("trtc_http_responses", "HTTP answers", "path", "status")
        self._ttft = self._histogram(
            "trtc_time_to_first_token_seconds", "Submission to first token", _SECONDS
        )
        self._tpot = self._histogram(
            "trtc_time_per_output_token_seconds", "Time per token after the first", _TOKEN_SECONDS
        )
        self._e2e = self._histogram("trtc_request_seconds", "Submission to last token", _SECONDS)

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Reports what `stats` returns whenever somebody asks."""
        self.registry.register(_EngineGauges(stats))

    def request_ended(self, stats: RequestStats) -> None:
        self._requests.labels(stats.outcome).inc()
        self._prompt_tokens.inc(stats.num_prompt_tokens)
        self._output_tokens.inc(stats.num_output_tokens)
        if stats.ttft_s is not None:
            self._ttft.observe(stats.ttft_s)
        if stats.outcome in ("stop", "length"):
            self._e2e.observe(stats.e2e_s)
            if stats.tpot_s is not None:
                self._tpot.observe(stats.tpot_s)

    def responded(self, path: str, status: int) -> None:
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self.registry)


class _EngineGauges(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self._stats()
        for name, help_text, value in (
            ("trtc_sequences_running", "Sequences in the engine's steps", stats.num_running),
            ("trtc_sequences_waiting", "Sequences in the engine's queue", stats.num_waiting),
            ("trtc_kv_cache_pages_used", "Pages of the KV cache that sequences hold", stats.num_used_pages),
            ("trtc_kv_cache_pages", "Pages of the KV cache", stats.num_pages),
        ):
            yield GaugeMetricFamily(name, help_text, value=value)
