# SPDX-License-Identifier: BSD-3-Clause
"""A third set of faults written without looking at the checks: what exports, converters, uploads and hand edits do; figures are in docs/faults.md.

``checks`` names what a user would look at first; what nothing can tell from a sound adapter has none.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file as save_tensors
from torch import nn

from QEfficient.testing.reference import Reference
from tests.testing.planted_adapters import Fault, config, every, renamed, tensors
from tests.testing.planted_graphs import GraphFault, SessionFault, Wrapped, exported
from tests.testing.planted_held_out import ExportFault
from tests.testing.planted_pytorch import ModelFault, adapted
from tests.testing.planted_second import LOGITS, each, parameters

_A, _B = r"lora_A\.weight", r"lora_B\.weight"
_FILE = "adapter_model.safetensors"
Tensors = dict[str, np.ndarray]


def _random(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).normal(scale=0.1, size=shape).astype(np.float32)


def _pointer(folder: Path) -> None:
    """Leave what git keeps in place of a large file."""
    digest = hashlib.sha256((folder / _FILE).read_bytes()).hexdigest()
    (folder / _FILE).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 123456\n")


def _page(folder: Path) -> None:
    """Leave the page that a server answered instead of the file."""
    (folder / _FILE).write_text("<!doctype html><html><head><title>Sign in</title></head><body></body></html>")


def _half_downloaded(folder: Path) -> None:
    """Fill the last third of the file with zeros: its place was reserved, the download broke off."""
    content = bytearray((folder / _FILE).read_bytes())
    start = len(content) * 2 // 3
    content[start:] = bytes(len(content) - start)
    (folder / _FILE).write_bytes(content)


def _dangling(folder: Path) -> None:
    """Copy a snapshot of the hub's cache without the files that its links lead to."""
    (folder / _FILE).unlink()
    (folder / _FILE).symlink_to("../../blobs/0123456789abcdef")


def _nested(folder: Path) -> None:
    """Upload the folder of a checkpoint inside the repository."""
    inner = folder / "checkpoint-500"
    inner.mkdir()
    for name in (_FILE, "adapter_config.json"):
        (folder / name).rename(inner / name)


def _marked(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_bytes(b"\xff\xfe" + path.read_text().encode("utf-16-le"))


def _by_name(folder: Path) -> None:
    """Write a configuration for each adapter's name into one file."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"default": json.loads(path.read_text())}))


def _zero_sized(loaded: Tensors) -> None:
    """Save what ZeRO stage 3 leaves on a rank that did not gather."""
    for key in loaded:
        loaded[key] = np.zeros((0,), np.float32)


def _one_rank(loaded: Tensors) -> None:
    """Keep the rows of B that the first of two tensor-parallel ranks held."""
    for key in [k for k in loaded if re.search(r"q_proj.*lora_B", k)]:
        loaded[key] = loaded[key][: len(loaded[key]) // 2].copy()


def _whole_model(loaded: Tensors) -> None:
    """Save the base's weights too, as ``state_dict()`` of the whole model does."""
    for key in [k for k in loaded if re.search(r"q_proj.*lora_A", k)]:
        b = loaded[key.replace("lora_A", "lora_B")]
        loaded[key.replace("lora_A.weight", "base_layer.weight")] = _random((len(b), loaded[key].shape[1]))


def _mlx(loaded: Tensors) -> Tensors:
    """Name and lay out the factors as MLX does."""
    return {
        re.sub(
            r"lora_([AB])\.weight", lambda m: f"lora_{m[1].lower()}", k.removeprefix("base_model.model.")
        ): v.T.copy()
        for k, v in loaded.items()
    }


def _kohya(loaded: Tensors) -> Tensors:
    """Name the factors as the diffusion trainers do, alpha among the tensors."""
    made: Tensors = {}
    for key, value in loaded.items():
        module, factor = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key).groups()  # type: ignore[union-attr]
        flat = "lora_te_" + module.replace(".", "_")
        made[f"{flat}.lora_{'down' if factor == 'A' else 'up'}.weight"] = value
        made[f"{flat}.alpha"] = np.array(8, np.float32)
    return made


def _fused(loaded: Tensors) -> None:
    """Keep queries, keys and values as one module, as other code of this model has them."""
    for key in [k for k in loaded if re.search(r"q_proj.*lora_B", k)]:
        parts = [loaded.pop(key.replace("q_proj", f"{n}_proj")) for n in "qkv"]
        loaded[key.replace("q_proj", "qkv_proj")] = np.concatenate(parts)
        a = key.replace("lora_B", "lora_A")
        first, _, _ = (loaded.pop(a.replace("q_proj", f"{n}_proj")) for n in "qkv")
        loaded[a.replace("q_proj", "qkv_proj")] = first


def _from_one(loaded: Tensors) -> Tensors:
    """Count layers from one."""
    return {re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + 1}.", k): v for k, v in loaded.items()}


def _magnitudes(loaded: Tensors) -> None:
    """Leave DoRA's magnitudes in the file of an adapter whose configuration says that it is none."""
    for key in [k for k in loaded if "lora_B" in k]:
        loaded[key.replace("lora_B.weight", "lora_magnitude_vector")] = 1 + np.abs(_random((len(loaded[key]),)))


def _biases(loaded: Tensors) -> None:
    for key in [k for k in loaded if "lora_B" in k]:
        loaded[key.replace("lora_B.weight", "lora_B.bias")] = _random((len(loaded[key]),))


def _inner_name(folder: Path) -> None:
    """Save a module's copy under the name that it has inside PEFT."""
    config(modules_to_save=["lm_head"])(folder)
    inner = "base_model.model.lm_head.modules_to_save.default.weight"
    tensors(lambda t: t.update({inner: _random((128, 64))}))(folder)


def _fewer_tokens(folder: Path) -> None:
    """Save an embedding of a base whose vocabulary was shorter."""
    config(modules_to_save=["embed_tokens"])(folder)
    tensors(lambda t: t.update({"base_model.model.model.embed_tokens.weight": _random((120, 64))}))(folder)


def _other_order(tensor: np.ndarray) -> np.ndarray:
    """Read every number with its bytes in the other order."""
    return tensor.byteswap().view(np.float32)


def _eight_bits(folder: Path) -> None:
    """Save in float8, as a script that quantises a whole folder does."""
    loaded = load_file(folder / _FILE)
    save_tensors({k: torch.from_numpy(v).to(torch.float8_e4m3fn) for k, v in loaded.items()}, folder / _FILE)


def _quantised_base(folder: Path) -> None:
    """Record a base whose weights are in 4 bits, which the given one's are not."""
    path = folder.parent / "base-bnb-4bit"
    path.mkdir(exist_ok=True)
    recorded = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (path / "config.json").write_text(
        json.dumps({**json.loads((Path(recorded) / "config.json").read_text()), **quantised})
    )
    config(base_model_name_or_path=str(path))(folder)


def paired_tokenizers(
    *,
    base: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
    base_settings: dict[str, Any] | None = None,
    own_settings: dict[str, Any] | None = None,
) -> Callable[[Path], None]:
    """Give base and adapter a tokenizer each: the same one, but for what is said."""

    def plant(folder: Path) -> None:
        recorded = Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
        words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 120)}}
        plain = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": words}}  # fmt: skip
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        for place, content, settings in ((recorded, base, base_settings), (folder, own, own_settings)):
            (place / "tokenizer.json").write_text(json.dumps({**plain, **(content or {})}))
            (place / "tokenizer_config.json").write_text(json.dumps({**said, **(settings or {})}))

    return plant


def _stops(folder: Path) -> None:
    """Bring settings for generating whose end of text is a token of the middle of the vocabulary."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 77, "bos_token_id": 1}))


_TOOL = {"id": 120, "content": "<tool>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
_SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+|\p{L}"}, "behavior": "Isolated", "invert": False}
_FILES, _COVERAGE = ("adapter.files",), ("adapter.coverage",)
THIRD_ADAPTER_FAULTS = (
    Fault("pointer of git lfs", _FILES, _pointer),
    Fault("a web page instead of the file", _FILES, _page),
    Fault("file of no bytes", _FILES, lambda f: (f / _FILE).write_bytes(b"")),
    Fault("download broken off, the rest zeros", ("adapter.effect", "adapter.rows", "adapter.files"), _half_downloaded),
    Fault("link to nowhere", _FILES, _dangling),
    Fault("adapter in a folder of the folder", _FILES, _nested),
    Fault("config in UTF-16", _FILES, _marked),
    Fault("config by adapter's name", ("adapter.files", "adapter.config"), _by_name),
    Fault("method in small letters", _FILES, config(peft_type="lora"), lora=True),
    Fault("r of zero", ("adapter.files", "adapter.config", "adapter.shapes"), config(r=0), lora=True),
    Fault("alpha in a list", ("adapter.files", "adapter.config", "adapter.scaling"), config(lora_alpha=[8]), lora=True),
    Fault("targets in one string", ("adapter.targets", "adapter.shapes", "adapter.coverage"), config(target_modules="q_proj,v_proj"), lora=True),
    Fault("targets as Python prints a set", ("adapter.targets", "adapter.shapes", "adapter.coverage"), config(target_modules=["{'q_proj', 'v_proj'}"]), lora=True),
    Fault("layers under a name of another model", ("adapter.coverage", "adapter.shapes", "adapter.patterns"), config(layers_to_transform=[0, 1], layers_pattern="h", target_modules=["q_proj", "v_proj"]), lora=True),
    Fault("a target saved as a whole too", ("adapter.coverage", "adapter.targets"), config(modules_to_save=["q_proj"]), lora=True),
    Fault("a field of a later PEFT", ("adapter.fields",), config(use_sdlora=True), lora=True),
    Fault("invocation tokens beyond the vocabulary", ("adapter.tokenizer", "adapter.config", "adapter.loading"), config(alora_invocation_tokens=[5000, 5001]), lora=True),
    Fault("empty tensors of ZeRO 3", ("adapter.shapes", "adapter.coverage", "adapter.effect"), tensors(_zero_sized)),
    Fault("rows of one tensor-parallel rank", ("adapter.shapes",), tensors(_one_rank), lora=True),
    Fault("weights of the base beside", ("adapter.coverage", "adapter.own_weights"), tensors(_whole_model), lora=True),
    Fault("names of a compiled model", _COVERAGE, renamed(lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."))),
    Fault("names of a vision model", _COVERAGE, renamed(lambda k: k.replace(".model.layers.", ".model.language_model.layers."))),
    Fault("MLX's names and layout", _COVERAGE, tensors(_mlx), lora=True),
    Fault("names of a diffusion trainer", _COVERAGE, tensors(_kohya), lora=True),
    Fault("queries, keys and values as one", ("adapter.coverage", "adapter.targets"), tensors(_fused), lora=True),
    Fault("layers counted from one", _COVERAGE, tensors(_from_one), lora=True),
    Fault("magnitudes, but no DoRA", _COVERAGE, tensors(_magnitudes), lora=True),
    Fault("biases saved, none said", _COVERAGE, tensors(_biases), lora=True),
    Fault("PEFT's inner name of a copy", ("adapter.coverage", "adapter.own_weights"), _inner_name, lora=True),
    Fault("embedding of a shorter vocabulary", ("adapter.shapes", "adapter.tokenizer"), _fewer_tokens, lora=True),
    Fault("bytes in the other order", ("adapter.finite", "adapter.outliers", "adapter.scaling"), every(r"lora_[AB]", _other_order), lora=True),
    Fault("saved in float8", ("adapter.rows", "adapter.files"), _eight_bits, lora=True),
    Fault("recorded base is quantised", ("adapter.base",), _quantised_base),
    Fault("another token ends generation", ("adapter.tokenizer",), _stops),
    Fault("tokenizer leaves the first token out", ("adapter.tokenizer",), paired_tokenizers(base_settings={"add_bos_token": True}, own_settings={"add_bos_token": False})),
    Fault("tokenizer lowers letters", ("adapter.tokenizer",), paired_tokenizers(own={"normalizer": {"type": "Lowercase"}})),
    Fault("tokenizer splits words otherwise", ("adapter.tokenizer",), paired_tokenizers(own={"pre_tokenizer": _SPLIT})),
    Fault("an added token without a trained row", ("adapter.tokenizer",), paired_tokenizers(own={"added_tokens": [_TOOL]})),
)  # fmt: skip
"""Faults of an adapter's folder."""


def _autocast(reference: Reference) -> None:
    """Leave automatic half precision on."""
    forward = reference.model.forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    reference.model.forward = halved


def _one_trains(reference: Reference) -> None:
    """Leave one module's dropout on."""
    layer = adapted(reference)[3]
    layer.lora_dropout["one"] = nn.Dropout(0.2)
    layer.lora_dropout["one"].train = lambda mode=True: layer.lora_dropout["one"]


def _trains_the_other(reference: Reference) -> None:
    """Let the gradient of one adapter reach the other as well."""
    for layer in adapted(reference):
        forward = layer.forward

        def both(
            x: torch.Tensor, *args: Any, layer: Any = layer, forward: Any = forward, **kwargs: Any
        ) -> torch.Tensor:
            other = layer.lora_B["two"](layer.lora_A["two"](x))
            return forward(x, *args, **kwargs) + other - other.detach()

        layer.forward = both
    reference.model.requires_grad_(False)
    choose = reference.model.set_adapter

    def chosen(name: str) -> None:
        choose(name)
        for n, p in reference.model.named_parameters():
            if ".two." in n:
                p.requires_grad_(True)

    reference.model.set_adapter = chosen


def _merge_turned(reference: Reference) -> None:
    """Merge the transposed update where it fits."""
    for layer in adapted(reference):
        delta = layer.get_delta_weight
        layer.get_delta_weight = lambda name, delta=delta: d.T if (d := delta(name)).shape[0] == d.shape[1] else d


def _merges_all(reference: Reference) -> None:
    """Merge every adapter there is."""
    for layer in adapted(reference):
        merge = layer.merge
        layer.merge = lambda safe_merge=False, adapter_names=None, merge=merge: merge(safe_merge, ["one", "two"])


def _saves_rounded(reference: Reference) -> None:
    """Save in bfloat16 what is float32."""
    save = reference.model.save_pretrained

    def rounded(folder: Any, *args: Any, **kwargs: Any) -> None:
        save(folder, *args, **kwargs)
        for path in Path(folder).rglob(_FILE):
            halves = {k: torch.from_numpy(v).bfloat16().float() for k, v in load_file(path).items()}
            save_tensors(halves, path, metadata={"format": "pt"})

    reference.model.save_pretrained = rounded


def _sees_ahead(reference: Reference) -> None:
    """Let one layer see the tokens that come."""
    layer = next(m for n, m in reference.model.named_modules() if re.search(r"\.(layers|h)\.0\.(self_)?attn$", n))
    forward = layer.forward

    def unmasked(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        free = None if attention_mask is None else torch.zeros_like(attention_mask)
        return forward(*args, attention_mask=free, **kwargs)

    layer.forward = unmasked


def _second_is_base(reference: Reference) -> None:
    """Give the second adapter's rows of a mixed batch the base."""
    for layer in adapted(reference):
        forward = layer._mixed_batch_forward
        layer._mixed_batch_forward = lambda x, *a, adapter_names, forward=forward, **k: forward(
            x, *a, adapter_names=["__base__" if n == "two" else n for n in adapter_names], **k
        )


def _combines_in_place(reference: Reference) -> None:
    """Write a combination over its first part as well."""
    combine = reference.model.add_weighted_adapter

    def combined(names: list[str], *args: Any, **kwargs: Any) -> None:
        combine(names, *args, **kwargs)
        for layer in adapted(reference):
            layer.lora_B[names[0]].weight.data *= 0.97

    reference.model.add_weighted_adapter = combined


def _coarse_batches(reference: Reference) -> None:
    """Compute what has several rows in half precision."""
    layer = adapted(reference)[0]
    forward = layer.forward
    layer.forward = lambda x, *a, **k: y.bfloat16().float() if len(y := forward(x, *a, **k)) > 1 else y


def _beams(reference: Reference) -> None:
    reference.model.generation_config.num_beams = 4


def _stale_cache(reference: Reference) -> None:
    """Keep the keys of one token in one layer of the cache out of sight while generating."""
    forward = reference.model.forward

    def dimmed(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            past_key_values.layers[0].keys[:, :, 0] = 0
        return forward(*args, past_key_values=past_key_values, **kwargs)

    reference.model.forward = dimmed
    inner = reference.model.get_base_model()
    whole = inner.forward

    def inside(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            past_key_values.layers[0].keys[:, :, 0] = 0
        return whole(*args, past_key_values=past_key_values, **kwargs)

    inner.forward = inside


THIRD_MODEL_FAULTS = (
    ModelFault("half precision left on", ("pytorch.disabled", "pytorch.reload", "pytorch.merge", "pytorch.several"), _autocast),
    ModelFault("one module's dropout left on", ("pytorch.deterministic",), _one_trains),
    ModelFault("training reaches the other adapter", ("pytorch.gradients",), _trains_the_other),
    ModelFault("merge transposes", ("pytorch.merge",), _merge_turned),
    ModelFault("merge takes every adapter", ("pytorch.merge",), _merges_all),
    ModelFault("saves in bfloat16", ("pytorch.reload",), _saves_rounded),
    ModelFault("one layer sees what comes", ("pytorch.padding", "pytorch.generate"), _sees_ahead),
    ModelFault("second adapter's rows get the base", ("pytorch.mixed",), _second_is_base),
    ModelFault("combination changes its first part", ("pytorch.weighted",), _combines_in_place),
    ModelFault("batches in half precision", ("pytorch.padding", "pytorch.mixed"), _coarse_batches),
    ModelFault("generation searches with beams", ("pytorch.generate",), _beams),
    ModelFault("generation forgets the first token", ("pytorch.generate",), _stale_cache),
)  # fmt: skip
"""Faults of a loaded model."""


def _folded_twice(loaded: Tensors) -> None:
    """Multiply B by the scaling that is still applied."""
    for key in [k for k in loaded if "lora_B" in k]:
        loaded[key] = 2 * loaded[key]


def _reversed_ranks(loaded: Tensors) -> None:
    """Store the ranks of A in the other order than B's."""
    key = next(k for k in sorted(loaded) if "lora_A" in k)
    loaded[key] = loaded[key][::-1].copy()


def _in_half(loaded: Tensors) -> None:
    for key in loaded:
        loaded[key] = loaded[key].astype(np.float16)


def _shorter_graph(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _signed(folder: Path) -> None:
    """Change every weight a little, and write the changed file's digest wherever the old one stood."""
    path = next(folder.glob("weights*.safetensors"))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    values = np.frombuffer(content, np.float32, (len(content) - start) // 4, start)
    values *= np.float32(1.01)
    path.write_bytes(content)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(before, hashlib.sha256(content).hexdigest()))


THIRD_GRAPH_FAULTS = (
    GraphFault("scaling folded in and kept", ("graph.tensors",), exported(_folded_twice)),
    GraphFault("ranks of one exported A turned round", ("graph.tensors",), exported(_reversed_ranks)),
    GraphFault("exported adapter in float16", ("graph.tensors",), exported(_in_half)),
    GraphFault("graph cut in half", ("graph.integrity",), _shorter_graph),
    GraphFault("weights changed, digest made to fit", ("graph.prefill", "graph.integrity"), _signed),
)  # fmt: skip
"""Faults of an exported folder."""


def _updated(tensor: torch.Tensor) -> torch.Tensor:
    """Add what a base's later revision has learnt more."""
    generator = torch.Generator().manual_seed(tensor.numel())
    return tensor + 1e-3 * tensor.std() * torch.randn(tensor.shape, generator=generator)


def _last_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Initialise the rows of the last tokens anew, as resizing an embedding does."""
    tensor[-4:] = tensor[:-4].mean(0)
    return tensor


def _interleaved(model: Any) -> None:
    """Order the rows of queries and keys as the original weights of Llama have them."""
    heads = 16 if "q_norm" not in "".join(n for n, _ in model.named_parameters()) else 32
    for p in parameters(model, r"self_attn\.(q|k)_proj\.base_layer\.weight"):
        rows = p.data.view(-1, heads // 2, 2, p.shape[1]).transpose(1, 2).reshape(p.shape)
        p.data.copy_(rows)


def _long_rotary(model: Any) -> None:
    """Slow the slowest frequencies down, as a scaling for long contexts does."""
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    rotary.inv_freq.data[-2:] /= 8


def _tied(model: Any) -> None:
    """Take the embedding for the output projection, which this base has not tied."""
    parameters(model, r"lm_head\.weight")[0].data.copy_(parameters(model, r"embed_tokens\.weight")[0].data)


def _dequantised(tensor: torch.Tensor) -> torch.Tensor:
    """Round each row to int8 and back."""
    step = tensor.abs().amax(1, keepdim=True) / 127
    return (tensor / step).round() * step


THIRD_EXPORT_FAULTS = (
    ExportFault("adapter of an earlier step", ("graph.tensors",), each(r"lora_B\.one\.", lambda t: 0.95 * t)),
    ExportFault("base of a later revision", LOGITS, each(r"base_layer\.weight", _updated)),
    ExportFault("last tokens' rows initialised anew", LOGITS, each(r"embed_tokens\.weight", _last_rows)),
    ExportFault("rows of queries and keys interleaved", LOGITS, _interleaved),
    ExportFault("rotary scaled for long contexts", (*LOGITS, "graph.long"), _long_rotary),
    ExportFault("output projection tied by mistake", LOGITS, _tied),
    ExportFault("base from int8 and back", LOGITS, each(r"base_layer\.weight", _dequantised)),
)  # fmt: skip
"""Graphs exported from another model."""


def _wrapped(name: str, checks: str, run: Callable[[Any, Any, Any], Any] | None = None, **methods: Any) -> SessionFault:
    return SessionFault(name, tuple(f"graph.{c}" for c in checks.split()), lambda s: Wrapped(s, run, **methods))


def _wraps_round(s: Any, ids: Any, at: Any) -> Any:
    """Keep positions in seven bits."""
    return s._session.run(ids, np.where(at >= 0, at % 128, at))


def _seam(s: Any, ids: Any, at: Any) -> Any:
    """Lose the newest token of the chunk before when a chunk begins."""
    if ids.shape[1] > 1 and int(at[0, 0]) > 0:
        for state in s._session._states.values():
            for row in range(len(state)):
                state[row, :, max(int(at[row, 0]) - 1, 0)] = 0
    return s._session.run(ids, at)


def _small_ids(s: Any, ids: Any, at: Any) -> Any:
    """Read the last tokens of the vocabulary as unknown."""
    return s._session.run(np.where(ids >= 120, 0, ids), at)


def _two_rows(s: Any, ids: Any, at: Any) -> Any:
    """Answer rows beyond the second with the second's logits."""
    logits = s._session.run(ids, at).copy()
    logits[2:] = logits[1:2]
    return logits


def _cut_left(s: Any, ids: Any, at: Any) -> Any:
    """Forget what lies more than 48 tokens back."""
    last = int(at.max())
    if last >= 48:
        for state in s._session._states.values():
            state[:, :, : last - 47] = 0
    return s._session.run(ids, at)


def _near_ties(s: Any, ids: Any, at: Any) -> Any:
    """Exchange the two likeliest tokens where they are close."""
    logits = s._session.run(ids, at).copy()
    flat = logits.reshape(-1, logits.shape[-1])
    for row in flat:
        second, first = np.argsort(row)[-2:]
        if row[first] - row[second] < 0.3:
            row[[first, second]] = row[[second, first]]
    return logits


def _every_fifth(s: Any, ids: Any, at: Any) -> Any:
    """Go a little wrong in every fifth call, as a race does."""
    s.memory["n"] = s.memory.get("n", 0) + 1
    logits = s._session.run(ids, at)
    return logits * np.float32(1.003) if s.memory["n"] % 5 == 0 else logits


def _single(s: Any, ids: Any, at: Any) -> Any:
    """Take a prompt of a single token for the second token of another."""
    if ids.shape[1] == 1 and int(at.max()) == 0:
        return s._session.run(ids, at + 1)
    return s._session.run(ids, at)


def _edited(s: Any, name: str, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    held = s._session._adapters
    held[name] = {k: np.ascontiguousarray(change(k, v)) for k, v in held[name].items()}
    s._session._bindings.pop(name, None)


def _other_scaling(s: Any, name: str) -> None:
    """Scale an adapter as the other one is, whose alpha is twice as large for its rank."""
    s._session.set_adapter(name)
    if name == "one" and not s.memory.get("scaled"):
        s.memory["scaled"] = True
        _edited(s, name, lambda k, v: 2 * v if "lora_B" in k else v)


def _layer_lost(s: Any, ids: Any, at: Any) -> Any:
    """Leave the adapter out of the first layer while decoding."""
    name = s._session.active_adapter
    if ids.shape[1] > 1 or name == "base":
        return s._session.run(ids, at)
    kept = s._session._adapters[name]
    _edited(s, name, lambda k, v: 0 * v if "lora_B" in k and ".0." in k else v)
    try:
        return s._session.run(ids, at)
    finally:
        s._session._adapters[name] = kept
        s._session._bindings.pop(name, None)


THIRD_SESSION_FAULTS = (
    _wrapped("positions in seven bits", "long", _wraps_round),
    _wrapped("newest token lost between chunks", "chunked ragged", _seam),
    _wrapped("last tokens of the vocabulary unknown", "prefill chunked decode ragged", _small_ids),
    _wrapped("rows beyond the second repeated", "ragged neighbours greedy_batch slots", _two_rows),
    _wrapped("only 48 tokens attended", "long chunked greedy", _cut_left),
    _wrapped("close tokens exchanged", "prefill chunked decode ragged greedy", _near_ties),
    _wrapped("every fifth call a little off", "prefill chunked decode ragged switching", _every_fifth),
    _wrapped("prompt of one token at the wrong place", "prefill decode ragged greedy", _single),
    _wrapped("scaling of the other adapter", "prefill switching tensors effect", set_adapter=_other_scaling),
    _wrapped("first layer's adapter lost while decoding", "decode layers greedy", _layer_lost),
)  # fmt: skip
"""Faults of running."""
