# SPDX-License-Identifier: BSD-3-Clause
"""Operators of our own for ONNX Runtime: C++ that is compiled for this machine's CPU when it is first needed."""
