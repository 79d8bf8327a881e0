# SPDX-License-Identifier: BSD-3-Clause
"""``QEffAutoPeftModelForCausalLM``: a PEFT model that can be exported, compiled and run, adapters as inputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModelForCausalLM

from QEfficient.compile.program import compile_graph
from QEfficient.contract import BASE, MODEL_FILE, Manifest
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, NotCompiledError
from QEfficient.export.lift import adapter_of, inner_model
from QEfficient.export.torch_to_onnx import export_graph, is_whole
from QEfficient.export.weights import Checkpoint
from QEfficient.options import suggest
from QEfficient.peft.adapters import Adapter, fit, neutral_tensors, read_config, resolve, saved_tensors, write_exported
from QEfficient.peft.loading import attach, checkpoint_folder, load_base
from QEfficient.peft.neutral import neutral_of
from QEfficient.runtime.generate import SessionModel
from QEfficient.runtime.session import OrtSession
from QEfficient.store import cache_root

_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class _Exported:
    """What was exported last, and the state of the base's weights then."""

    request: tuple[Any, ...]
    folder: Path


class QEffAutoPeftModelForCausalLM:
    """A PEFT model, its exported graph, and the program that runs it.

    Example::

        model = QEffAutoPeftModelForCausalLM.from_pretrained("path/to/adapter", "sql")
        model.export()
        model.compile(ctx_len=1024)
        model.generate(**tokenizer("How many orders?", return_tensors="pt"), max_new_tokens=64)

    Args:
        model: A ``PeftModelForCausalLM``; it stays usable, and adapters loaded into either are known to both.

    Raises:
        TypeError: ``model`` is anything else.
    """

    def __init__(self, model: PeftModelForCausalLM) -> None:
        if not isinstance(model, PeftModelForCausalLM):
            raise TypeError(
                f"expected a PeftModelForCausalLM, got {type(model).__name__}; wrap it with peft.get_peft_model"
            )
        self.model = model.eval()
        self._checkpoint: Checkpoint | None = None
        self._disabled = False
        self._exported: _Exported | None = None
        self._manifest: Manifest | None = None
        self._program: Path | None = None
        self._session: OrtSession | None = None
        self._generator: SessionModel | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, adapter_name: str = "default", **kwargs: Any
    ) -> "QEffAutoPeftModelForCausalLM":
        """Load an adapter and the base that it names.

        Args:
            pretrained_name_or_path: Adapter folder in PEFT's format, or Hub id.
            adapter_name: What to call the adapter.
            **kwargs: Passed to the base's ``from_pretrained``.

        Raises:
            AdapterNotFoundError: There is no adapter in that place.
            ArtifactError: A file of it is damaged.
            AdapterMismatchError: It does not fit the base that it names.
            ConfigError: The base cannot be loaded.
        """
        folder = resolve(pretrained_name_or_path)
        base = read_config(folder).base_model_name_or_path
        if not base:
            raise ConfigError(f"{folder} names no base model; load the base yourself and wrap it with PeftModel")
        return cls.from_base(base, {adapter_name: folder}, **kwargs)

    @classmethod
    def from_base(
        cls, base: str | Path, adapters: Mapping[str, str | Path], **kwargs: Any
    ) -> "QEffAutoPeftModelForCausalLM":
        """Load a base and adapters of it; the first adapter becomes active.

        Args:
            base: Folder or Hub id of the base.
            adapters: Folders or Hub ids of the adapters, by name.
            **kwargs: Passed to the base's ``from_pretrained``.

        Raises:
            QEffError: As :meth:`from_pretrained`.
        """
        made = cls(attach(load_base(base, **kwargs), adapters))
        found = checkpoint_folder(base)
        made._checkpoint = Checkpoint(found) if found is not None else None
        return made

    # -- adapters

    @property
    def active_adapter(self) -> str:
        """Name of the adapter in use; ``"base"`` after :meth:`disable_adapter`."""
        return BASE if self._disabled else str(self.model.active_adapter)

    @property
    def adapter_weights(self) -> dict[str, dict[str, np.ndarray]]:
        """The tensors of every adapter, ``{adapter: {tensor name: array}}``, names as in the adapter's file."""
        return {name: saved_tensors(self.model, name) for name in self.model.peft_config}

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configuration of every adapter."""
        return dict(self.model.peft_config)

    def load_adapter(self, model_id: str | Path, adapter_name: str) -> None:
        """Load one more adapter from a folder or the Hub; a rejected one leaves no trace.

        Raises:
            ConfigError: The name is taken, or cannot be one.
            AdapterNotFoundError: There is no adapter in that place.
            ArtifactError: A file of it is damaged.
            AdapterMismatchError: It does not fit the base.
        """
        if adapter_name in self.model.peft_config:
            raise ConfigError(f"there already is an adapter {adapter_name!r}; unload it first or choose another name")
        active = self.model.active_adapter
        attach(self.model, {adapter_name: model_id})
        self.model.set_adapter(active)

    def unload_adapter(self, adapter_name: str) -> None:
        """Forget an adapter that is not in use.

        Raises:
            AdapterNotFoundError: There is no adapter of that name.
            ConfigError: It is in use.
        """
        self._known(adapter_name)
        if adapter_name == self.model.active_adapter:
            raise ConfigError(f"adapter {adapter_name!r} is in use; set another one first")
        self.model.delete_adapter(adapter_name)
        if self._session is not None and adapter_name in self._session.adapters:
            self._session.unload_adapter(adapter_name)

    def set_adapter(self, adapter_name: str) -> None:
        """Use another adapter from now on; nothing is exported or compiled anew.

        Raises:
            AdapterNotFoundError: There is no adapter of that name.
            AdapterMismatchError: It does not fit the exported graph; the one in use stays.
        """
        self._known(adapter_name)
        if self._manifest is not None:
            self._fitted(adapter_name)
        self.model.set_adapter(adapter_name)
        self._disabled = False

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Use the bare base from now on, until :meth:`set_adapter`; as a context manager, until its end."""
        self._disabled = True
        return self._reenabled()

    # -- export, compile

    @property
    def onnx_path(self) -> Path | None:
        """The exported graph, ``model.onnx``; ``None`` before :meth:`export`."""
        return self._exported.folder / MODEL_FILE if self._exported is not None else None

    @property
    def export_hash(self) -> str | None:
        """Identity of the exported graph; ``None`` before :meth:`export`."""
        return self._manifest.hash if self._manifest is not None else None

    @property
    def qpc_path(self) -> Path | None:
        """The compiled program's folder; ``None`` before :meth:`compile`."""
        return self._program

    def export(self, export_dir: str | Path | None = None, *, logits: str = "last", weights: str = "linked") -> Path:
        """Export base and adapters to ``<export_dir>-<export_hash>/``; the graph takes the active adapter's structure.

        Adapters that fit the graph are written beside it (``adapters/NAME.safetensors``).

        Args:
            export_dir: Folder name without the hash; default: in the cache of exported graphs.
            logits: ``"last"``: of each row's last token; ``"all"``: of every position.
            weights: ``"linked"``: the base's files are linked beside the graph; ``"written"``: copied.

        Returns:
            Path of ``model.onnx``.

        Raises:
            UnsupportedError: The model or method cannot be exported; says why.
        """
        active = str(self.model.active_adapter)
        destination = Path(export_dir) if export_dir is not None else self._default_destination()
        request = (str(destination), logits, weights, self._state_of_base())
        if self._exported is None or self._exported.request != request or not is_whole(self._exported.folder):
            folder = export_graph(
                self.model,
                destination,
                adapter_name=active,
                checkpoint=self._checkpoint,
                logits=logits,
                weights=weights,
                neutral=lambda: neutral_of(self.model, active),
            )
            self._exported, self._manifest = _Exported(request, folder), Manifest.read(folder)
            self._program = self._session = None
            self._write_adapters(folder)
        return self._exported.folder / MODEL_FILE

    def compile(
        self,
        onnx_path: str | Path | None = None,
        compile_dir: str | Path | None = None,
        *,
        batch_size: int | None = None,
        prefill_seq_len: int = 128,
        ctx_len: int | None = None,
        target: str = "onnxruntime",
        precision: str = "fp32",
        block_size: int | None = None,
        symmetric: bool = True,
        keep: Sequence[str] = (),
        mixed: bool = False,
    ) -> Path:
        """Compile the graph to a program for this machine; exports first if that has not been done.

        Args:
            onnx_path: A graph to compile in place of the exported one: ``model.onnx`` or its folder.
            compile_dir: Where to put the program; default: in the graph's folder.
            batch_size: Rows that will be used; default: any.
            prefill_seq_len: Most tokens of a prompt in one call.
            ctx_len: Longest context; default: the base's own, at most 2048.
            target: What to compile for.
            precision: How the base's weights are held: ``"fp32"`` (as the checkpoint holds them), rounded to ``"bf16"``, or in blocks of
                integers, ``"int8"`` or ``"int4"``.
            block_size: Weights that share a scale: smaller blocks are more exact and slower; default: 32 for ``"int4"``, up
                to 128 for ``"int8"``, where nothing is lost by it.
            symmetric: Blocks have no zero point.
            keep: Patterns of weight names that stay one step higher.
            mixed: Let rows of one call run with different adapters, for an engine.

        Returns:
            The program's folder; ``qconfig.json`` in its parent records these options.

        Raises:
            ConfigError: An unknown target, or sizes that are not positive or beyond the base's context.
            ArtifactError: The graph is not whole.
        """
        if onnx_path is None:
            folder = (self.export() if self._exported is None else self._exported.folder / MODEL_FILE).parent
        else:
            folder = Path(onnx_path).parent if Path(onnx_path).suffix == ".onnx" else Path(onnx_path)
            self._manifest = Manifest.read(folder)
        if ctx_len is None:
            longest = Manifest.read(folder).max_positions
            ctx_len = min(longest, _DEFAULT_CONTEXT) if longest else _DEFAULT_CONTEXT
        program = compile_graph(
            folder,
            target=target,
            precision=precision,
            block_size=block_size,
            symmetric=symmetric,
            keep=keep,
            mixed=mixed,
            batch_size=batch_size,
            prefill_seq_len=min(prefill_seq_len, ctx_len),
            ctx_len=ctx_len,
            out=Path(compile_dir) if compile_dir is not None else None,
        )
        if program != self._program:
            self._program, self._session = program, None
        return program

    # -- run

    @property
    def session(self) -> OrtSession:
        """The session of the compiled program, with the active adapter selected.

        Raises:
            NotCompiledError: Nothing was compiled yet.
        """
        if self._program is None:
            raise NotCompiledError("nothing to run yet; call compile() first")
        if self._session is None:
            self._session = OrtSession(self._program)
        name = self.active_adapter
        if name != BASE and name not in self._session.adapters:
            self._session.load_adapter(name, self._fitted(name))
        if self._session.active_adapter != name:
            self._session.set_adapter(name)
        return self._session

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Generate with the active adapter; Hugging Face's arguments and results.

        Args:
            inputs: Prompts, ``(B, S)``; also accepted as ``input_ids=``. Padding may stand on either side.
            **kwargs: Passed to transformers' ``generate``: ``attention_mask``, ``max_new_tokens``, ``do_sample``,
                ``num_beams``, ``streamer``, ``stopping_criteria``, ``generation_config`` and the rest.

        Returns:
            Token ids ``(B, S + new)``, as ``model.generate`` of transformers returns them.

        Raises:
            NotCompiledError: Nothing was compiled yet.
            ConfigError: Prompt and new tokens do not fit the context.
            UnsupportedError: A generation mode that a compiled graph cannot serve.
        """
        session = self.session
        if self._generator is None or self._generator.session is not session:
            model = inner_model(self.model)
            self._generator = SessionModel(session, config=model.config, generation_config=model.generation_config)  # type: ignore[arg-type]
        return self._generator.generate(inputs, **kwargs)

    def tensors_of(self, adapter_name: str) -> dict[str, np.ndarray]:
        """Return an adapter as a session or an engine of this graph takes it.

        Raises:
            AdapterNotFoundError: There is no adapter of that name.
            AdapterMismatchError: It does not fit the exported graph.
            NotCompiledError: Nothing was exported yet.
        """
        self._known(adapter_name)
        return self._fitted(adapter_name)

    # -- inside

    @contextmanager
    def _reenabled(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._disabled = False

    def _known(self, name: str) -> None:
        if name not in self.model.peft_config:
            there = ", ".join(self.model.peft_config)
            raise AdapterNotFoundError(
                f"no adapter {name!r}{suggest(name, self.model.peft_config)}; there are: {there}"
            )

    def _fitted(self, name: str) -> dict[str, np.ndarray]:
        if self._manifest is None or self._exported is None:
            raise NotCompiledError("nothing was exported yet; call export() first")
        return fit(Adapter.from_model(self.model, name), self._manifest, neutral_tensors(self._exported.folder))

    def _write_adapters(self, folder: Path) -> None:
        for name in self.model.peft_config:
            try:
                self._fitted(name)
            except AdapterMismatchError:
                continue  # it needs a graph of its own; set_adapter says so
            write_exported(Adapter.from_model(self.model, name), folder)

    def _default_destination(self) -> Path:
        architecture = type(inner_model(self.model)).__name__
        return cache_root() / architecture / architecture

    def _state_of_base(self) -> tuple[Any, ...]:
        """Return what changes whenever a tensor of the base is replaced or written to."""
        inner, adapters = inner_model(self.model), set(self.model.peft_config)
        tensors = inner.named_parameters()
        return tuple((id(t), t._version) for path, t in tensors if adapter_of(inner, path, adapters) is None)
