"""Who is never trained on: decided on the node, the same in every round, unknown to everybody else.

A person is held out where an HMAC of their tag, keyed by the study's id, falls below the fraction.
The tag is the store's own (`node.store.Store.tag`): it outlives erasing, says nothing without the
store's file, and never leaves the node. So the rule is public, fixed before anybody's data is
looked at, and still nobody but the node can tell who is on which side.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Final

_DOMAIN: Final = b"havengate/held-out/v1\n"
_BITS: Final = 64


def is_held_out(*, study: str, tag: str, fraction: float) -> bool:
    """Whether the person is kept for evaluation in this study (its id, not its hash).

    The id, so that a study that is amended and approved anew keeps its held-out people: by another
    rule, somebody whom an earlier model was trained on would pass for unseen. Needs no secrecy: who
    knows `study` but not the tag knows only that the odds are `fraction`.
    """
    key = sha256(_DOMAIN + study.encode()).digest()
    drawn = int.from_bytes(hmac.digest(key, tag.encode(), "sha256")[: _BITS // 8])
    return drawn < int(fraction * 2**_BITS)
