# SPDX-License-Identifier: BSD-3-Clause
"""What a command shows while it works: on a terminal, a line on standard error that says what is being done."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator

Progress = Callable[[str, str], None]
"""Takes what is being done, and to what."""


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Yield a function that shows what is being done; on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda what, subject: shown.update(task, description=f"{what} [bold]{subject}[/bold]")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and warnings out of what a command says."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
