"""What the server has done so far, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from fiddler_run.generation.answer import Answer
from fiddler_run.plan.schema import Plan


class Metrics:
    def __init__(self, plan: Plan):
        self._block_bytes = plan.block_bytes
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests for an answer", ["status"])
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._reused = self._counter("reused_tokens", "Tokens of prompts that were still cached")
        self._output = self._counter("output_tokens", "Generated tokens")
        self._bytes = self._counter("expert_bytes", "Bytes of experts by resource", ["resource"])
        self.waiting = self._gauge("waiting_requests", "Requests that wait for their turn")
        self.running = self._gauge("running_requests", "Requests that are being answered")
        self._speed = self._gauge("decode_tokens_per_second", "Speed of the last answer")
        self._ttft = self._gauge("first_token_seconds", "Time to first token of the last answer")
        self._hits = self._gauge("gpu_hit_ratio", "GPU hit rate of the last answer")
        predicted = plan.predicted
        for name, what, value in (
            ("planned_decode_tokens_per_second", "Predicted speed", predicted.decode_tokens_per_s),
            ("bound_decode_tokens_per_second", "Bound of any plan", predicted.bound_tokens_per_s),
            ("planned_gpu_hit_ratio", "Predicted GPU hit rate", predicted.gpu_hit_rate),
        ):
            self._gauge(name, what).set(value)

    def count(self, answer: Answer) -> None:
        measured = answer.measured
        self._prompt.inc(measured.prompt_tokens)
        self._reused.inc(measured.reused_tokens)
        self._output.inc(measured.output_tokens)
        if measured.output_tokens > 1:
            self._speed.set(measured.decode_tokens_per_s)
        self._ttft.set(measured.ttft_s)
        self._hits.set(measured.all_traffic.hit_rate)
        by_resource = measured.all_traffic.bytes_by_resource(self._block_bytes)
        for resource, carried_bytes in by_resource.items():
            self._bytes.labels(resource).inc(carried_bytes)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"fiddler_{name}", what, labels or [], registry=self._registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"fiddler_{name}", what, registry=self._registry)
