# SPDX-License-Identifier: BSD-3-Clause
"""The exceptions of Efficient Transformers.

::

    QEffError
    ├── ConfigError (ValueError)            an option, file or field has a wrong value
    ├── AdapterMismatchError (ValueError)   an adapter does not fit a base or a graph
    ├── AdapterNotFoundError (LookupError)  no adapter of that name or at that place
    ├── ArtifactError (ValueError)          a graph, program or checkpoint on disk is not whole
    ├── UnsupportedError (NotImplementedError)  a model, method or target that we cannot handle
    ├── NotCompiledError (RuntimeError)     a call that needs an export or compile first
    ├── QueueFullError (RuntimeError)       a server has no room for one more request now
    └── AdaptersFullError (RuntimeError)    an engine has no room for one more adapter now

Every error also is the built-in that callers expect. A wrong type stays ``TypeError``.
Commands print a ``QEffError`` as one line and exit with code 2.
"""


class QEffError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(QEffError, ValueError):
    """An option, a configuration file or a field of it has a wrong value."""


class AdapterMismatchError(QEffError, ValueError):
    """An adapter does not fit the base or the exported graph."""


class AdapterNotFoundError(QEffError, LookupError):
    """There is no adapter of that name, or none in that place."""


class ArtifactError(QEffError, ValueError):
    """A graph, a program, an adapter file or a checkpoint on disk is missing or not whole."""


class UnsupportedError(QEffError, NotImplementedError):
    """A model, a PEFT method, an operator or a target that cannot be handled, and why."""


class NotCompiledError(QEffError, RuntimeError):
    """A call that needs ``export`` or ``compile`` first."""


class QueueFullError(QEffError, RuntimeError):
    """As many requests wait as may wait; try again later."""


class AdaptersFullError(QEffError, RuntimeError):
    """Every resident adapter is in use, and there is no memory for one more; try again later."""
