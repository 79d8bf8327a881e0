# SPDX-License-Identifier: BSD-3-Clause
"""Ratios of times that were taken in turns, with the interval that their scatter leaves."""

import math
from collections.abc import Sequence

import numpy as np

_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % quantile of Student's t for 1, 2, … degrees of freedom; beyond the table 2.2 stays on the safe side."""


def interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of paired times, and the ends of its 95 % interval.

    What else the machine does hits both halves of a pair, so the ratio of each pair is taken first; the mean is that of
    their logarithms. Pairs are taken as independent.

    Args:
        above: Times in the numerator, one of each turn.
        below: Times in the denominator.
    """
    logs = np.log(np.asarray(above, dtype=np.float64) / np.asarray(below, dtype=np.float64))
    middle, count = float(logs.mean()), len(logs)
    if count < 2:
        return math.exp(middle), 0.0, math.inf
    student = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else 2.2
    half = student * float(logs.std(ddof=1)) / math.sqrt(count)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)
