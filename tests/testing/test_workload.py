# SPDX-License-Identifier: BSD-3-Clause
"""What every stage is asked about."""

import numpy as np

from QEfficient.testing.workload import make_workload


def test_rows_leave_a_token_out() -> None:
    """Every other token of a small vocabulary is drawn, the one that is left out never; nor is a tokenizer's."""
    drawn = set(np.concatenate(make_workload(8, left_out=3).rows).tolist())
    assert drawn == {0, 1, 2, 4, 5, 6, 7}
    assert set(np.concatenate(make_workload(8).rows).tolist()) == set(range(8))
    encoded = make_workload(8, encode=lambda text: [3, 5, 3, 6, 9], left_out=3).rows
    assert set(np.concatenate(encoded).tolist()) == {5, 6}
