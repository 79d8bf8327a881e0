# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tuning: typed configuration, data, training. Hands over by saving a PEFT adapter folder."""
