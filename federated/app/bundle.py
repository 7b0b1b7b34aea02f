"""The app as Flower bundles it, and the hash by which run and device know that they mean the same.

A device never opens a bundle that came over the wire: it makes its own from what is installed and
compares hashes. So the bundle must come out the same everywhere, which Flower's own builder does
not promise: it compresses, and zlib's output differs between versions. Here nothing is compressed.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final

_CONFIG: Final = "pyproject.toml"
#: All of the app, in the order in which it is bundled; the configuration comes first.
_FILES: Final = (_CONFIG, "client_app.py", "server_app.py")
_DATE: Final = (2024, 10, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The bundle (FAB) of the installed app; `hash` is SHA-256 in hex, as Flower counts it."""

    content: bytes = field(repr=False)
    hash: str


@cache
def installed_bundle() -> Bundle:
    """Make the bundle from the files beside this one; the same on every machine."""
    directory = Path(__file__).parent
    files = [(name, (directory / name).read_bytes()) for name in _FILES]
    listing = "\n".join(f"{name},{sha256(raw).hexdigest()},{len(raw) * 8}" for name, raw in files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        for name, raw in [*files, (".info/CONTENT", listing.encode())]:
            entry = zipfile.ZipInfo(name, _DATE)
            # The same whatever system makes it.
            entry.create_system = 3
            bundle.writestr(entry, raw)
    content = buffer.getvalue()
    return Bundle(content=content, hash=sha256(content).hexdigest())
