# SPDX-License-Identifier: BSD-3-Clause
"""FSDP2 through accelerate, on CPUs too, and the proof that parameters are sharded. Knows no data."""

from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from QEfficient.errors import UnsupportedError


def choose_fsdp(accelerator: Accelerator, plugin: dict[str, Any]) -> None:
    """Make ``accelerator`` run the FSDP that was asked for, before it prepares a model.

    accelerate 1.15 knows FSDP for GPUs only: among processes on CPUs it forgets the plugin and runs DDP, without a word.
    What it does with the plugin (``fully_shard`` on each decoder layer) works with gloo, so it is only told to.

    Args:
        accelerator: Changed in place, and with it the state that all accelerators of this process share.
        plugin: Arguments of ``FullyShardedDataParallelPlugin``.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP


class ShardedCallback(TrainerCallback):
    """Makes sure that FSDP is what runs: losses alone would look the same without it.

    Attributes:
        local: How many parameters this process holds between two steps.
    """

    def __init__(self) -> None:
        self.local = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look for parameters that are whole.

        Raises:
            UnsupportedError: Some are whole on each process.
        """
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            raise UnsupportedError(
                f"fsdp was asked for, but {len(whole)} parameters of {type(model).__name__} are not sharded: {whole[0]}"
            )
        self.local = sum(p.to_local().numel() for p in model.parameters())
