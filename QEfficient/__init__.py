# SPDX-License-Identifier: BSD-3-Clause
"""Efficient Transformers: prove that a PEFT model works, and make it run fast.

Public names load on first use, so that importing the package costs nothing and patches nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from QEfficient.peft.auto import QEffAutoPeftModelForCausalLM

__version__ = "0.1.0"

__all__ = ["QEffAutoPeftModelForCausalLM", "__version__"]

_HOMES = {"QEffAutoPeftModelForCausalLM": "QEfficient.peft.auto"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
