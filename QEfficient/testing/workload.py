# SPDX-License-Identifier: BSD-3-Clause
"""The tokens that every stage is asked about: rows of different lengths, the same in each run.

Knows no model. The text is ordinary prose, code and numbers, so that a trained base sees what it was trained for; a base
without tokenizer gets seeded random tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from QEfficient.errors import UnsupportedError

Tokens = npt.NDArray[np.int64]

_TEXTS = (
    "The river had risen in the night, and by morning the lower meadow was a lake with two gates standing in it. The farmer "
    "counted his sheep on the hill, found that none were missing, and went back to the house to tell his daughter. ",
    "def average(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n"
    "\nprint(average([3, 5, 8, 13]))\n# The list is never empty, because the caller checks it first.\n",
    "Order 4417: 12 boxes at 3.50 each, 4 crates at 27.00 each, delivery 8.90, paid on the 3rd of March. The next order was "
    "written down by hand: 7 boxes, 1 crate, no delivery, to be collected on Friday after four. ",
    "Question: why does bread rise? Answer: yeast eats the sugar in the dough and gives off gas, which the gluten holds. "
    "Question: why does it stop? Answer: the oven kills the yeast, and the crust sets around what is there. ",
)
_PROMPT_LENGTHS = (48, 7, 29, 16)
_CHUNK = 16
_DECODE = 8
_GREEDY = 64
_GREEDY_LARGE = 32
_LARGE = 300_000_000
_SEED = 20


@dataclass(frozen=True, slots=True)
class Workload:
    """What is run through every engine.

    Attributes:
        rows: Token ids of each row: its prompt, then the tokens that decoding is forced to take.
        prompt_lengths: How many of a row's tokens are its prompt.
        chunk: Tokens of each call of a chunked prefill.
        greedy_tokens: How many tokens are generated.
    """

    rows: tuple[Tokens, ...]
    prompt_lengths: tuple[int, ...]
    chunk: int
    greedy_tokens: int

    @property
    def prompts(self) -> list[Tokens]:
        """The prompt of each row."""
        return [row[:n] for row, n in zip(self.rows, self.prompt_lengths, strict=True)]

    @property
    def decode_steps(self) -> int:
        """Forced tokens of each row."""
        return len(self.rows[0]) - self.prompt_lengths[0]

    @property
    def ctx_len(self) -> int:
        """Cache positions that the longest row needs, with room for the padding of a chunk."""
        return max(self.prompt_lengths) + max(self.greedy_tokens, self.decode_steps) + self.chunk


def default_tokens(parameters: int) -> int:
    """Return how many tokens are generated if nobody says: fewer for a large base, whose every token takes long."""
    return _GREEDY if parameters < _LARGE else _GREEDY_LARGE


def make_workload(
    vocab_size: int,
    max_positions: int = 0,
    encode: Callable[[str], list[int]] | None = None,
    greedy_tokens: int = _GREEDY,
    must_hold: Sequence[int] = (),
    left_out: int | None = None,
) -> Workload:
    """Return the workload of a base.

    Args:
        vocab_size: Token ids stay below it.
        max_positions: Longest context of the base; 0 if it has none.
        encode: The base's tokenizer; None for random tokens.
        greedy_tokens: How many tokens to generate; fewer if the context is shorter.
        must_hold: Tokens that the first and the shortest row hold, up to a third of each.
        left_out: Token that no row holds: some models give padding no number of its own.

    Raises:
        UnsupportedError: The base's context is too short to ask anything.
    """
    room = max_positions or 1 << 30
    if room < 16:
        raise UnsupportedError(f"the base allows only {max_positions} positions; a test needs 16 or more.")
    scale = min(1.0, room / (max(_PROMPT_LENGTHS) + _GREEDY + _CHUNK))
    chunk = max(2, int(_CHUNK * scale))
    lengths = tuple(max(2, int(n * scale)) for n in _PROMPT_LENGTHS)
    decode = max(2, int(_DECODE * scale))
    greedy = min(greedy_tokens, room - max(lengths) - chunk)
    rows = tuple(_tokens(i, n + decode, vocab_size, encode, left_out) for i, n in enumerate(lengths))
    for row in (rows[0], min(rows, key=len)):
        held = [t for t in must_hold if 0 <= t < vocab_size][: len(row) // 3]
        row[1 : 1 + 3 * len(held) : 3] = held
    return Workload(rows, lengths, chunk, greedy)


def _tokens(
    row: int, length: int, vocab_size: int, encode: Callable[[str], list[int]] | None, left_out: int | None
) -> Tokens:
    """Return ``length`` token ids of one row."""
    ids: list[int] = []
    if encode is not None:
        ids = [i for i in encode(_TEXTS[row % len(_TEXTS)]) if 0 <= i < vocab_size and i != left_out]
    if not ids:
        drawn = np.random.default_rng(_SEED + row).integers(0, vocab_size - (left_out is not None), length)
        return drawn if left_out is None else drawn + (drawn >= left_out)
    return np.resize(np.asarray(ids, dtype=np.int64), length)
