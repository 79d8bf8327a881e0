"""The same command on a GPU: what it computes, how it is interrupted, and what it runs on."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from QEfficient.finetune.batches import Collator, Rows
from QEfficient.finetune.data import IGNORED, Example
from tests.finetune.test_classes import WORDS
from tests.finetune.test_distributed import curve
from tests.finetune.test_methods import METHODS, OF_EXPERTS, bases, check_loads, trained
from tests.tiny import SHAPE, STYLES, make_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU here"),
]

__all__ = ["bases"]

ROOT = Path(__file__).parents[2]
PLAIN: dict[str, Any] = {"val_file": "val.jsonl", "max_train_step": 12, "lr": "1e-2", "lora_r": 2}
ALL_THAT_COULD_BE_LOST = {
    "deterministic": True,
    "max_train_step": 60,
    "lora_dropout": 0.2,
    "neftune_alpha": 1.0,
    "group_by_length": True,
    "save_steps": 2,
    "lr_schedule": "cosine",
    "warmup_ratio": 0.3,
}
ONE_STEP = {"max_train_step": 1, "train_batch_size": 64, "gradient_accumulation_steps": 1}
QUANTIZED = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}
CLASSES = {"task_mode": "seq_classification", "train_file": "classes.jsonl", "val_file": "classes-val.jsonl"}
CLASSES |= {"max_train_step": 30, "train_batch_size": 8, "lora_r": 4}

# name -> options; all of them run at once, because most of their time goes into loading libraries
TRAININGS: dict[str, dict[str, Any]] = {
    "float32": PLAIN,
    "tested": {**PLAIN, "test": True},
    "cpu": PLAIN,
    "bfloat16": {**PLAIN, "dtype": "bfloat16"},
    "recomputed": {**PLAIN, "gradient_checkpointing": True},
    "padded": {**PLAIN, **ONE_STEP},
    "packed": {**PLAIN, **ONE_STEP, "packing": True, "context_length": 64},
    "packed-bfloat16": {**PLAIN, "packing": True, "context_length": 64, "dtype": "bfloat16"},
    "uninterrupted": {**PLAIN, **ALL_THAT_COULD_BE_LOST},
    "classes": {**PLAIN, **CLASSES},
    "nccl": PLAIN,
    "sharded": {**PLAIN, "fsdp": True},
    "sharded-bfloat16": {**PLAIN, "fsdp": True, "dtype": "bfloat16"},
    **{
        kind: {**PLAIN, "quantization": kind, "max_train_step": 48, "lora_r": 4}
        for kind, library in QUANTIZED.items()
        if importlib.util.find_spec(library)
    },
}
FAILS_IN_PEFT = {"ADAMSS": "Expected all tensors to be on the same device"}  # 0.21.2 leaves a buffer on the CPU
LAUNCHED = ("nccl", "sharded", "sharded-bfloat16")


def start(folder: Path, out: str, options: dict[str, Any]) -> subprocess.Popen[str]:
    """Start the command in ``folder``; under torchrun, or without a GPU, by its name."""
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    launcher = [
        "torch.distributed.run",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "-m",
    ]
    command = [*(launcher if out in LAUNCHED else []), "QEfficient.cloud.finetune", f"--output_dir={out}", *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "NCCL_DEBUG": "VERSION"}
    if out == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    printed = (folder / f"{out}.txt").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env=environment, stdout=printed, stderr=printed, text=True
    )


class Trainings:
    """All of :data:`TRAININGS`, running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running = {name: start(folder, name, options) for name, options in TRAININGS.items()}

    def __getitem__(self, name: str) -> Path:
        """Return the folder of a training that has succeeded."""
        code = self._running[name].wait(200)
        assert code == 0, self.printed(name)
        return self.folder / name

    def printed(self, name: str) -> str:
        """Return what a training has printed."""
        return (self.folder / f"{name}.txt").read_text()

    def metrics(self, name: str) -> dict[str, float]:
        """Return what came out."""
        found: dict[str, float] = json.loads((self[name] / "train_metrics.json").read_text())
        return found

    def stop(self) -> None:
        """End what still runs."""
        for process in self._running.values():
            process.kill()


@pytest.fixture(scope="module")
def trainings(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base whose widths every quantization takes, and data that can be learned."""
    folder = tmp_path_factory.mktemp("gpu")
    shape = {**SHAPE, "vocab_size": len(tokenizer), "intermediate_size": 128}
    make_base(LlamaConfig(**shape)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": "ab" * (i % 9 + 1), "completion": "cd" * (i % 7 + 1)} for i in range(63)]
    classes = [{"text": (text * 4)[: 6 + i % 7], "label": name} for i in range(20) for name, text in WORDS.items()]
    others = [{"text": text[1:] * 5, "label": name} for name, text in WORDS.items()]
    files = {"train": rows[:60], "val": rows[60:], "classes": classes, "classes-val": others}
    for name, values in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    for options in TRAININGS.values():
        options.update({"model_name": "base", "train_file": options.get("train_file", "train.jsonl")})
    running = Trainings(folder)
    yield running
    running.stop()


def test_losses_are_those_of_the_cpu(trainings: Trainings) -> None:
    """Sums in another order differ by some 1e-7 of a loss, and Adam adds that up over the steps."""
    expected = curve(trainings["cpu"], "loss")
    assert len(expected) == 12
    assert expected[-1] < expected[0] - 1
    assert curve(trainings["float32"], "loss") == pytest.approx(expected, abs=1e-4)
    for name in ("eval_loss_before", "eval_loss"):
        assert trainings.metrics("float32")[name] == pytest.approx(trainings.metrics("cpu")[name], abs=1e-4)


def test_bfloat16_learns_the_same(trainings: Trainings) -> None:
    """Its 8 bits of mantissa are 0.4 % of a logit; the adapter stays float32."""
    assert curve(trainings["bfloat16"], "loss") == pytest.approx(curve(trainings["float32"], "loss"), abs=0.1)
    saved = load_file(trainings["bfloat16"] / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_recomputed_activations_change_nothing(trainings: Trainings) -> None:
    """The same operations are made twice."""
    assert curve(trainings["recomputed"], "loss") == pytest.approx(curve(trainings["float32"], "loss"), abs=1e-5)


def test_peak_memory_is_that_of_the_gpu(trainings: Trainings) -> None:
    """More than the parameters, less than what a process has resident that has loaded CUDA."""
    metrics = trainings.metrics("float32")
    assert metrics["parameters"] * 4 < metrics["peak_memory_bytes"] < 200 << 20
    assert trainings.metrics("cpu")["peak_memory_bytes"] > 200 << 20


def test_adapter_passes_the_test(trainings: Trainings) -> None:
    """``--test`` on the adapter made here; its verdict is the exit code."""
    assert trainings["tested"].is_dir()
    assert (trainings.folder / "tested.report").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("style", "attention"),
    [*((style, "sdpa") for style in ("llama", "mistral", "qwen2", "qwen3")), ("llama", "eager"), ("gemma2", "eager")],
)
def test_packed_examples_do_not_see_each_other(style: str, attention: str, dtype: torch.dtype) -> None:
    """Other tokens in one example of a row change no logit of those beside it, to the bit."""
    model = make_base(STYLES[style]).to("cuda", dtype)
    model.set_attn_implementation(attention)
    torch.manual_seed(0)
    sizes = (5, 9, 3)
    logits = []
    for first in (3, 60):
        ids = [torch.full((sizes[0],), first).tolist(), *(list(range(20, 20 + n)) for n in sizes[1:])]
        rows = Rows([Example(i, [IGNORED, *i[1:]]) for i in ids], 1, context_length=sum(sizes))
        batch = {name: t.cuda() for name, t in Collator(0, packed=True)([rows[0]]).items() if name != "attention_mask"}
        with torch.no_grad():
            logits.append(model(**batch, use_cache=False).logits[0])
        starts = batch["position_ids"][0] == 0
        assert int(starts.sum()) == 3
        row = [len(e.input_ids) for e in rows[0]]
    changed = (logits[0] != logits[1]).any(-1).cpu()
    at = row.index(sizes[0])
    inside = torch.zeros(sum(sizes), dtype=torch.bool)
    inside[sum(row[:at]) : sum(row[: at + 1])] = True
    assert torch.equal(changed, inside)


def test_packed_training_learns_the_same_tokens(trainings: Trainings) -> None:
    """One packed step over all examples has the loss of one padded step over all; in bfloat16 packed rows are learned, too."""
    padded, packed = trainings.metrics("padded"), trainings.metrics("packed")
    assert packed["train_loss"] == pytest.approx(padded["train_loss"], abs=1e-4)
    assert packed["eval_loss"] == pytest.approx(padded["eval_loss"], abs=1e-3)
    losses = curve(trainings["packed-bfloat16"], "loss")
    assert losses[-1] < losses[0] - 1


def test_killed_and_resumed_is_the_same(trainings: Trainings) -> None:
    """``kill -9`` in the middle, dropout, noise and order by length: the same adapter bit for bit, each loss equal."""
    whole = trainings["uninterrupted"]
    process = start(trainings.folder, "killed", TRAININGS["uninterrupted"])
    checkpoint, end = trainings.folder / "killed.checkpoints" / "checkpoint-6", time.monotonic() + 100
    while not checkpoint.exists():
        assert process.poll() is None, trainings.printed("killed")
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (trainings.folder / "killed").exists()
    resumed = start(trainings.folder, "killed", {**TRAININGS["uninterrupted"], "resume": True})
    assert resumed.wait(100) == 0, trainings.printed("killed")
    assert "resuming from step" in trainings.printed("killed")
    out = trainings.folder / "killed"
    assert curve(out, "loss") == curve(whole, "loss")
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_classifier_is_trained(trainings: Trainings) -> None:
    """It tells the classes apart afterwards."""
    assert trainings.metrics("classes")["accuracy"] == trainings.metrics("classes")["f1"] == 1


@pytest.mark.parametrize("kind", QUANTIZED)
def test_adapter_learns_on_a_quantized_base(trainings: Trainings, kind: str) -> None:
    """Also when the model was evaluated before."""
    pytest.importorskip(QUANTIZED[kind], reason="an optional library")
    metrics = trainings.metrics(kind)
    assert metrics["perplexity"] < metrics["perplexity_before"] / 10


@pytest.mark.parametrize("method", METHODS)
def test_method_is_trained_in_bfloat16(bases: dict[bool, Path], tmp_path: Path, method: str) -> None:
    """Its products are made in bfloat16 there, whatever the type of its tensors; it is saved and loads again."""
    base = bases[method == OF_EXPERTS]
    if method in FAILS_IN_PEFT:
        with pytest.raises(RuntimeError, match=FAILS_IN_PEFT[method]):
            trained(base, method, tmp_path, dtype="bfloat16")
        return
    check_loads(base, trained(base, method, tmp_path, dtype="bfloat16"))


def test_nccl_under_torchrun_changes_nothing(trainings: Trainings) -> None:
    """One process of torchrun has the losses of one without."""
    assert curve(trainings["nccl"], "loss") == pytest.approx(curve(trainings["float32"], "loss"), abs=1e-5)
    assert "NCCL version" in trainings.printed("nccl")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fsdp_shards_on_a_gpu(trainings: Trainings, dtype: str) -> None:
    """FSDP2 takes all parameters, over one process here, and changes no loss."""
    name = "sharded" if dtype == "float32" else "sharded-bfloat16"
    expected = pytest.approx(curve(trainings[dtype], "loss"), abs=1e-5 if dtype == "float32" else 1e-2)
    assert curve(trainings[name], "loss") == expected
    metrics, whole = trainings.metrics(name), trainings.metrics(dtype)
    assert metrics["parameters_per_process"] == whole["parameters"]
    assert metrics["eval_loss_before"] == pytest.approx(whole["eval_loss_before"], abs=1e-2)
    saved, plain = (load_file(trainings[n] / "adapter_model.safetensors") for n in (name, dtype))
    assert saved.keys() == plain.keys()
