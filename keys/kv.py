"""Secrets at rest on the key server (KV version 2), such as the seeds of second factors.

https://openbao.org/api-docs/secret/kv/kv-v2/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from keys.errors import KeyConfigurationError, VaultRejectedError
from keys.vault import VaultClient
from keys.vault_answers import data_of, integer

_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_PATH = re.compile(rf"{_PART}(/{_PART})*", re.ASCII)


class KVStore:
    """Secrets below `root`, such as `gateway`. Thread-safe."""

    def __init__(self, client: VaultClient, root: str) -> None:
        self._client = client
        self._root = root

    def read(self, path: str) -> dict[str, Any] | None:
        """Return the newest version, or None if there is nothing."""
        try:
            answer = self._client.call("GET", self._path("data", path))
        except VaultRejectedError as error:
            # Any other 404, such as for a mount that is gone, must not pass for "there is none".
            if error.absent:
                return None
            raise
        data = data_of(answer).get("data")
        return data if isinstance(data, dict) else None

    def write(self, path: str, values: Mapping[str, Any]) -> int:
        """Store a new version and return its number."""
        answer = self._client.call("POST", self._path("data", path), {"data": dict(values)})
        return integer(data_of(answer), "version")

    def delete(self, path: str) -> None:
        """Destroy all versions and the metadata: nothing of it can be read again."""
        self._client.call("DELETE", self._path("metadata", path))

    def _path(self, kind: str, path: str) -> str:
        return f"{self._client.layout.kv}/{kind}/{self._root}/{check_path(path)}"


def check_path(path: str) -> str:
    """Return `path` if it names something below its root and nothing else.

    Raises `KeyConfigurationError`: a name with `..` or a query could reach outside.
    """
    if _PATH.fullmatch(path):
        return path
    raise KeyConfigurationError(
        "A path on the key server may hold letters, digits, '.', '_', '-' and single slashes only, "
        "and no part may begin with a dot."
    )
