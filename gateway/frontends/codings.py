"""Content codings of answers (RFC 9110 section 8.4), undone within a bound.

An answer that is looked into must be read as it is. Only what the standard library can undo within
a bound is undone; the gateway asks apps for nothing else.
"""

from __future__ import annotations

import zlib

from gateway.errors import UpstreamContentError

_GZIP = 16 + zlib.MAX_WBITS


def decode(body: bytes, coding: str, limit: int) -> bytes:
    """Undo one coding. Raises `UpstreamContentError` for others, and if the result is not whole.

    Never holds more than `limit` bytes of the result, however small `body` is.
    """
    match coding.strip().lower():
        case "" | "identity":
            return body
        case "gzip" | "x-gzip":
            return _inflate(body, _GZIP, limit)
        case "deflate":
            # RFC 9110 means the zlib format; some apps send it without its wrapper.
            wrapped = body[:1] and body[0] & 0x0F == zlib.DEFLATED
            return _inflate(body, zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS, limit)
        case _:
            raise UpstreamContentError(
                "The app answered in a content coding that was not asked for; only gzip and "
                "deflate can be undone. Configure the app to compress with gzip or not at all."
            )


def _inflate(body: bytes, window: int, limit: int) -> bytes:
    """Unpack all members (RFC 1952 section 2.2 allows several)."""
    parts: list[bytes] = []
    size = 0
    while body or not parts:
        stream = zlib.decompressobj(window)
        try:
            part = stream.decompress(body, limit - size + 1)
        except zlib.error as error:
            raise UpstreamContentError("The app's compressed answer is damaged.") from error
        size += len(part)
        if size > limit:
            raise UpstreamContentError(
                f"The app's answer is larger than {limit} bytes once it is unpacked."
            )
        if not stream.eof:
            raise UpstreamContentError("The app's compressed answer ends too early.")
        parts.append(part)
        body = stream.unused_data
    return b"".join(parts)
