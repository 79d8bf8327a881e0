# SPDX-License-Identifier: BSD-3-Clause
"""Graph → program for one target."""
