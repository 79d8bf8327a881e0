"""Commands in processes of their own, which start at once because their libraries are loaded already."""

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.finetune.preload"])


class Command:
    """A running ``qefficient finetune``.

    Args:
        options: Of the command.
        output: File of what it prints.
        environment: Variables to set.
        waits_at: Step behind which it waits for a signal, so that no machine is too slow to send one before the end.
    """

    def __init__(
        self, options: dict[str, Any], output: Path, environment: dict[str, str] | None = None, waits_at: int = 0
    ) -> None:
        self.output = output
        arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        self._process = CONTEXT.Process(target=_run, args=(arguments, str(output), environment or {}, waits_at))
        self._process.start()

    def printed(self) -> str:
        """Return what was printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def runs(self) -> bool:
        """Tell whether it has not ended yet."""
        return self._process.is_alive()

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid or 0, number)

    def wait(self, seconds: float = 600) -> int:
        """Return its exit code; what a signal ended has a negative one."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(self.printed())
        return self._process.exitcode


def _run(arguments: list[str], output: str, environment: dict[str, str], waits_at: int) -> None:
    with open(output, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        import torch

        from QEfficient.cloud.finetune import command

        torch.set_num_threads(1)
        if waits_at:
            _wait_at(waits_at)
        code = command(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _wait_at(step: int) -> None:
    """Let trainings of this process wait behind a step until they have heard a signal."""
    from QEfficient.finetune.progress import StopCallback
    from QEfficient.finetune.trainer import AdapterTrainer

    log = AdapterTrainer.log

    def log_and_wait(trainer: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        log(trainer, logs, start_time)
        stop = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopCallback))
        while trainer.state.global_step == step and not stop._heard:
            time.sleep(0.01)

    AdapterTrainer.log = log_and_wait  # type: ignore[method-assign]
