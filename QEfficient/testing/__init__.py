# SPDX-License-Identifier: BSD-3-Clause
"""Does it agree with PyTorch, how fast is it, and the report that says so."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from QEfficient.testing.checks_efficiency import Budgets
    from QEfficient.testing.conformance import run
    from QEfficient.testing.report import Report

__all__ = ["Budgets", "Report", "run"]

_HOMES = {
    "Budgets": "QEfficient.testing.checks_efficiency",
    "Report": "QEfficient.testing.report",
    "run": "QEfficient.testing.conformance",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
