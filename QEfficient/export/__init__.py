# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch → ONNX: the graph, its passes, its manifest."""
