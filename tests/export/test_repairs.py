# SPDX-License-Identifier: BSD-3-Clause
"""Operations that ONNX lacks, against PyTorch's own."""

import torch

from QEfficient.export.positions import PastLength, RowPositions
from QEfficient.export.repairs import Repairs

POSITIONS = torch.tensor([[4, 5, 6], [0, 1, 2]])


def test_inverse_error_function() -> None:
    """Near zero and near its poles it is PyTorch's to float32, and it is ours that is called."""
    x = torch.cat([torch.linspace(-0.9999, 0.9999, 801), torch.tensor([1e-6, -1e-6, 0.95, 1 - 1e-6])])
    with Repairs():
        ours = torch.special.erfinv(x)
    assert torch.allclose(ours, torch.erfinv(x), rtol=2e-6, atol=1e-7)
    assert not torch.equal(ours, torch.erfinv(x))


def test_repeated_positions_stay_one_a_row() -> None:
    """A model that repeats its positions for each row of the batch gets each row's own, not rows times rows."""
    with RowPositions(POSITIONS):
        seen = torch.arange(PastLength(0), 3).unsqueeze(0).repeat(2, 1) + 0
    assert seen.tolist() == [[4, 5, 6], [0, 1, 2]]


def test_what_is_computed_from_positions_is_each_row_own() -> None:
    """A scale that grows with the position is computed from each row's own positions, not shifted afterwards."""
    with RowPositions(POSITIONS):
        scale = torch.log1p((torch.arange(3) + PastLength(0)).float() * 2).view(1, 3, 1, 1) + 0
    want = torch.log1p(torch.tensor([[4.0, 5, 6], [0, 1, 2]]) * 2)
    assert torch.allclose(scale[..., 0, 0], want)


def test_a_looked_up_table_gets_its_batch() -> None:
    """Rows of a table that a model gives dimensions in front are those of each row of the batch."""
    table = torch.arange(20.0).reshape(10, 2)
    with RowPositions(POSITIONS):
        seen = torch.nn.functional.embedding(torch.arange(PastLength(0), 3), table)[None, None, :, :]
    assert seen.shape == (2, 1, 3, 2)
    assert seen[:, 0, :, 0].tolist() == [[8.0, 10.0, 12.0], [0.0, 2.0, 4.0]]
