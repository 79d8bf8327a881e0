# SPDX-License-Identifier: BSD-3-Clause
"""llama.cpp as a subject of ``decode.py``: the base in GGUF, quantised by llama.cpp itself, with its own LoRA.

Needs the packages ``llama-cpp-python`` and ``gguf``. Both files are written from the checkpoint here, for Qwen2's names only.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TYPES = {"Q4_0": 2, "Q8_0": 7}
"""File types of ``llama_model_quantize``."""


def write_base(base: Path, out: Path) -> None:
    """Write the checkpoint ``base``, a Qwen2, as float32 GGUF with a vocabulary of placeholders."""
    import gguf  # type: ignore[import-not-found]

    config = json.loads((base / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in load_file(base / "model.safetensors").items():
        if name != "lm_head.weight":
            writer.add_tensor(_gguf_name(name.removeprefix("model.")), tensor.astype(np.float32))
    _finish(writer)


def write_adapter(adapter: Path, out: Path, *, alpha: float) -> None:
    """Write a LoRA in PEFT's files as GGUF."""
    import gguf

    writer = gguf.GGUFWriter(out, "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, letter = name.removeprefix("base_model.model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        writer.add_tensor(f"{_gguf_name(module + '.weight')}.lora_{letter.lower()}", tensor.astype(np.float32))
    _finish(writer)


class LlamaCpp:
    """llama.cpp with its LoRA, through its C interface."""

    def __init__(self, folder: Path, precision: str, *, context: int, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.name = f"llama.cpp {precision}, LoRA"
        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        path, adapter = folder / f"base-{precision}.gguf", folder / "adapter.gguf"
        if not path.is_file():
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype = _TYPES[precision]
            if llama_cpp.llama_model_quantize(
                str(folder / "base.gguf").encode(), str(path).encode(), ctypes.byref(settings)
            ):
                raise RuntimeError(f"llama.cpp cannot quantise to {path}")
        self.bytes_per_token = path.stat().st_size + adapter.stat().st_size
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        lora = llama_cpp.llama_adapter_lora_init(self.model, str(adapter).encode())
        if not (self.model and self.context and lora):
            raise RuntimeError(f"llama.cpp cannot load {path} with {adapter}")
        self._activate(lora)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def prefill(self, ids: np.ndarray) -> int:
        """See ``Subject`` in ``decode.py``."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self._decode(ids[0].tolist())

    def step(self, token: int, position: int) -> int:
        """See ``Subject`` in ``decode.py``."""
        return self._decode([token])

    def _activate(self, lora: Any) -> None:
        adapters = (type(lora) * 1)(lora) if not isinstance(lora, int) else (ctypes.c_void_p * 1)(lora)
        scales = (ctypes.c_float * 1)(1.0)
        if hasattr(self.api, "llama_set_adapters_lora"):
            failed = self.api.llama_set_adapters_lora(self.context, adapters, 1, scales)
        else:
            failed = self.api.llama_set_adapter_lora(self.context, lora, 1.0)
        if failed:
            raise RuntimeError("llama.cpp does not take the adapter")

    def _decode(self, tokens: list[int]) -> int:
        array = (self.api.llama_token * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), shape=(self.vocab,))
        return int(logits.argmax())


def _gguf_name(name: str) -> str:
    if name == "embed_tokens.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_NAMES[module]}.{kind}"


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
