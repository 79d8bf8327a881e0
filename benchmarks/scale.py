# SPDX-License-Identifier: BSD-3-Clause
"""How decode speed depends on the context's length and on the number of rows.

The graph and the adapter of benchmarks/decode.py are used. One cache of the longest context serves all lengths; a token at position
n reads n entries of it, whatever they are, so no prompt is computed first. Lengths take turns, A B C A B C, and so do numbers of
rows. Beside each time stands what it would be if it grew as the bytes that a token reads. The last line is JSON.

    python benchmarks/scale.py --work DIR
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from safetensors.numpy import load_file as read_safetensors
from switch import open_session

from QEfficient.contract import MODEL_FILE
from QEfficient.options import option, parse
from QEfficient.runtime import laid_out
from QEfficient.runtime.session import OrtSession


@dataclass(slots=True, kw_only=True)
class Options:
    """Measure decoding at several lengths of context and with several rows."""

    work: Path = option(help="Folder that benchmarks/decode.py has filled.")
    precision: str = option("int4", "Precision of the program.")
    context: list[int] = option([128, 512, 1024, 2048, 4096], "Lengths of context. Repeatable.")
    rows: list[int] = option([1, 2, 4, 8], "Numbers of rows, at the first length. Repeatable.")
    tokens: int = option(16, "Tokens of each subject in a turn.")
    turns: int = option(5, "Turns; figures are medians over them.")
    threads: int = option(2, "Threads.")


def bytes_of_token(session: OrtSession, rows: int, context: int) -> int:
    """Return what one step reads: weights, adapter, and each row's filled part of the cache."""
    sizes = session.memory_bytes()
    adapter = sum(t.nbytes for t in session.placed_adapter(session.active_adapter).values())
    position = sizes["cache"] // (session.batch_size * session.ctx_len)
    return int(sizes["weights"] - session.manifest.files[MODEL_FILE]["bytes"] + adapter + position * rows * context)


def step_seconds(session: OrtSession, context: int, tokens: int) -> float:
    """Return the median time of a step whose last token makes the context ``context`` long."""
    ids = np.full((session.batch_size, 1), 5)
    times = []
    for position in range(context - tokens, context):
        start = time.perf_counter()
        session.run(ids, np.full_like(ids, position))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def rows_of(options: Options, times: np.ndarray, names: list[dict[str, int]], read: list[int]) -> list[dict[str, Any]]:
    """Return one row of the table for each subject: the first one is what the others are compared with."""
    made = []
    for i, name in enumerate(names):
        ratio = float(np.median(times[:, 0] / times[:, i]))
        made.append(
            {
                **name,
                "step_ms": round(float(np.median(times[:, i])) * 1e3, 2),
                "tokens_per_second": round(name["rows"] / float(np.median(times[:, i])), 1),
                "speed_x_first": round(ratio, 3),
                "if_as_bytes": round(read[0] / read[i], 3),
                "megabytes": round(read[i] / 1e6),
            }
        )
    return made


def main() -> None:
    """Run the benchmark."""
    options = parse(Options, sys.argv[1:], prog="benchmarks/scale.py")
    session, source = open_session(options.work, options.precision, options.threads)
    laid_out.load_file(session, "lora", source, lambda: read_safetensors(source))
    session.set_adapter("lora")
    session.allocate(1, max(options.context))
    read = [bytes_of_token(session, 1, n) for n in options.context]
    turns = [[step_seconds(session, n, options.tokens) for n in options.context] for _ in range(options.turns + 1)]
    names = [{"rows": 1, "context": n} for n in options.context]
    by_context = rows_of(options, np.array(turns[1:]), names, read)
    turns, first = [], options.context[0]
    for _ in range(options.turns + 1):
        turns.append([])
        for rows in options.rows:
            session.allocate(rows, first)
            step_seconds(session, first, 2)
            turns[-1].append(step_seconds(session, first, options.tokens))
    read = [bytes_of_token(session, n, first) for n in options.rows]
    by_rows = rows_of(options, np.array(turns[1:]), [{"rows": n, "context": first} for n in options.rows], read)
    for row in (*by_context, *by_rows):
        print(row)
    print(json.dumps({"context": by_context, "rows": by_rows, **machine(options)}))


if __name__ == "__main__":
    main()
