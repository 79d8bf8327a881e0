# SPDX-License-Identifier: BSD-3-Clause
"""What came out of a training, for people: in the terminal, as a page, as the adapter's model card. Computes nothing new."""

import html
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from QEfficient.finetune.config import CONFIG_FILE, TrainConfig

HTML_FILE = "training.html"
CURVE_FILE = "loss.svg"
CARD_FILE = "README.md"

Log: TypeAlias = Sequence[Mapping[str, float]]
_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 200
"""Points of a curve at most; more steps are averaged."""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse } td { padding: .2rem 1rem .2rem 0 } td + td { font-weight: 600 }
svg { width: 100%; height: auto } pre { overflow-x: auto; background: #8881; padding: 1rem }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } }
"""


def write_summary(folder: Path, config: TrainConfig, metrics: Mapping[str, float], log: Log, method: str) -> None:
    """Write curve, page and model card into ``folder``.

    Args:
        folder: Where the adapter is.
        config: Options of the training.
        metrics: What ``train`` returns.
        log: What each step logged.
        method: What was trained: ``"LORA"`` or ``"full"``, for example.
    """
    svg = curve(log)
    (folder / CURVE_FILE).write_text(svg, encoding="utf-8")
    (folder / HTML_FILE).write_text(page(config, metrics, svg), encoding="utf-8")
    (folder / CARD_FILE).write_text(card(config, metrics, method), encoding="utf-8")


def facts(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return what there is to say about a training, in a reader's order."""
    found = [("training loss", f"{metrics['train_loss']:.3f}")]
    if "perplexity" in metrics:
        found.append(("perplexity", f"{metrics['perplexity_before']:,.3g} before, {metrics['perplexity']:,.3g} after"))
    for name in ("accuracy", "f1"):
        if name in metrics:
            found.append((name, f"{metrics[f'{name}_before']:.3f} before, {metrics[name]:.3f} after"))
    if metrics.get("best_step"):
        found.append(("best step", f"{metrics['best_step']:,.0f} of {metrics['train_steps']:,.0f}"))
    share = metrics["trained_parameters"] / max(metrics["parameters"], 1)
    return [
        *found,
        ("steps", f"{metrics['train_steps']:,.0f}"),
        ("trained parameters", f"{metrics['trained_parameters']:,.0f} of {metrics['parameters']:,.0f} ({share:.2%})"),
        ("time", f"{metrics['train_seconds']:,.0f} s, {metrics['train_tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]


def lines(metrics: Mapping[str, float], log: Log) -> list[str]:
    """Return the summary for a terminal: the loss as a row of bars, then the facts."""
    losses = averaged([entry["loss"] for entry in log if "loss" in entry], 40)
    bars = ""
    if losses:
        low, high = min(losses), max(losses)
        bars = "".join(_BARS[round((loss - low) / ((high - low) or 1) * (len(_BARS) - 1))] for loss in losses)
    drawn = [f"loss {losses[0]:.3f} {bars} {losses[-1]:.3f}"] if losses else []
    return [*drawn, *(f"{name}: {value}" for name, value in facts(metrics))]


def averaged(values: Sequence[float], count: int) -> list[float]:
    """Return ``count`` means of neighbours, or the values themselves if they are fewer."""
    if len(values) <= count:
        return list(values)
    edges = [len(values) * i // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def curve(log: Log) -> str:
    """Return the training loss as a line and the validation losses as dots, as SVG that stands alone."""
    steps = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    checks = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    size = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 260" role="img" aria-label="Loss over steps"'
    if not steps:
        return f"<svg {size}></svg>\n"
    last = steps[-1][0]
    points = list(zip(*(averaged([s[i] for s in steps], _POINTS) for i in (0, 1)), strict=True))
    high = max(loss for _, loss in points + checks)
    low = min(loss for _, loss in points + checks)

    def place(step: float, loss: float) -> str:
        return f"{50 + 650 * step / max(last, 1):.1f},{20 + 200 * (high - loss) / ((high - low) or 1):.1f}"

    path = " ".join(place(*point) for point in points)
    dots = [place(*check).split(",") for check in checks]
    parts = [
        f'<svg {size} font-family="sans-serif" font-size="12" fill="#888">',
        '<path d="M50 20V220H700" fill="none" stroke="#888"/>',
        f'<text x="44" y="24" text-anchor="end">{high:.2f}</text><text x="44" y="222" text-anchor="end">{low:.2f}</text>',
        f'<text x="50" y="240">0</text><text x="700" y="240" text-anchor="end">step {last:,.0f}</text>',
        f'<polyline points="{path}" fill="none" stroke="#2a78d6" stroke-width="2"/>',
        *(f'<circle cx="{x}" cy="{y}" r="4" fill="#e07b00"/>' for x, y in dots),
        '<text x="700" y="16" text-anchor="end" fill="#2a78d6">training loss</text>',
        '<text x="600" y="16" text-anchor="end" fill="#e07b00">validation loss</text>' if dots else "",
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def page(config: TrainConfig, metrics: Mapping[str, float], svg: str) -> str:
    """Return the summary as one HTML page that needs nothing else."""
    title = html.escape(f"Training of {config.output_dir.name}")
    rows = "\n".join(f"<tr><td>{html.escape(n)}</td><td>{html.escape(v)}</td></tr>" for n, v in facts(metrics))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{svg}<table>\n{rows}\n</table>\n"
        f"<h2>Options</h2>\n<pre>{html.escape(_options(config))}</pre></body></html>\n"
    )


def card(config: TrainConfig, metrics: Mapping[str, float], method: str) -> str:
    """Return the model card: what it is, how it was trained, what came out, how to use it.

    A base in a folder is called by the folder's name: the path means nothing to others.
    """
    base = Path(config.model_name).name if Path(config.model_name).expanduser().is_dir() else config.model_name
    name = config.output_dir.name
    classifies = config.task_mode == "seq_classification"
    auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    head = f", num_labels={int(metrics['classes'])}" if classifies else ""  # PEFT saves the head, not its size
    front: dict[str, Any] = {
        "base_model": base,
        "pipeline_tag": "text-classification" if classifies else "text-generation",
    }
    if config.use_peft:
        front |= {"library_name": "peft", "tags": ["base_model:adapter:" + base, method.lower()]}
    results = "\n".join(f"| {label} | {value} |" for label, value in facts(metrics))
    data = config.train_file.name if config.train_file else f"{config.dataset} ({config.dataset_split})"
    kind = f"{method} adapter for `{base}`" if config.use_peft else f"fully fine-tuned `{base}`"
    use = (
        f"base = {auto}.from_pretrained({base!r}{head})\nmodel = PeftModel.from_pretrained(base, {name!r})"
        if config.use_peft
        else f"model = {auto}.from_pretrained({name!r})"
    )
    imports = f"from transformers import {auto}" + ("\nfrom peft import PeftModel" if config.use_peft else "")
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\nA {kind}, trained on `{data}`.\n\n"
        f"![Loss over steps]({CURVE_FILE})\n\n| | |\n|---|---|\n{results}\n\n"
        f"## Use\n\n```python\n{imports}\n\n{use}\n```\n\n"
        f"## Train again\n\n```\nqefficient finetune --config {CONFIG_FILE} --output-dir again\n```\n\n"
        f"```yaml\n{_options(config)}```\n"
    )


def _options(config: TrainConfig) -> str:
    """Return the options that are not the defaults; files by name only."""
    default = TrainConfig()
    chosen: dict[str, Any] = {}
    for name in TrainConfig.__dataclass_fields__:
        value = getattr(config, name)
        if value != getattr(default, name) and name not in {"config", "output_dir", "overwrite", "resume"}:
            chosen[name] = value.name if isinstance(value, Path) else value
    if Path(config.model_name).is_dir():
        chosen["model_name"] = Path(config.model_name).name
    return yaml.safe_dump(json.loads(json.dumps(chosen, default=str)), sort_keys=False)
