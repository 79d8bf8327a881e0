# SPDX-License-Identifier: BSD-3-Clause
"""Adapters that hold several tasks: which one is meant.

PEFT asks for ``task_ids`` at every call. Here a task is chosen once for each adapter; a model then needs no argument.
"""

from typing import Any

import torch
from peft import PeftModel

from QEfficient.errors import AdapterNotFoundError, ConfigError
from QEfficient.export.lift import TASKS, task_of, tasks_of

__all__ = ["choose_task", "task_of", "tasks_of"]


def choose_task(model: PeftModel, name: str, task: int) -> None:
    """Choose the task of adapter ``name``; from then on ``model`` takes it where a caller gives no ``task_ids``.

    Raises:
        AdapterNotFoundError: There is no adapter of that name.
        ConfigError: It has no such task.
    """
    if name not in model.peft_config:
        raise AdapterNotFoundError(f"no adapter {name!r}; there are: {', '.join(model.peft_config) or 'none'}")
    count = tasks_of(model.peft_config[name])
    if not 0 <= task < max(count, 1):
        raise ConfigError(f"adapter {name!r} has {max(count, 1)} task(s), numbered from 0; there is no task {task}")
    if not hasattr(model, TASKS):
        setattr(model, TASKS, {})
        model.register_forward_pre_hook(_give_task, with_kwargs=True)
    getattr(model, TASKS)[name] = task


def _give_task(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = model.active_adapter
    configs: Any = model.peft_config
    if not isinstance(name, str) or not tasks_of(configs[name]) or kwargs.get("task_ids") is not None:
        return None
    given = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
    return args, kwargs | {"task_ids": torch.full((given.shape[0],), task_of(model, name))}
