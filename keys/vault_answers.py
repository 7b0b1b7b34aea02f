"""What the key server answers: statuses into errors, bodies into values. No input or output here.

`keys.vault` hands in each response; the adapters read values out of good ones with `data_of` and
`integer`, so that an answer of another form is an error of ours and no accident.

https://openbao.org/api-docs/#http-status-codes
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import requests

from keys.errors import (
    VaultDeniedError,
    VaultRejectedError,
    VaultSealedError,
    VaultThrottledError,
    VaultUnavailableError,
)


def parse_response(response: requests.Response, content: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a good answer whose body is `content`.

    Raises the `VaultError` that the status stands for.
    """
    status = response.status_code
    body = {} if status == HTTPStatus.NO_CONTENT else _parse_json(content)
    if body is not None and (status in {200, 204} or _is_batch(status, body)):
        return body
    said = _server_message(body)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        error = VaultThrottledError(f"{where}: a quota refused the call (429){said}.")
        error.retry_after_s = _parse_retry_after(response.headers.get("Retry-After"))
        raise error
    if status == HTTPStatus.SERVICE_UNAVAILABLE and "sealed" in said.lower():
        raise VaultSealedError(f"{where}: the key server is sealed; unseal it.")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise VaultUnavailableError(f"{where}: the server failed with {status}{said}.")
    if response.is_redirect:
        raise VaultUnavailableError(
            f"{where}: answered a redirect ({status}), as a standby does; tokens do not follow it. "
            "Configure the address of the active server or of a balancer that knows it."
        )
    # A proxy's page is not the key server's word, above all not for "there is no such secret".
    if body is None:
        raise VaultUnavailableError(
            f"{where}: the answer ({status}) is not a JSON object; something else than a key "
            "server answers there."
        )
    if status in {401, 403}:
        raise VaultDeniedError(
            f"{where}: denied ({status}); the role's policy does not allow this."
        )
    rejected = VaultRejectedError(f"{where}: rejected ({status}){said}.")
    rejected.status = status
    rejected.absent = status == HTTPStatus.NOT_FOUND and (
        body.get("errors") == [] or "data" in body
    )
    raise rejected


def data_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `data` of an answer. Raises `VaultRejectedError` if it has none."""
    data = answer.get("data")
    if not isinstance(data, dict):
        raise VaultRejectedError(
            "The key server's answer carries no data; is it a Vault or OpenBao?"
        )
    return data


def integer(data: Mapping[str, Any], name: str) -> int:
    """Return one number of an answer. Raises `VaultRejectedError` if it is missing."""
    value = data.get(name)
    if type(value) is not int:
        raise VaultRejectedError(f"The key server's answer carries no number {name}.")
    return value


def _is_batch(status: int, body: Mapping[str, Any]) -> bool:
    # Transit answers 400 (Vault can be told 207) when one item of a batch failed, and still gives
    # all.
    data = body.get("data")
    return status in {207, 400} and isinstance(data, dict) and "batch_results" in data


def decode_base64(text: object) -> bytes:
    """Return the bytes of one base64 value. Raises `VaultRejectedError` if it is none."""
    try:
        return base64.b64decode(str(text), validate=True)
    except ValueError as error:
        raise VaultRejectedError("The key server answered something that is not base64.") from error


def _parse_json(content: bytes) -> dict[str, Any] | None:
    """Return the object, or None for anything else, nothing at all included."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _server_message(body: Mapping[str, Any] | None) -> str:
    """Return the server's own words, short and printable. It never repeats secrets in them."""
    errors = body.get("errors") if body else None
    if not isinstance(errors, list) or not errors:
        return ""
    text = "".join(c if c.isprintable() else " " for c in str(errors[0]))
    return f": {text[:160].strip()}"


def _parse_retry_after(text: str | None) -> float:
    """Return for how long to wait, 0 if the server named no time.

    These servers send whole seconds, rounded down: a 0 means up to one. They never send a date.
    """
    return float(text) + 1 if text and text.isascii() and text.isdigit() else 0.0
