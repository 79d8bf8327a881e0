# SPDX-License-Identifier: BSD-3-Clause
"""One JSON object for each line of the log. Prompts and answers are only in it where the operator asked for that."""

import json
import logging
import sys
import time
import warnings
from typing import Any

LOGGER = logging.getLogger("qefficient.serve")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        entry["event"] = record.getMessage()
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def log(event: str, *, level: int = logging.INFO, exception: BaseException | None = None, **fields: Any) -> None:
    """Write one entry."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=exception)


def configure() -> None:
    """Send our log, uvicorn's, and what others warn of to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    for name in ("qefficient", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler] if name != "uvicorn.error" else [], name == "uvicorn.error"
        logger.setLevel(logging.INFO)
    logging.getLogger().handlers = [handler]  # asyncio's, for example: a line that is no JSON stops who reads the log
    silence_libraries()


def silence_libraries() -> None:
    """Keep what libraries tell developers, and their progress bars, out of the log."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
