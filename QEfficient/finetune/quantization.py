# SPDX-License-Identifier: BSD-3-Clause
"""Bases whose frozen weights are kept in 4 or 8 bits while an adapter is trained. Knows transformers' quantizers by name."""

import importlib
from typing import Any

import torch

from QEfficient.errors import ConfigError

_LIBRARIES = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}


def quantized(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs to load a base in fewer bits; nothing if ``kind`` is ``"none"``.

    Args:
        kind: ``"bnb-4bit"`` (NF4 with quantized constants, as in QLoRA), ``"bnb-8bit"`` (LLM.int8), ``"torchao-int8"`` (weights only).
        dtype: In which type it computes.

    Raises:
        ConfigError: The library is not installed, or does not work here.
    """
    if kind == "none":
        return {}
    library = _LIBRARIES[kind]
    try:
        importlib.import_module(library)
    except ImportError as e:
        raise ConfigError(
            f"quantization {kind!r} needs {library}, which is not installed: pip install {library}"
        ) from e
    except (RuntimeError, OSError, AttributeError) as e:  # built for another PyTorch or another machine
        raise ConfigError(f"quantization {kind!r}: {library} does not work here: {type(e).__name__}: {e}") from e
    return {"quantization_config": _config(kind, dtype)}


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference when the model is first evaluated on a CPU.

    Packed they have no gradient any more (0.50.2, CPUs with AVX512-BF16), and a training that was validated before would go on
    without learning, without an error; widths that are no multiple of 64 cannot be packed at all.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _config(kind: str, dtype: torch.dtype) -> Any:
    import transformers

    bits: Any = transformers.BitsAndBytesConfig
    if kind == "bnb-8bit":
        return bits(load_in_8bit=True)
    if kind == "bnb-4bit":
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        return bits(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)
    int8 = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig
    return transformers.TorchAoConfig(quant_type=int8())
