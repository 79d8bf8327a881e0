# SPDX-License-Identifier: BSD-3-Clause
"""``QEffAutoLoraModelForCausalLM``: prompts with different adapters, in one batch on one engine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from QEfficient.contract import BASE, Manifest
from QEfficient.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, NotCompiledError
from QEfficient.options import suggest
from QEfficient.peft.adapters import check_name, read_config, resolve
from QEfficient.peft.auto import QEffAutoPeftModelForCausalLM
from QEfficient.peft.loading import check_base
from QEfficient.runtime.engine import Engine
from QEfficient.runtime.requests import Request, Sampling

_DEFAULT_SLOTS = 8


class QEffAutoLoraModelForCausalLM:
    """A base and any number of adapters; each prompt names its own.

    The first adapter that is loaded decides the graph's structure; later ones may have other ranks, scalings and fewer targets,
    and are loaded and unloaded without a new export or compile.

    Example::

        model = QEffAutoLoraModelForCausalLM.from_pretrained("path/to/base")
        model.load_adapter("path/to/sql", "sql")
        model.load_adapter("path/to/summarise", "summarise")
        model.compile(batch_size=8, ctx_len=1024, precision="int4")
        model.generate(prompts=[p, q], prompt_to_adapter_mapping=["sql", "base"], tokenizer=tokenizer, max_new_tokens=64)

    Args:
        base: Folder or Hub id of the base.
        **kwargs: Passed to the base's ``from_pretrained``.
    """

    def __init__(self, base: str | Path, **kwargs: Any) -> None:
        check_base(base)
        self._base, self._kwargs = base, kwargs
        self._model: QEffAutoPeftModelForCausalLM | None = None
        self._engine: Engine | None = None
        self._slots = _DEFAULT_SLOTS
        self._program: Path | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "QEffAutoLoraModelForCausalLM":
        """Name the base; it is loaded with the first adapter.

        Raises:
            ConfigError: It names a folder that is not there.
        """
        return cls(pretrained_model_name_or_path, **kwargs)

    # -- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters, besides ``"base"``."""
        return tuple(self._model.model.peft_config) if self._model is not None else ()

    def load_adapter(self, adapter_model_id: str | Path, adapter_name: str) -> None:
        """Load an adapter from a folder or the Hub, also while prompts are running; a rejected one leaves no trace.

        Raises:
            ConfigError: The name is taken, or cannot be one.
            AdapterNotFoundError: There is no adapter in that place.
            ArtifactError: A file of it is damaged.
            AdapterMismatchError: It does not fit the base, or not the graph that has been compiled.
        """
        if self._model is None:
            check_name(adapter_name)
            read_config(resolve(adapter_model_id))
            self._model = QEffAutoPeftModelForCausalLM.from_base(
                self._base, {adapter_name: adapter_model_id}, **self._kwargs
            )
            return
        self._model.load_adapter(adapter_model_id, adapter_name)
        if self._engine is None:
            return
        try:
            self._engine.load_adapter(adapter_name, self._model.tensors_of(adapter_name))
        except AdapterMismatchError:
            self._model.model.delete_adapter(adapter_name)
            raise

    def unload_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; prompts of it that are running finish. The first one stays: the graph has its structure.

        Raises:
            AdapterNotFoundError: There is no adapter of that name.
            ConfigError: It is the first one.
        """
        if self._model is None:
            raise AdapterNotFoundError(f"no adapter {adapter_name!r}: none has been loaded")
        self._model.unload_adapter(adapter_name)
        if self._engine is not None:
            self._engine.unload_adapter(adapter_name)

    # -- export, compile

    def export(self, export_dir: str | Path | None = None) -> Path:
        """Export base and adapters; see :meth:`QEffAutoPeftModelForCausalLM.export`."""
        return self._loaded().export(export_dir)

    def compile(self, *, batch_size: int = _DEFAULT_SLOTS, ctx_len: int | None = None, **kwargs: Any) -> Path:
        """Compile for mixed batches.

        Args:
            batch_size: Slots: prompts that run at a time.
            ctx_len: Longest prompt and answer together.
            **kwargs: As :meth:`QEffAutoPeftModelForCausalLM.compile`.

        Returns:
            The program's folder.

        Raises:
            AdapterMismatchError: A loaded adapter does not fit the graph of the first one.
        """
        model = self._loaded()
        program = model.compile(ctx_len=ctx_len, mixed=True, **kwargs)
        tensors = {name: model.tensors_of(name) for name in self.adapters}
        manifest = Manifest.read(program)
        engine = Engine(
            program,
            slots=batch_size,
            ctx_len=manifest.options["ctx_len"],
            chunk_len=manifest.options["prefill_seq_len"],
        )
        for name, arrays in tensors.items():
            engine.load_adapter(name, arrays)
        if self._engine is not None:
            self._engine.close()
        self._program, self._engine = program, engine.start()
        return program

    @property
    def qpc_path(self) -> Path | None:
        """The compiled program's folder; ``None`` before :meth:`compile`."""
        return self._program

    @property
    def engine(self) -> Engine:
        """The running engine.

        Raises:
            NotCompiledError: Nothing was compiled yet.
        """
        if self._engine is None:
            raise NotCompiledError("nothing to run yet; call compile() first")
        return self._engine

    # -- run

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        prompt_to_adapter_mapping: Sequence[str] | None = None,
        tokenizer: Any = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_ids: frozenset[int] | None = None,
    ) -> list[Any]:
        """Continue every prompt with its adapter; any number of prompts, answers in their order.

        Args:
            prompts: Texts, if a tokenizer is given, else token ids.
            prompt_to_adapter_mapping: The adapter of each prompt, or ``"base"``; default: the base for all.
            tokenizer: A transformers tokenizer.
            max_new_tokens: Most new tokens of each.
            sampling: How tokens are chosen; default: the likeliest.
            eos_ids: Tokens that end an answer; default: those of the base's generation configuration.

        Returns:
            The new text of each prompt, without special tokens; without a tokenizer the new token ids.

        Raises:
            NotCompiledError: Nothing was compiled yet.
            ConfigError: Prompts and mapping differ in length, or a prompt does not fit. Nothing has been run then.
            AdapterNotFoundError: A name of the mapping.
        """
        engine = self.engine
        names = [BASE] * len(prompts) if prompt_to_adapter_mapping is None else list(prompt_to_adapter_mapping)
        if len(names) != len(prompts):
            raise ConfigError(
                f"{len(prompts)} prompts need as many adapters in prompt_to_adapter_mapping, not {len(names)}"
            )
        ends = self._ends() if eos_ids is None else eos_ids
        encode: Callable[[Any], list[int]] = (
            list if tokenizer is None else lambda text: list(tokenizer(text)["input_ids"])
        )
        requests = [
            Request(
                prompt_ids=encode(prompt),
                adapter=self._known(name),
                max_new_tokens=max_new_tokens,
                eos_ids=ends,
                sampling=sampling or Sampling(),
            )
            for prompt, name in zip(prompts, names, strict=True)
        ]
        answers = [[token.id for token in stream] for stream in _checked(engine.submit_all(requests))]
        return answers if tokenizer is None else [tokenizer.decode(a, skip_special_tokens=True) for a in answers]

    def close(self) -> None:
        """Let what runs finish, and stop the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _known(self, name: str) -> str:
        if name != BASE and name not in self.engine.adapters:
            there = ", ".join((BASE, *self.engine.adapters))
            raise AdapterNotFoundError(f"no adapter {name!r}{suggest(name, self.engine.adapters)}; there are: {there}")
        return name

    def _loaded(self) -> QEffAutoPeftModelForCausalLM:
        if self._model is None:
            raise ConfigError("load an adapter first: its structure is that of the graph")
        return self._model

    def _ends(self) -> frozenset[int]:
        config = getattr(self._loaded().model, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        return frozenset([ids] if isinstance(ids, int) else ids or [])


def _checked(streams: Sequence[Any]) -> Sequence[Any]:
    """Wait for all, and raise the first error."""
    for stream in streams:
        stream.wait()
        if stream.error is not None:
            raise stream.error
    return streams
