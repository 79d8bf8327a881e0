# SPDX-License-Identifier: BSD-3-Clause
"""What an operator decides: who may do what, how much, and from where adapters come."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from QEfficient.errors import ConfigError
from QEfficient.options import from_dict, option
from QEfficient.store import is_local


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request and of the server.

    Attributes:
        body_bytes: Longest request body.
        new_tokens: Most tokens of one answer.
        choices: Most answers of one request, ``n`` times its prompts.
        receive_seconds: How long a client may take to send headers, and again to send a body.
        send_seconds: How long a client may take to accept one piece of the answer.
        load_seconds: How long a request waits for its adapter.
        grace_seconds: How long a shutdown waits for running requests.
        connections: Most open connections.
    """

    body_bytes: int = 4 << 20
    new_tokens: int = 4096
    choices: int = 16
    receive_seconds: float = 30.0
    send_seconds: float = 60.0
    load_seconds: float = 120.0
    grace_seconds: float = 30.0
    connections: int = 1024


@dataclass(slots=True, kw_only=True)
class Key:
    """One client of the server.

    Attributes:
        name: Shown in logs; the key itself never is.
        key: The secret.
        admin: Whether it may load and unload adapters.
        requests_per_minute: 0 for no limit.
        running: Most requests at a time, 0 for no limit.
        models: Adapters it may use, empty for all.
    """

    name: str = option(help="Shown in logs.")
    key: str = option(help="The secret.")
    admin: bool = option(False)
    requests_per_minute: int = option(0)
    running: int = option(0)
    models: list[str] = option([])


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that are known; without any, everybody may do everything."""

    known: tuple[Key, ...] = ()
    _digests: dict[bytes, Key] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Sequence[Key]) -> "Keys":
        """Take keys, checked.

        Raises:
            ConfigError: Two share a name or a secret, a secret is shorter than 8 characters or no header can hold it, or a limit is negative.
        """
        digests = {_digest(k.key): k for k in keys}
        if len(digests) != len(keys) or len({k.name for k in keys}) != len(keys):
            raise ConfigError("each API key needs a name and a secret of its own")
        for key in keys:
            if len(key.key) < 8:
                raise ConfigError(f"the API key of {key.name!r} has {len(key.key)} characters; it needs 8 or more")
            if not (key.key.isascii() and key.key.isprintable()) or " " in key.key:
                raise ConfigError(
                    f"the API key of {key.name!r} must be ASCII without spaces: no client sends another one"
                )
            for limit in ("requests_per_minute", "running"):
                if getattr(key, limit) < 0:
                    raise ConfigError(
                        f"{limit} of {key.name!r} must be at least 0, not {getattr(key, limit)}; 0 is no limit"
                    )
        return cls(tuple(keys), digests)

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Read a YAML file, a list of mappings with the fields of :class:`Key`.

        Raises:
            ConfigError: It cannot be read, or an entry is wrong.
        """
        try:
            entries = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise ConfigError(f"cannot read the API keys in {path}: {str(e).splitlines()[0]}") from e
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            raise ConfigError(
                f"{path} must hold a list of keys, at least one, each with name and key; without --api-keys nobody needs one"
            )
        return cls.of([from_dict(Key, e, source=f"{path}, key {i + 1}") for i, e in enumerate(entries)])

    def find(self, authorization: str) -> Key | None:
        """Return whose ``Authorization`` header this is, ``None`` if nobody's."""
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer" or not secret:
            return None
        wanted = _digest(secret.strip())
        found = [k for digest, k in self._digests.items() if hmac.compare_digest(digest, wanted)]
        return found[0] if found else None


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True, slots=True)
class Places:
    """Where adapters may be loaded from while the server runs.

    Attributes:
        folders: An adapter's folder must lie within one of these, links followed.
        hub: Whether Hub ids are allowed.
    """

    folders: tuple[Path, ...] = ()
    hub: bool = False

    def check(self, path: str) -> str | Path:
        """Return what to load, resolved.

        Raises:
            ConfigError: It lies elsewhere; the message does not tell whether it exists.
        """
        if not path or "\0" in path:
            raise ConfigError("the adapter's path is empty or holds a NUL")
        if not is_local(path) and self.hub and ".." not in path.split("/"):
            return path
        try:
            found = Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as e:
            raise ConfigError("the adapter's path cannot be resolved") from e
        if not any(found.is_relative_to(folder.resolve()) for folder in self.folders):
            raise ConfigError("the adapter's path lies outside of the folders that this server may load from")
        return found
