# SPDX-License-Identifier: BSD-3-Clause
"""What ``generate`` can do: the rows of the table in docs/generation.md, each with arguments that try it."""

from dataclasses import dataclass, field
from typing import Any

EOS = [5, 6, 7]
SAMPLE = {"do_sample": True}
REMOTE = "requires `trust_remote_code=True`"  # moved out of transformers, to code on the Hub


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    Attributes:
        name: What it is.
        arguments: Arguments of ``generate`` that use it; their names are the row's second column.
        rows: Prompts in the batch.
        refused: What the error says, if a session cannot do it; empty: same tokens as PyTorch.
        all_logits: Needs a graph that was exported with ``logits="all"``.
        neutral: Arguments that must give other tokens than these do, or the test would show nothing; ``None``: not asked.
    """

    name: str
    arguments: dict[str, Any]
    rows: int = 2
    refused: str = ""
    all_logits: bool = False
    neutral: dict[str, Any] | None = field(default_factory=lambda: {"do_sample": False})


FEATURES = [
    Feature("greedy", {"do_sample": False}, neutral=None),
    Feature("sampling", {**SAMPLE, "temperature": 1.7}),
    Feature("top k", {**SAMPLE, "top_k": 3}, neutral=SAMPLE),
    Feature("top p", {**SAMPLE, "top_p": 0.3}, neutral=SAMPLE),
    Feature("min p", {**SAMPLE, "min_p": 0.5}, neutral=SAMPLE),
    Feature("top H", {**SAMPLE, "top_h": 0.3}, neutral=SAMPLE),
    Feature("locally typical", {**SAMPLE, "typical_p": 0.2}, neutral=SAMPLE),
    Feature("epsilon cutoff", {**SAMPLE, "epsilon_cutoff": 0.05}, neutral=SAMPLE),
    Feature("eta cutoff", {**SAMPLE, "eta_cutoff": 0.5}, neutral=SAMPLE),
    Feature("several results", {**SAMPLE, "num_return_sequences": 3}, neutral=None),
    Feature("repetition penalty", {"repetition_penalty": 3.0}),
    Feature("repetition penalty, encoder's", {"encoder_repetition_penalty": 3.0}, neutral=None),
    Feature("n-grams once", {"no_repeat_ngram_size": 1}),
    Feature("n-grams once, encoder's", {"encoder_no_repeat_ngram_size": 1}, neutral=None),
    Feature("words to avoid", {"bad_words_ids": [[i] for i in range(40, 97)]}),
    Feature("bias", {"sequence_bias": [[[11], 30.0]]}),
    Feature(
        "least length", {"min_length": 14, "eos_token_id": list(range(60))}, neutral={"eos_token_id": list(range(60))}
    ),
    Feature(
        "least new tokens",
        {"min_new_tokens": 9, "eos_token_id": list(range(60))},
        neutral={"eos_token_id": list(range(60))},
    ),
    Feature("end more likely with length", {"exponential_decay_length_penalty": (3, 5.0)}),
    Feature("first token", {"forced_bos_token_id": 9}, rows=1, neutral=None),
    Feature("last token", {"forced_eos_token_id": 7}),
    Feature("tokens never", {"suppress_tokens": list(range(40, 97))}),
    Feature("tokens not first", {"begin_suppress_tokens": list(range(40, 97))}),
    Feature("no NaN", {"remove_invalid_values": True}, neutral=None),
    Feature("scores normalised anew", {**SAMPLE, "top_k": 5, "renormalize_logits": True}, neutral=None),
    Feature(
        "watermark", {**SAMPLE, "watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash"}}, neutral=SAMPLE
    ),
    Feature("allowed tokens by a function", {"prefix_allowed_tokens_fn": lambda row, ids: list(range(8, 30))}),
    Feature(
        "beam search",
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
        neutral=None,
    ),
    Feature("beam sampling", {**SAMPLE, "num_beams": 3}, neutral=None),
    Feature(
        "prompt lookup",
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        rows=1,
        all_logits=True,
        neutral=None,
    ),
    Feature("prompt lookup, sampled", {**SAMPLE, "prompt_lookup_num_tokens": 3}, rows=1, all_logits=True, neutral=None),
    Feature("time limit", {"max_time": 1000.0}, neutral=None),
    Feature("prefill in chunks", {"prefill_chunk_size": 3}, neutral=None),
    Feature("no cache", {"use_cache": False}, neutral=None),
    Feature("classifier-free guidance", {"guidance_scale": 1.5}, refused="guidance_scale 1.5 is not supported"),
    Feature("contrastive search", {"penalty_alpha": 0.6, "top_k": 4}, refused=REMOTE),
    Feature("diverse beams", {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, refused=REMOTE),
    Feature("constrained beams", {"num_beams": 2, "force_words_ids": [[9]]}, refused=REMOTE),
    Feature("DoLa", {"dola_layers": "high"}, refused=REMOTE),
    Feature(
        "early exit",
        {"assistant_early_exit": 1, "prompt_lookup_num_tokens": 2},
        rows=1,
        all_logits=True,
        refused="assistant_early_exit is not supported",
    ),
    Feature("hidden states", {"output_hidden_states": True}, refused="output_hidden_states is not available"),
    Feature("attentions", {"output_attentions": True}, refused="output_attentions is not available"),
]

ELSEWHERE = {
    "stop strings": ("stop_strings", "test_stop_strings"),
    "end of sequence": ("eos_token_id", "test_end_of_sequence"),
    "streamer": ("streamer", "test_streamer_and_stopping_criteria"),
    "stopping criteria": ("stopping_criteria", "test_streamer_and_stopping_criteria"),
    "scores and logits": ("return_dict_in_generate, output_scores, output_logits", "test_scores_and_logits"),
    "a generation config": ("generation_config", "test_same_tokens_as_pytorch"),
    "logits processors of one's own": ("logits_processor", "test_logits_processor_of_ones_own"),
    "an assistant in PyTorch": ("assistant_model", "test_assistant"),
}
"""Rows whose test is a function of its own: name, arguments, test."""

NOT_ABOUT_TOKENS = {
    "_from_model_config", "bos_token_id", "decoder_start_token_id", "pad_token_id", "max_new_tokens", "max_length",
    "transformers_version", "cache_config", "cache_implementation", "compile_config", "disable_compile", "max_cache_len",
    "continuous_batching_config", "is_assistant", "low_memory", "constraints", "token_healing",
    "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type", "use_mtp",
}  # fmt: skip
"""Fields of ``GenerationConfig`` that have no row: token ids and lengths every call has, tuning of rows above, other machines."""


def table() -> list[str]:
    """Return the rows of the table in docs/generation.md."""
    made = []
    for f in FEATURES:
        said = f"refused: {f.refused}" if f.refused else "as PyTorch"
        said += ', takes `logits="all"`' if f.all_logits and not f.refused else ""
        names = ", ".join(f"`{n}`" for n in f.arguments if n != "do_sample" or len(f.arguments) == 1)
        made.append(f"| {f.name} | {names} | {said} |")
    for name, (arguments, test) in ELSEWHERE.items():
        said = 'as PyTorch, takes `logits="all"`' if test == "test_assistant" else "as PyTorch"
        made.append(f"| {name} | {', '.join(f'`{a}`' for a in arguments.split(', '))} | {said} |")
    return made
