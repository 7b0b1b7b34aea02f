"""Answers of the gateway's own: refusals and failures, in the form that the client reads.

RFC 9457 problem details for programs, an OperationOutcome (FHIR R4) for FHIR clients, a plain page
for people. What the client is told: what happened, whether it can be mended and by whom. Never the
names of rules (they can say what is in a record), nothing of the app's, no identifiers but that of
the exchange, by which an officer finds it in the log.
"""

from __future__ import annotations

import base64
import hashlib
import html
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal
from urllib.parse import quote

import orjson

from gateway.core.enforcement import Reply
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.routes import OWN_PREFIX
from policies.model import Denied, RemedyKind

Form = Literal["fhir", "problem", "page"]

_TITLES = {
    400: "This request cannot be understood",
    401: "Please sign in",
    403: "This is not open to you",
    404: "There is nothing here",
    405: "This cannot be done here",
    406: "Not to be had in that form",
    408: "This came too slowly",
    409: "Somebody else changed this meanwhile",
    410: "This is gone",
    411: "The length must be announced",
    412: "This has changed meanwhile",
    413: "This is too large",
    415: "This form of content is not accepted",
    422: "This cannot be done here",
    429: "Too many requests",
    500: "Something went wrong in the gateway",
    501: "This is not offered here",
    502: "The application behind is not answering properly",
    503: "Something that is needed is not available now",
    504: "The application behind is too slow",
}
#: FHIR R4 IssueType.
_ISSUES = {
    400: "invalid", 401: "login", 403: "forbidden", 404: "not-found", 405: "not-supported",
    406: "not-supported", 409: "conflict", 410: "deleted", 412: "conflict", 413: "too-long",
    415: "not-supported", 422: "not-supported", 429: "throttled", 500: "exception",
    501: "not-supported", 502: "transient", 503: "transient", 504: "timeout",
}  # fmt: skip
_TYPES: dict[Form, str] = {
    "fhir": "application/fhir+json; charset=utf-8",
    "problem": "application/problem+json",
    "page": "text/html; charset=utf-8",
}
_STYLE = """
body{font:1.05rem/1.6 system-ui,sans-serif;color:#1d2b33;background:#f4f6f5;margin:0}
main{max-width:34rem;margin:12vh auto 0;padding:2rem 1.5rem;background:#fff;border-radius:.75rem;
box-shadow:0 1px 3px #0002}
h1{font-size:1.4rem;line-height:1.3;margin:0 0 1rem} a{color:#0b5c6b}
.small{color:#5a6a72;font-size:.85rem}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'"
)
#: For every answer that the gateway itself writes.
_OWN: tuple[tuple[str, str], ...] = (
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("content-security-policy", _POLICY),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What the client will be told."""

    status: int
    detail: str
    remedy: RemedyKind | None = None
    remedy_text: str = ""
    headers: tuple[tuple[str, str], ...] = ()


def form_of(head: RequestHead, *, fhir: bool) -> Form:
    """How this client reads answers. Whoever names HTML is a person with a browser."""
    accept = (head.headers.get("accept") or "").lower()
    if "text/html" in accept and head.headers.get("sec-fetch-dest") in {None, "document", "iframe"}:
        return "page"
    return "fhir" if fhir else "problem"


def for_denial(denied: Denied, *, hide: bool) -> Refusal:
    """Tell a denial: reason and remedy, or, if even existence is a secret, that there is nothing.

    Both ways take the same form as for a record that does not exist.
    """
    if denied.failure is not None:
        detail = "This could not be decided, so it is refused. Tell the operator."
        return Refusal(status=403, detail=detail, remedy="operator")
    if hide:
        return not_found()
    kind, text = denied.remedy.kind, denied.remedy.text
    if kind == "step_up":
        challenge = 'Bearer realm="havengate", error="insufficient_user_authentication"'
        return Refusal(
            status=401,
            detail=denied.reason,
            remedy=kind,
            remedy_text=text,
            headers=(("www-authenticate", challenge),),
        )
    return Refusal(status=403, detail=denied.reason, remedy=kind, remedy_text=text)


def not_found() -> Refusal:
    """The one answer for everything that does not exist for this client."""
    return Refusal(status=404, detail="There is nothing here, or nothing that is open to you.")


def sign_in(challenge: str, *, given: bool) -> Refusal:
    """Tell somebody unknown to sign in."""
    detail = (
        "What was shown to sign in is not accepted. Sign in again."
        if given
        else "This needs a sign-in."
    )
    return Refusal(status=401, detail=detail, headers=(("www-authenticate", challenge),))


def write(refusal: Refusal, *, form: Form, head: RequestHead, request: str) -> Reply:
    """The answer in full. A browser that must sign in is led to the page where it can."""
    if (
        form == "page"
        and refusal.status == HTTPStatus.UNAUTHORIZED
        and head.method in {"GET", "HEAD"}
    ):
        page = "step-up" if refusal.remedy == "step_up" else "sign-in"
        location = f"{OWN_PREFIX}{page}?next={quote(head.target, safe='')}"
        return _reply(303, form, b"", (("location", location),))
    title = _TITLES.get(refusal.status, "This was refused")
    body = {"fhir": _outcome, "problem": _problem, "page": _page}[form](refusal, title, request)
    return _reply(refusal.status, form, body, refusal.headers)


def _reply(status: int, form: Form, body: bytes, headers: tuple[tuple[str, str], ...]) -> Reply:
    fields = (("content-type", _TYPES[form]), *_OWN, *headers)
    return Reply(head=ResponseHead(status=status, headers=Headers(fields)), body=body)


def _problem(refusal: Refusal, title: str, request: str) -> bytes:
    content: dict[str, object] = {
        "type": f"urn:havengate:problem:{_ISSUES.get(refusal.status, 'refused')}",
        "title": title,
        "status": refusal.status,
        "detail": refusal.detail,
        "instance": f"urn:havengate:exchange:{request}",
    }
    if refusal.remedy is not None:
        content["remedy"] = refusal.remedy
        content["remedy_text"] = refusal.remedy_text
    return orjson.dumps(content)


def _outcome(refusal: Refusal, title: str, request: str) -> bytes:
    text = " ".join(part for part in (refusal.detail, refusal.remedy_text) if part)
    issue: dict[str, object] = {
        "severity": "error",
        "code": _ISSUES.get(refusal.status, "processing"),
        "details": {"text": title},
        "diagnostics": f"{text} ({request})",
    }
    if refusal.remedy is not None:
        system = "https://havengate.internal/fhir/remedy"
        issue["details"] = {"text": title, "coding": [{"system": system, "code": refusal.remedy}]}
    return orjson.dumps({"resourceType": "OperationOutcome", "issue": [issue]})


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{style}</style></head><body><main><h1>{title}</h1><p>{detail}</p>{remedy}
<p class="small">If you ask for help, give this number: {request}</p></main></body></html>
"""
_LINKS: dict[RemedyKind, tuple[str, str]] = {
    "step_up": ("step-up", "Show the second factor"),
    "break_glass": ("break-glass", "Ask for emergency access"),
}


def _page(refusal: Refusal, title: str, request: str) -> bytes:
    remedy = f"<p>{html.escape(refusal.remedy_text)}</p>" if refusal.remedy_text else ""
    if refusal.remedy in _LINKS:
        page, words = _LINKS[refusal.remedy]
        remedy += f'<p><a href="{OWN_PREFIX}{page}">{words}</a></p>'
    elif refusal.status == HTTPStatus.UNAUTHORIZED:
        remedy += f'<p><a href="{OWN_PREFIX}sign-in">Sign in</a></p>'
    return _PAGE.format(
        style=_STYLE,
        title=html.escape(title),
        detail=html.escape(refusal.detail),
        remedy=remedy,
        request=html.escape(request),
    ).encode()
