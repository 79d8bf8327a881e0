"""Commands in processes of their own, which start at once because their libraries are loaded already."""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.finetune.preload"])


class Command:
    """A running ``qefficient finetune``.

    Attributes:
        output: File of what it prints.
    """

    def __init__(self, options: dict[str, Any], output: Path, environment: dict[str, str] | None = None) -> None:
        self.output = output
        arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        self._process = CONTEXT.Process(target=_run, args=(arguments, str(output), environment or {}))
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

    def wait(self, seconds: float = 120) -> int:
        """Return its exit code; what a signal ended has a negative one."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(self.printed())
        return self._process.exitcode


def _run(arguments: list[str], output: str, environment: dict[str, str]) -> None:
    with open(output, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        import torch

        from QEfficient.cloud.finetune import command

        torch.set_num_threads(1)
        code = command(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
