# SPDX-License-Identifier: BSD-3-Clause
"""Does it agree with PyTorch, how fast is it, and the report that says so."""
