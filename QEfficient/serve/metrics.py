# SPDX-License-Identifier: BSD-3-Clause
"""What Prometheus is told. Labels are names of adapters that exist, so that no client can make them grow."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


Snapshot = Callable[[], Mapping[str, tuple[str, float | Mapping[str, float]]]]


class Metrics:
    """Counters and histograms of one server.

    Args:
        snapshot: Returns gauges and counters that live elsewhere, as name to (help, value), or (help, values by model); counters
            end in ``_total``.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        one, two = ["model"], ["model", "status"]
        add: dict[str, Any] = {"registry": self.registry}
        timed: dict[str, Any] = {**add, "buckets": _SECONDS}
        self.requests = Counter("qeff_requests", "Requests by model and HTTP status.", two, **add)
        self.refused = Counter("qeff_refused", "Requests answered with an error, by HTTP status.", ["status"], **add)
        self.prompt_tokens = Counter("qeff_prompt_tokens", "Tokens of prompts.", one, **add)
        self.new_tokens = Counter("qeff_new_tokens", "Tokens generated.", one, **add)
        self.first_token = Histogram("qeff_first_token_seconds", "From request to first token.", one, **timed)
        self.between_tokens = Histogram("qeff_between_tokens_seconds", "From token to token.", one, **timed)
        self.duration = Histogram("qeff_request_seconds", "From request to last token.", one, **timed)
        self.adapter_load = Histogram("qeff_adapter_load_seconds", "Reading, checking and loading an adapter.", **timed)
        self.registry.register(_Snapshot(snapshot))

    def count_refusal(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self.refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


def merged(texts: Mapping[str, str]) -> str:
    """Return the metrics of several servers as one text; their names become the label ``replica``."""
    heads: dict[str, dict[str, None]] = defaultdict(dict)
    samples: dict[str, list[str]] = defaultdict(list)
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                heads[family][line] = None
            else:
                name, labels, value = re.fullmatch(r"([^{ ]+)(?:\{(.*)\})? (.*)", line).groups()  # type: ignore[union-attr]
                own = f'replica="{replica}"' + (f",{labels}" if labels else "")
                samples[family].append(f"{name}{{{own}}} {value}")
    return "".join("\n".join([*heads[family], *samples[family]]) + "\n" for family in heads)


class _Snapshot(Collector):
    def __init__(self, take: Snapshot) -> None:
        self._take = take

    def collect(self) -> Iterable[Metric]:
        for name, (documentation, value) in self._take().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            if not isinstance(value, Mapping):
                yield kind(name, documentation, value=value)
                continue
            family = kind(name, documentation, labels=["model"])
            for model, one in value.items():
                family.add_metric([model], one)
            yield family
