"""What a node's process is told: a file that only says where things are."""

from __future__ import annotations

import msgspec


class NodeFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a node finds what it needs. Paths are absolute.

    `key_file` is where the store's keys lie; empty for the key ring of the operating system.
    With `socket`, the node is served to Flower's own SuperNode there, and no agent runs.
    `enrolment` may be empty once the store has been enrolled.
    """

    superlink: str
    ca_file: str
    directory: str
    store: str
    key_file: str = ""
    enrolment: str = ""
    socket: str = ""
