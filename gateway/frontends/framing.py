"""The target of a request as one string that everybody reads the same.

The server gives the path percent-decoded and drops how it was written, so it cannot be passed on as
it came. It is written anew in one canonical form instead: what is decided about and what the app
gets are the same bytes. A path that stands for more than one thing is refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final
from urllib.parse import quote

from gateway.errors import BadRequestError

#: RFC 3986 section 3.3 `pchar`, but for `;`: some apps cut a segment there, others do not.
_SAFE: Final = "/!$&'()*+,=:@~"
_PLAIN = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,=:@-]+/?)*").fullmatch
#: Control characters, a backslash, something encoded twice, or what was not UTF-8.
_REFUSED = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ufffd\ud800-\udfff]|%[0-9A-Fa-f]{2}").search
_DOTS: Final = frozenset({".", ".."})


@lru_cache(maxsize=256)
def canonical_path(decoded: str) -> str:
    """Write a decoded path in its canonical form. Raises `BadRequestError` for an ambiguous one.

    Refused are dot segments (also with parameters: `..;x`), empty segments but the last,
    backslashes, control characters, what is not UTF-8, and what is percent-encoded twice. An
    encoded slash cannot be told from a slash here, and is one for the app as well.
    """
    if not decoded.startswith("/"):
        raise BadRequestError("The target of the request must be a path that begins with a slash.")
    if _REFUSED(decoded):
        raise BadRequestError(
            "The path has characters that two programs could read differently: backslashes, "
            "control characters, bytes that are no UTF-8, or something percent-encoded twice."
        )
    segments = decoded[1:].split("/")
    if "" in segments[:-1] or any(one.partition(";")[0] in _DOTS for one in segments):
        raise BadRequestError(
            "The path has empty segments, `.` or `..` in it; ask for the path that is meant."
        )
    return decoded if _PLAIN(decoded) else quote(decoded, safe=_SAFE)
