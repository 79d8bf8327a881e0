# SPDX-License-Identifier: BSD-3-Clause
"""Many adapters of one base behind OpenAI's HTTP API."""
