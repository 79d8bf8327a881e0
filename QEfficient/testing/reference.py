# SPDX-License-Identifier: BSD-3-Clause
"""What everything else is held against: PyTorch + PEFT, in float32, one row at a time, without padding or cache."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel, PeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from QEfficient.contract import BASE
from QEfficient.errors import AdapterMismatchError, ConfigError
from QEfficient.testing.workload import Tokens, Workload

Logits = npt.NDArray[np.float32]


class Reference:
    """The base and its adapters in PyTorch.

    The base's logits of the workload are taken before PEFT touches the model, so that a wrapper which leaves a trace in
    the base is found.

    Attributes:
        workload: The tokens that are compared.
        model: The model: of transformers, and of PEFT once adapters are attached.
        untouched: Logits of each row of the workload, of the base without PEFT.
        judged: What has been found about generated tokens, by subject and tokens: graph and program mostly agree.
    """

    def __init__(self, model: Any, workload: Workload) -> None:
        self.workload = workload
        self.model = model.eval()
        self.untouched = [self._forward(row) for row in workload.rows]
        self.judged: dict[tuple[str, bytes], Any] = {}
        self._kept: dict[str, list[Logits]] = {BASE: self.untouched}

    def attach(self, name: str, path: Path) -> None:
        """Load one adapter with PEFT.

        Raises:
            AdapterMismatchError: PEFT cannot put it on this base.
        """
        try:
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(path), adapter_name=name)
            else:
                self.model = PeftModelForCausalLM.from_pretrained(self.model, str(path), adapter_name=name)
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            first = str(e).strip().splitlines()[0]
            raise AdapterMismatchError(f"adapter {name!r} ({path}) does not fit the base: {first}") from e
        self.model.eval()

    def workload_logits(self, subject: str) -> list[Logits]:
        """Return the logits ``(tokens, V)`` of each row of the workload."""
        if subject not in self._kept:
            with self.selected(subject):
                self._kept[subject] = [self._forward(row) for row in self.workload.rows]
        return self._kept[subject]

    def logits(self, subject: str, tokens: Tokens) -> Logits:
        """Return the logits ``(len(tokens), V)`` of one row."""
        with self.selected(subject):
            return self._forward(tokens)

    @contextlib.contextmanager
    def selected(self, subject: str) -> Iterator[Any]:
        """Yield the model with one adapter active, or none for ``"base"``."""
        if not isinstance(self.model, PeftModel):
            yield self.model
        elif subject == BASE:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(subject)
            yield self.model

    def _forward(self, tokens: Tokens) -> Logits:
        with torch.no_grad():
            out = self.model(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
        logits: Logits = out.logits[0].float().numpy()
        return logits


def load_base(base: str) -> Any:
    """Load the base in float32, with the attention that follows the model's definition to the letter.

    Raises:
        ConfigError: There is no model at that place.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot load the base {base!r}: {str(e).strip().splitlines()[0]}") from e


def tokenizer_of(base: str) -> Callable[[str], list[int]] | None:
    """Return the base's tokenizer as a function, or None if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception:  # noqa: BLE001, RUF100 -- whatever is wrong with it, random tokens do as well
        return None
    return lambda text: list(tokenizer(text)["input_ids"])
