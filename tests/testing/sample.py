# SPDX-License-Identifier: BSD-3-Clause
"""A report made by hand, with every outcome in it."""

from QEfficient.testing.report import CheckResult, Environment, Measurement, Outcome, Report, Series, Stage, Subject

_PASS, _FAIL = Outcome.PASS, Outcome.FAIL


def sample(adapters: int = 2, *, fail: bool = True) -> Report:
    """Return a report of some adapters; the last of them is wrong if ``fail``."""
    names = [f"adapter-{i}" for i in range(adapters)]
    report = Report(
        Subject("base", "models/base", "", "LlamaForCausalLM, 2 layers"),
        tuple(Subject(n, f"adapters/{n}", "LORA", "rank 8") for n in names),
        Environment("Linux x86_64", 2, 8_000_000_000, "3.11.7", {"torch": "2.13.0"}),
        command="qefficient test models/base",
        started="2026-01-02T03:04:05+00:00",
        seconds=12.0,
    )
    for name in ("base", *names):
        wrong = fail and name == names[-1]
        report.results += _results(name, wrong)
    for engine, speed in (("pytorch", 10.0), ("program", 25.0)):
        report.measurements += [
            Measurement(engine, names[0], "decode_tokens_per_second", speed, speed - 1, speed + 1),
            Measurement(engine, names[0], "first_token_ms", 1000 / speed),
            Measurement(engine, names[0], "memory_bytes.weights", 2e9),
        ]
    return report


def _results(name: str, wrong: bool) -> list[CheckResult]:
    x, y = ("prefill 3", "decode 0"), (2e-6, 3e-6)
    series = (
        Series("difference", x, tuple(v * 1e5 for v in y) if wrong else y),
        Series("adapter's effect", x, (0.5, 0.4)),
    )
    message = (
        "Logits differ from <PyTorch> by 0.3 of their range at decode 0." if wrong else "Within 3e-6 of the range."
    )
    outcome = _FAIL if wrong else _PASS
    return [
        CheckResult("adapter.finite", "Values are finite", name, Stage.ADAPTER, Outcome.WARN, "Large.", "Why.", 0, 0, "tensors"),
        CheckResult("graph.tensors", "Tensors", name, Stage.GRAPH, Outcome.SKIP, "Not there.", "Why."),
        CheckResult(
            "graph.decode", "Logits token by token", name, Stage.GRAPH, outcome, message, "Float32.",
            0.3 if wrong else 3e-6, 1e-4, "of range", False, {"positions": 2}, series, 0.25,
        ),
    ]  # fmt: skip
