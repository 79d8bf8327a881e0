# SPDX-License-Identifier: BSD-3-Clause
"""Adapters meet the model: loaded adapters, and the QEffAuto classes."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from QEfficient.peft.auto import QEffAutoPeftModelForCausalLM

__all__ = ["QEffAutoPeftModelForCausalLM"]


def __getattr__(name: str) -> Any:
    if name == "QEffAutoPeftModelForCausalLM":
        return importlib.import_module("QEfficient.peft.auto").QEffAutoPeftModelForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
