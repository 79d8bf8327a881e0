# SPDX-License-Identifier: BSD-3-Clause
"""The bridge from a session to transformers' own generation.

transformers decides which token comes next: sampling, beams, stopping and streaming are its code. Ours answers its
calls of ``forward`` from a session. Knows token ids; knows no text but what transformers is given a tokenizer for.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from QEfficient.contract import ONE_TOKEN, Manifest
from QEfficient.errors import ConfigError, UnsupportedError
from QEfficient.runtime.prefill import prefill
from QEfficient.runtime.session import Session, longest_context

Array = npt.NDArray[Any]

DEFAULT_CHUNK_LEN = 128
"""Most prompt tokens in one call, where the program names no ``prefill_seq_len``."""

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
_INSIDE = ("assistant_early_exit", "use_mtp", "speculation_type")  # ways to draft that look inside the model
_CTX_STEP = 64  # contexts are rounded up to this, so that prompts of similar length share one allocation


@dataclass(slots=True)
class SessionCache:
    """What transformers takes for the cache: the cache itself lies in the session.

    Attributes:
        session: Where keys and values are.
        chunk_len: Most prompt tokens in one call.
        lengths: Tokens in each row of the cache, ``(B,)``.
        columns: Columns of ``input_ids`` that are in the cache, padding included.
    """

    session: Session
    chunk_len: int
    lengths: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: int = 0
    is_compileable: bool = False
    is_croppable: bool = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns of ``input_ids`` need not be given again."""
        return self.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row continue the beam that it was given."""
        rows = beam_idx.numpy()
        self.session.reorder(rows)
        self.lengths = self.lengths[rows]

    def activate_past_recording(self) -> None:
        """Do nothing: transformers asks, before it takes tokens back with :meth:`crop`."""

    def crop(self, max_length: int) -> None:
        """Forget the last columns of every row: ``-max_length`` of them; later tokens overwrite what they left."""
        if max_length > 0:
            raise ConfigError(f"the cache is cropped by a number of columns, at most 0, not to {max_length}")
        self.lengths = self.lengths + max_length
        self.columns += max_length

    def extend(self, input_ids: Array, mask: Array | None, *, keep: int = 1) -> Array:
        """Take new columns of ``input_ids`` into the cache; return logits ``(B, keep, V)``.

        Args:
            input_ids: The new columns, ``(B, n)``.
            mask: True where a token is real, ``(B, n)``; ``None``: all are.
            keep: Logits behind how many of each row's last tokens; more than one takes a graph with all logits, one row.
        """
        if not input_ids.shape[1]:
            raise ConfigError("the prompt is empty: generation needs at least one token")
        rows = [ids if mask is None else ids[mask[b]] for b, ids in enumerate(input_ids)]
        last = keep if keep > 1 or (mask is None and input_ids.shape[1] == 1) else 0  # tokens that take one call
        before = [row[: len(row) - last] for row in rows]
        if len(before[0]):
            logits = prefill(self.session, before, chunk_len=self.chunk_len, starts=self.lengths)[:, None]
            self.lengths = self.lengths + np.array([len(r) for r in before])
        if last:
            ids = np.stack([row[len(row) - last :] for row in rows])
            logits = self.session.run(ids, self.lengths[:, None] + np.arange(last))[:, -keep:]
            self.lengths = self.lengths + last
        self.columns += input_ids.shape[1]
        return logits


class SessionModel(GenerationMixin):
    """A session that generates as a transformers causal LM does: :meth:`generate` takes the same arguments.

    Padding may stand on either side. One generation at a time: calls from several threads wait for each other. PyTorch is
    set to one thread while it generates.

    Args:
        session: An open session; its cache and its active adapter are used, and the cache is overwritten.
        config: The base's configuration; default: the one in the session's manifest.
        generation_config: Defaults of :meth:`generate`; default: what ``config`` implies.
        chunk_len: Most prompt tokens in one call; default: the program's ``prefill_seq_len``.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self,
        session: Session,
        *,
        config: PreTrainedConfig | None = None,
        generation_config: GenerationConfig | None = None,
        chunk_len: int | None = None,
    ) -> None:
        self.session = session
        self.config = config if config is not None else config_of(session.manifest)
        self.generation_config = generation_config or GenerationConfig.from_model_config(self.config)
        self.chunk_len = chunk_len or session.manifest.options.get("prefill_seq_len") or DEFAULT_CHUNK_LEN
        self._lock = threading.RLock()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as :meth:`transformers.GenerationMixin.generate` does, with its arguments and results.

        Args:
            *args: Forwarded to transformers; the first one is the prompts, ``(B, S)``, which also go as ``input_ids=``.
            **kwargs: Forwarded to transformers.

        Raises:
            ConfigError: Prompt and new tokens do not fit the longest context, or a prompt is empty.
            UnsupportedError: A generation mode or output that a session cannot serve.
            ValueError: From transformers: unknown or contradicting arguments.
        """
        with self._lock, _one_torch_thread():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def __call__(self, **kwargs: Any) -> CausalLMOutputWithPast:
        """Call :meth:`forward`, as a torch module does."""
        return self.forward(**kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: SessionCache,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int = 1,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Return logits ``(B, logits_to_keep, V)`` behind each row's last tokens, for new columns ``input_ids`` ``(B, n)``."""
        mask = None if attention_mask is None else attention_mask.numpy().astype(bool)
        logits = past_key_values.extend(input_ids.numpy(), mask, keep=logits_to_keep)
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=past_key_values)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SessionCache | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool | None = None,
        tokenizer: Any = None,
        logits_to_keep: int = 1,
        assistant_tokenizer: Any = None,
    ) -> dict[str, Any]:
        """Return the arguments of :meth:`forward`: the columns that the cache lacks, and the mask of a padded prompt.

        The other parameters are what transformers passes besides; it takes any argument without a parameter for a typo.
        """
        if past_key_values is None:
            raise ConfigError("generation needs the session's cache")
        mask = attention_mask if past_key_values.columns == 0 else None
        return {
            "input_ids": input_ids[:, past_key_values.columns :],
            "past_key_values": past_key_values,
            "attention_mask": mask,
            "logits_to_keep": logits_to_keep,
        }

    @classmethod
    def can_generate(cls) -> bool:
        """Return true: transformers asks."""
        return True

    def is_remote_code(self) -> bool:
        """Return false: transformers asks."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Return nothing to choose: transformers asks."""
        return {}

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        if generation_mode not in _MODES:
            known = ", ".join(m.value for m in _MODES)
            raise UnsupportedError(
                f"generation mode {generation_mode.value!r} is not supported by a session ({known} are)"
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            self._check_assisted(generation_config)
        if generation_config.guidance_scale not in (None, 1):
            raise UnsupportedError(
                f"guidance_scale {generation_config.guidance_scale} is not supported: it takes a second cache, for the "
                "unconditional prompt, and a session has one"
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)  # type: ignore[misc]

    def _check_assisted(self, generation_config: GenerationConfig) -> None:
        """Refuse what a session cannot do for speculation: look inside the model, take back recurrent state."""
        manifest = self.session.manifest
        for name in _INSIDE:
            if getattr(generation_config, name, None):
                raise UnsupportedError(
                    f"{name} is not supported: it drafts from inside the model, a graph gives logits"
                )
        if manifest.options.get(ONE_TOKEN):
            raise UnsupportedError("assisted generation takes tokens back, which recurrent state does not allow")
        if manifest.logits != "all":
            raise UnsupportedError(
                "assisted generation checks several tokens in one call, but this graph gives logits of the last one only; "
                'export it with logits="all" (qefficient export --logits all)'
            )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Allocate the session's cache; transformers calls this when it knows how long the result may get."""
        for name in ("past_key_values", "output_attentions", "output_hidden_states"):
            if model_kwargs.get(name):
                raise UnsupportedError(f"{name} is not available from a compiled graph")
        mask = model_kwargs.get("attention_mask")
        need = max_cache_length
        if mask is not None:
            real = mask.sum(1)
            if int(real.min()) < 1:
                raise ConfigError(f"prompt {int(real.argmin())} is empty: its attention mask is all zero")
            need -= mask.shape[1] - int(real.max())
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        self._allocate(batch_size * copies, need)
        chunk_len = generation_config.prefill_chunk_size or self.chunk_len
        generation_config.prefill_chunk_size = (
            None  # prefill is chunked below transformers, row by row where that is better
        )
        rows = np.zeros(batch_size * copies, np.int64)
        model_kwargs["past_key_values"] = SessionCache(self.session, chunk_len, rows)

    def _allocate(self, rows: int, need: int) -> None:
        longest = longest_context(self.session.manifest) - self.session.virtual_tokens
        if need > longest:
            raise ConfigError(
                f"the context does not fit: prompt and new tokens need {need} positions, the longest context is {longest}. "
                "Shorten the prompt or lower max_new_tokens."
            )
        ctx_len = min(-(-need // _CTX_STEP) * _CTX_STEP, longest)
        if (self.session.batch_size, self.session.ctx_len) == (rows, ctx_len):
            self.session.reset()
        else:
            self.session.allocate(rows, ctx_len)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep PyTorch to one thread: what it does for each token is small, and its threads get in the way of the session's.

    On two busy cores, copying one row of logits took 8 ms on two threads and 0.1 ms on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def config_of(manifest: Manifest) -> PreTrainedConfig:
    """Return the base's configuration as transformers' class.

    Raises:
        UnsupportedError: This transformers does not know the base's ``model_type``.
    """
    fields = dict(manifest.base["config"])
    try:
        config: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError) as e:
        raise UnsupportedError(f"the base's configuration cannot be read: {e}") from e
    return config
