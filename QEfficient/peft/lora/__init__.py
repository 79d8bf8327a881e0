# SPDX-License-Identifier: BSD-3-Clause
"""Several LoRA adapters in one batch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from QEfficient.peft.lora.auto import QEffAutoLoraModelForCausalLM

__all__ = ["QEffAutoLoraModelForCausalLM"]


def __getattr__(name: str) -> Any:
    if name == "QEffAutoLoraModelForCausalLM":
        return importlib.import_module("QEfficient.peft.lora.auto").QEffAutoLoraModelForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
