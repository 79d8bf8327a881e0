# SPDX-License-Identifier: BSD-3-Clause
"""Running a graph or program: sessions, and the bridge to transformers' generate."""
