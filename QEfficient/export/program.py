# SPDX-License-Identifier: BSD-3-Clause
"""The function that is traced: a model's forward with every tensor an input, on fake tensors."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from QEfficient.contract import RETAINED, StateSpec
from QEfficient.errors import UnsupportedError
from QEfficient.export.attention import EAGER_ATTENTION, ONNX_ATTENTION, tracing
from QEfficient.export.caches import RECURRENT, GraphCache, Shape, ShapeCache, for_model
from QEfficient.export.layers import Layer, Learning, Marking, find_layers
from QEfficient.export.lift import Lifted
from QEfficient.export.positions import RowPositions
from QEfficient.export.recurrence import limited_steps
from QEfficient.export.repairs import Repairs
from QEfficient.export.skeleton import uncounted_token

# Sizes of the example inputs. They leave no trace in the graph, as long as none is 0 or 1 and no two are equal.
_BATCH, _SEQUENCE, _CONTEXT, _RANK = 2, 3, 11, 5


class Program(nn.Module):
    """``(ids, positions, states, tensors) -> (logits, states)``, for the layers that are traced.

    Attributes:
        inner: The transformers model, a skeleton.
        cached: Cache indexes of all layers, in order.
        followers: Layers that are stamped, each with its template.
        names: Names of ``tensors``: base, adapter and scalings, without those that only followers read.
    """

    def __init__(self, inner: nn.Module, lifted: Lifted, adapter_name: str | None, *, keep_all: bool) -> None:
        super().__init__()
        self.inner = inner
        self.lifted, self.adapter_name, self.keep_all = lifted, adapter_name, keep_all
        self.accepts = inspect.signature(inner.forward).parameters
        self.counts = uncounted_token(inner) is not None  # then it is given no positions: its numbers begin elsewhere
        self.shapes: dict[int, dict[str, Shape]] = {}
        self.followers: list[tuple[Layer, Layer]] = []
        self.names = [*lifted.base, *lifted.adapter, *lifted.scalings]
        self.sites = _distinct(inner, lifted.sites)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, states: list[Tensor], tensors: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the model on a cache made of ``states``, followers replaced by marks."""
        specs = self.states_of(self.traced)
        lengths = [
            t.shape[s.shape.index("ctx_len")] for t, s in zip(states, specs, strict=True) if "ctx_len" in s.shape
        ]
        context = lengths[0] if lengths else None
        with tracing(position_ids, context) as call:
            named = {spec.name: state for spec, state in zip(specs, states, strict=True)}
            cache = GraphCache(named, call.write_index, context)
            with Marking(self.followers):
                logits = self.run(input_ids, position_ids, cache, tensors)
        return logits, [cache.states[spec.name] for spec in specs]

    def run(self, input_ids: Tensor, position_ids: Tensor, cache: Any, tensors: Sequence[Tensor]) -> Tensor:
        """Call the model with every tensor replaced, and return its logits."""
        named = dict(zip(self.names, tensors, strict=True))
        for name, (path, attribute) in self.lifted.entries.items():
            if name in named:
                vars(self.inner.get_submodule(path))[attribute][self.adapter_name] = named[name]
        holder = "past_key_values" if "past_key_values" in self.accepts else "cache_params"
        kwargs: dict[str, Any] = {"input_ids": input_ids, holder: for_model(cache, self.inner), "use_cache": True}
        if "position_ids" in self.accepts and not self.counts:
            kwargs["position_ids"] = position_ids.clamp(min=0)
        replaced = {path: named[name] for path, name in self.sites.items() if name in named}
        with (
            self._last_token_only(position_ids),
            _first_task(self.inner),
            limited_steps(self.inner),
            Repairs(),
            RowPositions(position_ids),
        ):
            out = torch.func.functional_call(self.inner, replaced, (), kwargs, tie_weights=False)
        return out.logits  # type: ignore[no-any-return]

    @property
    def cached(self) -> list[int]:
        """Cache indexes of all layers, in order."""
        return sorted(self.shapes)

    @property
    def traced(self) -> list[int]:
        """Cache indexes of the layers that are traced, in order."""
        followers = {layer.index for layer, _ in self.followers}
        return [index for index in self.cached if index not in followers]

    def states_of(self, indexes: Sequence[int]) -> tuple[StateSpec, ...]:
        """Return the states of layers."""
        return tuple(
            StateSpec(f"{kind}.{index}", shape) for index in indexes for kind, shape in self.shapes[index].items()
        )

    @property
    def one_token(self) -> bool:
        """Whether a call takes one token: a state changes with every token."""
        return any(kind.startswith(RECURRENT) for kinds in self.shapes.values() for kind in kinds)

    def own(self) -> dict[str, dict[str, str]]:
        """Return, for each follower's path: its template's inputs and outputs -> its own."""
        entries = {f"{path}.{attribute}": name for name, (path, attribute) in self.lifted.entries.items()}
        sites = {**self.lifted.sites, **entries, **self.lifted.shared}
        found = {}
        for layer, template in self.followers:
            start = f"{template.path}."
            own = {
                name: sites[layer.path + path.removeprefix(template.path)]
                for path, name in sites.items()
                if path.startswith(start)
            }
            for kind in self.shapes[layer.index]:
                for end in ("", RETAINED):
                    own[f"{kind}.{template.index}{end}"] = f"{kind}.{layer.index}{end}"
            found[layer.path] = own
        return found

    def leave_out_followers(self) -> None:
        """Take the followers' own tensors out of the model and out of ``names``: their templates stand for them."""
        starts = tuple(f"{layer.path}." for layer, _ in self.followers)
        if not starts:
            return
        kept = {name for path, name in self.lifted.sites.items() if not path.startswith(starts)}
        kept |= {name for name, (path, _) in self.lifted.entries.items() if not f"{path}.".startswith(starts)}
        self.names = [name for name in self.names if name in kept]
        self.sites = {path: name for path, name in self.sites.items() if not path.startswith(starts)}
        inside = [(path, module) for path, module in self.inner.named_modules(remove_duplicate=False)]
        shared = {id(module) for path, module in inside if not f"{path}.".startswith(starts)}
        for path, module in inside:
            if f"{path}.".startswith(starts) and id(module) not in shared:
                module._parameters = dict.fromkeys(module._parameters)
                module._buffers = dict.fromkeys(module._buffers)

    @contextmanager
    def _last_token_only(self, position_ids: Tensor) -> Iterator[None]:
        """Have the output projection see each row's last real token only: the others' logits are not asked for."""
        head = self.inner.get_output_embeddings()  # type: ignore[operator]
        if self.keep_all:
            yield
            return
        if head is None:
            raise UnsupportedError(f"{type(self.inner).__name__} names no output embeddings; export with logits='all'")
        last, rows = position_ids.argmax(1), torch.arange(position_ids.shape[0])
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][rows, last].unsqueeze(1), *args[1:]))
        try:
            yield
        finally:
            hook.remove()


class Fakes:
    """Fake tensors: shapes and types without memory, for everything that goes into a trace."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        with self.mode:
            self.ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
            self.positions = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
            self.one_id, self.one_position = (torch.zeros(_BATCH, 1, dtype=torch.int64) for _ in range(2))
        self._made: dict[str, Tensor] = {}

    def tensors(self, program: Program) -> list[Tensor]:
        """Return fakes of ``program.names``, each always the same."""
        lifted = program.lifted
        for name in program.names:
            if name not in self._made:
                tensor = lifted.base.get(name, lifted.adapter.get(name))
                self._made[name] = self._like(tensor, lifted.rank_axes.get(name))
        return [self._made[name] for name in program.names]

    def states(self, specs: tuple[StateSpec, ...]) -> list[Tensor]:
        """Return fakes of cache tensors."""
        sizes = {"batch_size": _BATCH, "ctx_len": _CONTEXT}
        with self.mode:
            return [torch.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape]) for spec in specs]

    def _like(self, tensor: Tensor | None, axis: int | None) -> Tensor:
        if tensor is None:  # a scaling
            with self.mode:
                return torch.ones(())
        shape = [_RANK if i == axis else n for i, n in enumerate(tensor.shape)]
        meta = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return self.mode.fake_tensor_converter.from_meta_and_device(self.mode, meta, torch.device("cpu"))


def learn(program: Program, fakes: Fakes) -> None:
    """Run the model once on fake tensors: learn its cache, the attention that suits it, and which layers are alike.

    Raises:
        UnsupportedError: The model keeps no key/value cache.
    """
    try:
        cache, learning, attention_nodes = _try(program, fakes, ONNX_ATTENTION)
        written_out = attention_nodes < cache.updates
    except UnsupportedError:
        raise
    except Exception:  # attention that is written out need not stand a mask that is not there
        cache, learning, _ = _try(program, fakes, EAGER_ATTENTION)
        written_out = True
    if not cache.shapes:
        raise UnsupportedError(f"{type(program.inner).__name__} keeps no cache that can be exported")
    if written_out:
        _set_attention(program.inner, EAGER_ATTENTION)
    program.shapes, program.followers = cache.shapes, learning.followers
    program.leave_out_followers()


def _try(program: Program, fakes: Fakes, attention: str) -> tuple[ShapeCache, Learning, int]:
    """Run the model once; return what it kept, which layers are alike, and how many ``Attention`` operators it emitted."""
    cache = ShapeCache()
    _set_attention(program.inner, attention)
    learning = Learning(find_layers(program.inner), cache)
    with fakes.mode, tracing(fakes.positions, _SEQUENCE) as call, learning:
        program.run(fakes.ids, fakes.positions, cache, fakes.tensors(program))
    return cache, learning, call.attention_nodes


@contextmanager
def _first_task(inner: nn.Module) -> Iterator[None]:
    """Tell modules that ask for ``task_ids`` to take the first task: what was lifted of them is the chosen one."""
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"task_ids": torch.tensor([0])}), with_kwargs=True
        )
        for module in inner.modules()
        if "task_ids" in inspect.signature(module.forward).parameters
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _set_attention(inner: nn.Module, implementation: str) -> None:
    for module in inner.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = implementation
            config._experts_implementation = "batched_mm"  # computes only the chosen experts, without a loop over them


def _distinct(inner: nn.Module, sites: dict[str, str]) -> dict[str, str]:
    """Return one path for each tensor of each module, though the module may be reached by several paths.

    ``functional_call`` of torch 2.13 swaps a shared module once for each path, and restores the wrong tensor.
    """
    seen: set[tuple[int, str]] = set()
    distinct = {}
    for path, name in sites.items():
        owner, _, key = path.rpartition(".")
        place = (id(inner.get_submodule(owner)), key)
        if place not in seen:
            seen.add(place)
            distinct[path] = name
    return distinct
