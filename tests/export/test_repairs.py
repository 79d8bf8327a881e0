# SPDX-License-Identifier: BSD-3-Clause
"""Operations that ONNX lacks, against PyTorch's own."""

import torch

from QEfficient.export.positions import PastLength, RowPositions
from QEfficient.export.repairs import Repairs


def test_inverse_error_function() -> None:
    """Near zero and near its poles it is PyTorch's to float32, and it is ours that is called."""
    x = torch.cat([torch.linspace(-0.9999, 0.9999, 801), torch.tensor([1e-6, -1e-6, 0.95, 1 - 1e-6])])
    with Repairs():
        ours = torch.special.erfinv(x)
    assert torch.allclose(ours, torch.erfinv(x), rtol=2e-6, atol=1e-7)
    assert not torch.equal(ours, torch.erfinv(x))


def test_repeated_positions_stay_one_a_row() -> None:
    """A model that repeats its positions for each row of the batch gets each row's own, not rows times rows."""
    with RowPositions(torch.tensor([4, 0])):
        seen = torch.arange(PastLength(0), 3).unsqueeze(0).repeat(2, 1) + 0
    assert seen.tolist() == [[4, 5, 6], [0, 1, 2]]
