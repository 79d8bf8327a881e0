"""What the server of test processes imports once."""

import peft
import torch
import transformers

import QEfficient.finetune.train

__all__ = ["QEfficient", "peft", "torch", "transformers"]
