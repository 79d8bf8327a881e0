# SPDX-License-Identifier: BSD-3-Clause
"""Time and memory of an export, after the imports: a table, then one JSON line.

Two bases and LoRA r=16 on all seven projections: one of Qwen2.5-0.5B's shape with its 2 GB float32 checkpoint (zeros, which take
no disk), and one of 80 layers and 70 billion parameters that consists of a configuration and a checkpoint's index, without any
shard. Each runs in a process of its own, with an empty cache of graphs; the checkpoint was read once before, so that its digest waits
neither for a disk nor for memory that a virtual machine has yet to be given (``--cold`` leaves that out). Peak memory is of the whole process; what the imports take is shown.
"written" is what lies in the graph's folder besides linked weights; the adapter's own file is given apart.
"""

import argparse
import importlib
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
INDEX_ONLY = ("70B",)
IMPORTS = (  # imports like the others, which PyTorch and onnxscript put off to the first export
    "onnxruntime",
    "onnxscript.function_libs.torch_lib.ops",
    "torch._dynamo",
    "torch._inductor.config",
    "torch.export",
    "torch.onnx._internal.exporter._core",
)


def make(folder: Path, shape: str) -> tuple[Path, Path]:
    """Write a base (its weights are zeros that take no disk, or an index alone) and an adapter; return their folders."""
    import torch
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen2Config

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = Qwen2Config(**SHAPES[shape], architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(base)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    if shape in INDEX_ONLY:
        names = [name for name, _ in model.named_parameters()]
        shards = [f"model-{1 + 30 * i // len(names):05}-of-00030.safetensors" for i in range(len(names))]
        content = {"metadata": {}, "weight_map": dict(zip(names, shards, strict=True))}
        (base / "model.safetensors.index.json").write_text(json.dumps(content))
    else:
        _write_zeros(model, base / "model.safetensors")
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    tensors = {}
    peft_model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    for name, tensor in peft_model.named_parameters():
        if "lora_" in name:
            tensors[name.replace(".default", "")] = torch.zeros(tensor.shape)
    save_file(tensors, adapter / "adapter_model.safetensors")
    peft_model.peft_config["default"].save_pretrained(str(adapter))
    return base, adapter


def _write_zeros(model: "torch.nn.Module", path: Path) -> None:
    header, offset = {}, 0
    for name, tensor in model.named_parameters():
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        f.truncate(8 + len(head) + offset)


def _read(base: Path) -> None:
    """Read the checkpoint, so that it lies in the system's cache of files."""
    for path in base.glob("*.safetensors"):
        with path.open("rb") as f:
            while f.read(1 << 24):
                pass


def _peak_mb() -> float:
    """Return the most memory that this process has taken (``ru_maxrss`` would count what its parent took before)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def measure(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Export once and return seconds and megabytes."""
    whole = (base / "model.safetensors").is_file()
    for name in IMPORTS:
        importlib.import_module(name)
    from QEfficient.peft.unloaded import export_adapters

    imported_mb = _peak_mb()
    begin = time.perf_counter()
    folder = export_adapters(base, {"a": adapter}, out, weights="linked" if whole else "absent")
    seconds = time.perf_counter() - begin
    peak_mb = _peak_mb()
    own = sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p.stat().st_nlink == 1)
    beside = (folder / "adapters" / "a.safetensors").stat().st_size
    return {
        "seconds": seconds,
        "peak_mb": peak_mb,
        "imports_mb": imported_mb,
        "written_mb": own / 1e6,
        "adapter_mb": beside / 1e6,
    }


def main() -> None:
    """Run the shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=[*SHAPES], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--cold", action="store_true", help="do not read the checkpoint before")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*map(Path, options.one))))
        return
    results = {}
    print(f"{'base':8} {'seconds':>8} {'peak MB':>8} {'imports MB':>11} {'written MB':>11} {'adapter MB':>11}")
    for shape in options.shapes:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            base, adapter = make(Path(folder), shape)
            if not options.cold:
                _read(base)
            argv = [sys.executable, "-W", "ignore", __file__, "--one", str(base), str(adapter), f"{folder}/graph"]
            done = subprocess.run(
                argv, capture_output=True, text=True, check=True, env={**os.environ, "QEFF_HOME": folder}
            )
            r = results[shape] = json.loads(done.stdout.splitlines()[-1])
        figures = f"{r['seconds']:8.1f} {r['peak_mb']:8.0f} {r['imports_mb']:11.0f} {r['written_mb']:11.1f}"
        print(f"{shape:8} {figures} {r['adapter_mb']:11.1f}")
    import torch

    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "export", "machine": machine, "results": results}))


if __name__ == "__main__":
    main()
