# SPDX-License-Identifier: BSD-3-Clause
"""What is seen of a training while it runs, and how it is asked to stop."""

import signal
import time
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from QEfficient.finetune.allocator import peak_memory_bytes

_LINES = 10
"""How often the loss is shown without a terminal."""


class ProgressCallback(TrainerCallback):
    """Shows loss and speed: as a bar on a terminal, as some lines elsewhere.

    Attributes:
        title: What is being trained.
        console: Where to show it.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._text = ""
        self._losses: list[float] = []
        self._start, self._first, self._tokens = 0.0, 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw an empty bar, or say what begins."""
        self._start, self._first, self._tokens = time.perf_counter(), state.global_step, state.num_input_tokens_seen
        if not state.is_world_process_zero:
            self.console = Console(quiet=True)
        if not self.console.is_terminal:
            begun = f", {state.global_step} of them done" if state.global_step else ""
            self._line(f"{self.title}: {state.max_steps} steps{begun}")
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(
            *columns,
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(self.title, total=state.max_steps, completed=state.global_step, text="")
        self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show loss, learning rate, speed and the most memory so far; without a terminal, in a line of its own."""
        if logs and "eval_loss" in logs:
            self._line(f"{self.title}: {state.global_step}/{state.max_steps}  validation {logs['eval_loss']:.3f}")
        if not logs or "loss" not in logs:
            return
        self._losses.append(float(logs["loss"]))
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        tokens = (state.num_input_tokens_seen - self._tokens) / elapsed
        speed = f"  {tokens:,.0f} tokens/s" if tokens else ""
        speed += f"  {peak_memory_bytes() / 2**30:.1f} GiB"
        self._text = f"loss {self._losses[-1]:.3f}  lr {logs.get('learning_rate', 0):.1e}{speed}"
        if self._bar is None and state.global_step % max(1, state.max_steps // _LINES) == 0:
            mean = sum(self._losses) / len(self._losses)
            self._losses.clear()
            done = max(state.global_step - self._first, 1)
            left = elapsed / done * (state.max_steps - state.global_step)
            text = f"loss {mean:.3f}{speed}  {elapsed:.0f} s, {left:.0f} s left"
            self._line(f"{self.title}: {state.global_step}/{state.max_steps}  {text}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar:
            self._bar.update(self._task, completed=state.global_step, text=self._text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar."""
        if self._bar:
            self._bar.update(self._task, text=self._text)
            self._bar.stop()

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


class StopCallback(TrainerCallback):
    """Turns Ctrl-C and SIGTERM into a checkpoint after the current step; a second one interrupts at once.

    Attributes:
        stopped: The signal that ended the training, or 0.
    """

    def __init__(self) -> None:
        self.stopped = 0
        self._heard = 0  # by this process; the others may not know yet
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over; only the main thread may."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._asked)
            except ValueError:  # another thread
                return

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint; processes agree, because the signal may reach them in different steps."""
        self.stopped = self._heard
        if args.world_size > 1:
            asked = torch.tensor([self._heard], device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.stopped = int(asked.item())
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop only now: a checkpoint must not say that the training has ended."""
        if self.stopped:
            control.should_training_stop = True

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._heard:
            raise KeyboardInterrupt
        self._heard = number
