"""What /metrics tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine_thread import EngineStats, RequestStats
from .errors import CLIENT_GONE

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1)


class Metrics:
    """The numbers of one server. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.num_refused = 0
        """HTTP answers with an error, of the client or the server."""
        self._requests = self._counter(
            "trtc_requests",
            "Ended engine requests: stop, length, timeout, abort (cancelled), error",
            "outcome",
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
        self.registry.register(_EngineNumbers(stats))

    def request_ended(self, stats: RequestStats) -> None:
        self._requests.labels(stats.outcome).inc()
        if stats.ttft_s is not None:
            self._ttft.observe(stats.ttft_s)
        if stats.outcome in ("stop", "length"):
            self._e2e.observe(stats.e2e_s)
            if stats.tpot_s is not None:
                self._tpot.observe(stats.tpot_s)

    def responded(self, path: str, status: int) -> None:
        self.num_refused += status >= 400 and status != CLIENT_GONE
        self._responses.labels(path, str(status)).inc()

    def responses_by_status(self) -> dict[str, int]:
        """HTTP answers since the start."""
        counts: dict[str, int] = {}
        for family in self._responses.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    status = sample.labels["status"]
                    counts[status] = counts.get(status, 0) + int(sample.value)
        return counts

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self.registry)


class _EngineNumbers(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self._prompt_tokens = 0

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        # a preempted request computes its prompt again; a counter does not go back
        self._prompt_tokens = max(self._prompt_tokens, stats.num_prompt_tokens)
        prompts, outputs = self._prompt_tokens, stats.num_output_tokens
        looked_up, found = stats.num_looked_up_pages, stats.num_found_pages
        for name, help_text, value in (
            ("trtc_prompt_tokens", "Prompt tokens taken in, of every sequence", prompts),
            ("trtc_generation_tokens", "Output tokens chosen", outputs),
            ("trtc_prefix_cache_queries", "Full prompt pages looked up in the prefix cache", looked_up),
            ("trtc_prefix_cache_hits", "Full prompt pages that the prefix cache had", found),
            ("trtc_guessed_tokens", "Tokens that prompt lookup tried", stats.num_guessed_tokens),
            ("trtc_accepted_tokens", "Tokens that prompt lookup guessed rightly", stats.num_accepted_tokens),
        ):
            yield CounterMetricFamily(name, help_text, value=value)
        used, known = stats.num_used_pages, stats.num_cached_pages
        for name, help_text, value in (
            ("trtc_sequences_running", "Sequences in the engine's steps", stats.num_running),
            ("trtc_sequences_waiting", "Sequences in the engine's queue", stats.num_waiting),
            ("trtc_kv_cache_pages_used", "Pages of the KV cache that sequences hold", used),
            ("trtc_kv_cache_pages_cached", "Free pages that the prefix cache still knows", known),
            ("trtc_kv_cache_pages", "Pages of the KV cache", stats.num_pages),
        ):
            yield GaugeMetricFamily(name, help_text, value=value)
