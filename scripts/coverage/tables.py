# SPDX-License-Identifier: BSD-3-Clause
"""What the cases found, as ``docs/coverage.json`` and ``docs/coverage.md``."""

import json
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

_LIBRARIES = ("torch", "transformers", "peft", "onnx", "onnxruntime")
_KINDS = {
    "architectures": "Architectures with LoRA on all linear layers",
    "methods": "PEFT methods on Llama",
    "held-out": "Held-out configurations of the architectures that pass",
}
_ABOUT = {
    "architectures": "A second adapter, of half the rank and another alpha, was fed to the same graph, and the bare base.",
    "methods": "A second adapter was fed to the same graph, and the bare base. It differs in the fields that are named: a "
    "graph takes what the most different of these fits.",
    "held-out": "Other head counts and sizes, tied or untied embeddings, scaled rotary embeddings, an odd vocabulary and "
    "other windows, drawn by the number behind the name; `coverage.json` has the fields of each.",
}
_MEANING = {
    "pass": "the graph computes what PyTorch computes",
    "wrong": "exported, but differs from PyTorch",
    "refused": "export refuses it, with the reason",
    "error": "something else went wrong",
    "no adapter": "PEFT itself does not take the model",
    "no tiny model": "transformers itself did not run the tiny configuration",
}


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each case."""
    results = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            results[entry.pop("name")] = entry
    return results


def known_results(path: Path, docs: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each case: what ``docs/coverage.json`` says, and what was measured since."""
    table = docs / "coverage.json"
    written = json.loads(table.read_text()) if table.is_file() else {}
    return {f"{kind}/{n}": r for kind in _KINDS for n, r in written.get(kind, {}).items()} | read_results(path)


def code_digest(root: Path) -> str:
    """Return a digest of the code that a result depends on: the library, these scripts, and the libraries' versions."""
    hasher = xxhash.xxh3_64()
    rooms = ("contract.py", "export", "peft", "runtime/session.py")
    places = [*(root / "QEfficient" / room for room in rooms), root / "scripts" / "coverage"]
    for path in sorted(p for place in places for p in (place.rglob("*.py") if place.is_dir() else [place])):
        hasher.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    hasher.update(json.dumps({name: version(name) for name in _LIBRARIES}).encode())
    return hasher.hexdigest()


def write_docs(results: dict[str, dict[str, Any]], docs: Path, code: str) -> int:
    """Write both files; return 1 if a graph was wrong.

    Args:
        results: By kind and name.
        docs: The folder.
        code: Digest of the present code.
    """
    versions = {name: version(name) for name in _LIBRARIES}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=docs, capture_output=True, text=True, check=False
    )
    older = sum(r.get("code") != code for r in results.values())
    content = {
        "code": code,
        "parent_commit": commit.stdout.strip(),
        "rows_measured_with_older_code": older,
        "rows_by_code": dict(Counter(str(r.get("code")) for r in results.values())),
        "versions": versions,
        "tolerance": 1e-4,
        "counts": {kind: dict(Counter(r["outcome"] for _, r in _of(results, kind))) for kind in _KINDS},
        **{kind: dict(_of(results, kind)) for kind in _KINDS},
    }
    (docs / "coverage.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    lines = ["# Coverage", ""]
    lines += ["Made by `python scripts/coverage`: each row was exported and its graph run in ONNX Runtime.", ""]
    lines += ["Versions: " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".", ""]
    lines += [
        f"Code: digest {code}, on top of commit {commit.stdout.strip()}. Of {len(results)} rows {len(results) - older} were measured "
        f"with this code, {older} with earlier code (each row of `coverage.json` names its own).",
        "",
    ]
    for kind, title in _KINDS.items():
        if found := _of(results, kind):
            lines += _section(title, _ABOUT[kind], found)
    (docs / "coverage.md").write_text("\n".join(lines).rstrip() + "\n")
    return int(any(r["outcome"] == "wrong" for r in results.values()))


def _of(results: dict[str, dict[str, Any]], kind: str) -> list[tuple[str, dict[str, Any]]]:
    return sorted((n.split("/")[1], r) for n, r in results.items() if n.startswith(f"{kind}/"))


def _differs(result: dict[str, Any]) -> str:
    """Return in what the second adapter differs from the first, besides its values."""
    return ", ".join(f"{n} {' '.join(v) if isinstance(v, list) else v}" for n, v in result.get("second", {}).items())


def _section(title: str, about: str, results: list[tuple[str, dict[str, Any]]]) -> list[str]:
    counts = Counter(r["outcome"] for _, r in results)
    lines = [f"## {title}", "", about, "", "| outcome | number | meaning |", "|---|---|---|"]
    lines += [f"| {o} | {counts[o]} | {meaning} |" for o, meaning in _MEANING.items() if counts[o]]
    passed = [
        f"| {n} | {r['error']:.0e} | {r['effect']:.1f} | {_differs(r)} |" for n, r in results if r["outcome"] == "pass"
    ]
    lines += [
        "",
        "Largest error of any logit, as a share of the logits' range, and how far the adapter moves a logit:",
        "",
    ]
    lines += ["| passes | error | adapter's effect | second adapter |", "|---|---|---|---|", *passed, ""]
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, result in results:
        if result["outcome"] != "pass":
            grouped.setdefault((result["outcome"], str(result["reason"])), []).append(name)
    if grouped:
        lines += ["| does not | outcome | reason |", "|---|---|---|"]
        for (outcome, reason), names in sorted(grouped.items()):
            lines.append(f"| {', '.join(names)} | {outcome} | {reason.replace('|', '/').replace('](', '] (')} |")
        lines.append("")
    return lines
