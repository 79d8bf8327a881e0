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
from transformers import AutoTokenizer, DynamicCache

from QEfficient.contract import BASE
from QEfficient.errors import AdapterMismatchError
from QEfficient.export.skeleton import uncounted_token
from QEfficient.peft.tasks import choose_task, tasks_of
from QEfficient.testing.known import explain, is_prompt
from QEfficient.testing.workload import Tokens, Workload

Logits = npt.NDArray[np.float32]


_KEPT_BYTES = 1 << 30
"""Logits of adapters are kept up to this size, the least recently used forgotten first."""


class Reference:
    """The base and its adapters in PyTorch.

    The base's logits of the workload are taken before PEFT touches the model, so that a wrapper which leaves a trace in
    the base is found; an adapter's of a short row as soon as it is attached, so that one which a later adapter moves is.

    Attributes:
        workload: The tokens that are compared.
        model: The model: of transformers, and of PEFT once adapters are attached.
        untouched: Logits of each row of the workload, of the base without PEFT.
        short: The shortest row of the workload.
        paths: Folder of each adapter.
        alone: Logits of the short row, of each adapter when it had just been attached.
        judged: What has been found about generated tokens, by subject and tokens: graph and program mostly agree.
    """

    def __init__(self, model: Any, workload: Workload) -> None:
        self.workload = workload
        self.model = model.eval()
        self.short: Tokens = min(workload.rows, key=len)
        self.untouched = [self._forward(row) for row in workload.rows]
        self.paths: dict[str, Path] = {}
        self.alone: dict[str, Logits] = {}
        self.judged: dict[tuple[str, bytes], Any] = {}
        self._kept: dict[str, list[Logits]] = {}
        self._disabled: list[Logits] = []
        self._last: dict[tuple[str, bytes, int], Logits] = {}

    def attach(self, name: str, path: Path) -> None:
        """Load one adapter with PEFT; a rejected one leaves no trace.

        Raises:
            AdapterMismatchError: PEFT cannot put it on this base.
        """
        try:
            if isinstance(self.model, PeftModel):
                self._add(name, path)
            else:
                self.model = PeftModelForCausalLM.from_pretrained(self.model, str(path), adapter_name=name)
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            raise _mismatch("fit", name, path, e) from e
        self.model.eval()
        if tasks_of(self.model.peft_config[name]):  # PEFT asks for one at every call: the first is tested
            choose_task(self.model, name, 0)
        self._disabled = []
        try:
            self.alone[name] = self.logits(name, self.short)
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as e:
            if len(self.model.peft_config) > 1:
                self.model.delete_adapter(name)
            raise _mismatch("run on", name, path, e) from e
        self.paths[name] = path

    def _add(self, name: str, path: Path) -> None:
        try:
            self.model.load_adapter(str(path), adapter_name=name)
        except Exception:
            if name in self.model.peft_config:
                self.model.delete_adapter(name)
            raise

    def workload_logits(self, subject: str) -> list[Logits]:
        """Return the logits ``(tokens, V)`` of each row of the workload."""
        if subject == BASE:
            return self.untouched
        if subject not in self._kept:
            with self.selected(subject):
                found = [self._forward(row) for row in self.workload.rows]
            while self._kept and sum(r.nbytes for rows in (*self._kept.values(), found) for r in rows) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
            self._kept[subject] = found
        self._kept[subject] = self._kept.pop(subject)
        return self._kept[subject]

    @property
    def base_moved(self) -> str | None:
        """Why PEFT's model with every adapter disabled is not the base, if that is known of one of them."""
        if not isinstance(self.model, PeftModel):
            return None
        reasons = (explain("disabled", self.model.peft_config[name]) for name in self.paths)
        return next((reason for reason in reasons if reason), None)

    def disabled_logits(self) -> list[Logits]:
        """Return the logits of each row of the workload that a graph of the adapted model has without an adapter.

        They are the untouched base's, except where PEFT's model cannot give those back: then what it gives instead.
        """
        if self.base_moved and not self._disabled:
            self._disabled = [self.logits(BASE, row) for row in self.workload.rows]
        return self._disabled or self.untouched

    def logits(self, subject: str | None, tokens: Tokens, keep: int = 0) -> Logits:
        """Return the logits ``(len(tokens), V)`` of one row, or of its last ``keep`` tokens; None takes the model as it is."""
        with self.selected(subject) if subject is not None else contextlib.nullcontext():
            return self._forward(tokens, keep)

    def last_logits(self, subject: str, tokens: Tokens, count: int) -> Logits:
        """Return the logits ``(count, V)`` of the last tokens of a long row."""
        key = (subject, tokens.tobytes(), count)
        if key not in self._last:  # graph and program ask for the same row
            with self.selected(subject):
                self._last[key] = self._forward(tokens, keep=count)
        return self._last[key]

    def virtual_tokens(self, subject: str) -> int:
        """Return how many tokens an adapter of prompt learning puts in front of every row."""
        config = self.model.peft_config[subject] if subject in self.paths else None
        return int(config.num_virtual_tokens) if config is not None and is_prompt(config) else 0

    def cache(self, subject: str, tokens: Tokens) -> dict[int, tuple[Logits, Logits]]:
        """Return what each layer of attention keeps of one row, by its number: keys and values ``(kv_heads, tokens, head_dim)``.

        Virtual tokens come first. A layer that cannot hold the whole row (a window) keeps its end; a recurrent one is left out.
        """
        ids = torch.from_numpy(tokens)[None]
        kept = DynamicCache()
        with self.selected(subject), torch.no_grad():
            try:
                out = self.model(input_ids=ids, past_key_values=kept, use_cache=True)
            except (
                ValueError,
                AttributeError,
                TypeError,
                IndexError,
                KeyError,
            ):  # its layers keep more than keys and values
                kept = DynamicCache()
                out = self.model(input_ids=ids, use_cache=True)
        # Prefix tuning takes a cache of its own instead of the one that is given.
        filled = kept if kept.layers else getattr(out, "past_key_values", None)
        found = {}
        for i, layer in enumerate(getattr(filled, "layers", ())):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.ndim == values.ndim == 4:
                found[i] = keys[0].float().numpy(), values[0].float().numpy()
        return found

    def padded(self, subject: str, rows: list[Tokens], side: str) -> list[Logits]:
        """Return the logits of rows in one batch, padded on the right or left, without those of the padding."""
        longest, uncounted = max(len(r) for r in rows), uncounted_token(self.model)
        ids, mask = (torch.full((len(rows), longest), token) for token in (uncounted or 0, 0))
        places = [slice(0, len(r)) if side == "right" else slice(longest - len(r), longest) for r in rows]
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            ids[i, place], mask[i, place] = torch.from_numpy(row), 1
        # A base that does not count padding numbers the others itself.
        positions = {} if uncounted is not None else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        with self.selected(subject), torch.no_grad():
            out = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
        return [out.logits[i, place].float().numpy() for i, place in enumerate(places)]

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

    def _forward(self, tokens: Tokens, keep: int = 0) -> Logits:
        with torch.no_grad():
            out = self.model(
                input_ids=torch.from_numpy(tokens)[None], use_cache=False, **({"logits_to_keep": keep} if keep else {})
            )
        logits: Logits = out.logits[0].float().numpy()
        return logits[-(keep or len(tokens)) :]  # behind the virtual tokens of prompt learning


def _mismatch(what: str, name: str, path: Path, error: Exception) -> AdapterMismatchError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return AdapterMismatchError(f"adapter {name!r} ({path}) does not {what} the base: {first}")


def tokenizer_of(base: str) -> Callable[[str], list[int]] | None:
    """Return the base's tokenizer as a function, or None if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception:  # noqa: BLE001, RUF100 -- whatever is wrong with it, random tokens do as well
        return None
    return lambda text: list(tokenizer(text)["input_ids"])
