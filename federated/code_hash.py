"""Which code is installed here: one hash over the sources of the package `federated`.

A study names the hash of the code that devices must run; a device compares it with its own. It
covers every source file of the package by name and content, in the order of their names, so that
one added, removed or changed file gives another hash. Compiled caches and documents do not count.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).parent
_SOURCES: Final = frozenset({".py", ".toml", ".html", ".css"})


@lru_cache(maxsize=8)
def installed_code_hash(package: Path = _PACKAGE) -> str:
    """SHA-256, in hex, of the sources below `package`; read once in a process."""
    digest = sha256(b"havengate/code/v1\n")
    names = sorted(
        file.relative_to(package).as_posix()
        for file in package.rglob("*")
        if file.suffix in _SOURCES and file.is_file()
    )
    for name in names:
        content = (package / name).read_bytes()
        digest.update(f"{name}\n{len(content)}\n{sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()
