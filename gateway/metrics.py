"""Prometheus metrics of a gateway: prefix `moering_`, vLLM's suffixes. No label per expert or per request."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Samples = Callable[[], dict[str, float]]
ByRouter = Callable[[], dict[str, dict[str, float]]]
"""Router → name → value."""
ByLayer = Callable[[], dict[str, dict[str, list[float]]]]
"""Name → router → a value for each layer; 0 where there is none."""


class Metrics:
    """What requests add to. State that exists elsewhere is read when somebody scrapes (see `expose`)."""

    def __init__(self) -> None:
        self._registry = r = CollectorRegistry()
        self.prompt_tokens = Counter("moering_prompt_tokens", "Prompt tokens of accepted requests", registry=r)
        self.generation_tokens = Counter("moering_generation_tokens", "Tokens generated, by ended choice", registry=r)
        self.requests = Counter(
            "moering_request_success", "Ended choices by finish reason (error and abort too)", ["finished_reason"],
            registry=r,
        )  # fmt: skip
        self.time_to_first_token = Histogram(
            "moering_time_to_first_token_seconds", "Admission to first token", buckets=_LATENCY_S, registry=r
        )
        self.inter_token_latency = Histogram(
            "moering_inter_token_latency_seconds", "Between tokens of a choice", buckets=_TOKEN_S, registry=r
        )
        self.e2e_latency = Histogram(
            "moering_e2e_request_latency_seconds", "Admission to last token", buckets=_LATENCY_S, registry=r
        )
        self.http_responses = Counter("moering_http_responses", "HTTP responses by status", ["status"], registry=r)

    def expose(self, gauges: Samples, counters: Samples, router_counters: ByRouter, by_layer: ByLayer) -> None:
        """Also export `moering_<name>` for what the functions return at each scrape, `moering_router_<name>` for what
        each router counts. Those are not added up: such a sum would fall whenever a router leaves or starts again."""
        self._registry.register(_StateCollector(gauges, counters, router_counters, by_layer))

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)


class _StateCollector(Collector):
    def __init__(self, gauges: Samples, counters: Samples, router_counters: ByRouter, by_layer: ByLayer) -> None:
        self._gauges, self._counters = gauges, counters
        self._router_counters, self._by_layer = router_counters, by_layer

    def collect(self) -> Iterator[Metric]:
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(f"moering_{name}", name.replace("_", " "), value=value)
        for name, value in self._counters().items():
            yield CounterMetricFamily(f"moering_{name}", name.replace("_", " "), value=value)
        yield from self._of_routers()
        for name, routers in self._by_layer().items():
            family = GaugeMetricFamily(f"moering_{name}", name.replace("_", " "), labels=["router", "layer"])
            for router, values in routers.items():
                for layer, value in enumerate(values):
                    if value:
                        family.add_metric([router, str(layer)], value)
            yield family

    def _of_routers(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily] = {}
        for router, counters in self._router_counters().items():
            for name, value in counters.items():
                if name not in families:
                    text = f"router {name.replace('_', ' ')}"
                    families[name] = CounterMetricFamily(f"moering_router_{name}", text, labels=["router"])
                families[name].add_metric([router], value)
        yield from families.values()
