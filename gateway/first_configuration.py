"""What `havengate init` asks and the commented file that it writes. Pure text in, text out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from gateway.errors import GatewayConfigurationError
from policies.model import SERVICE_KINDS, ServiceKind

#: What each kind of service is, in the words in which it is asked for.
KINDS: dict[ServiceKind, str] = {
    "ehr": "patient records",
    "messaging": "secure messages",
    "telehealth": "video visits",
    "mood": "mood diaries",
    "wearable": "measurements of wearables",
    "forum": "a support forum",
    "crisis": "a crisis line",
    "elearning": "courses",
    "generic": "anything else",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstApp:
    """The four answers."""

    upstream: str
    kind: ServiceKind
    content: Literal["fhir", "opaque"]
    port: int


def check_upstream(text: str) -> str:
    """Return a usable URL. Raises `GatewayConfigurationError` that says what to write instead."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        port = -1
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1:
        raise GatewayConfigurationError(
            f"“{text}” is not the address of an app. Write it as a browser would need it, such as "
            "http://127.0.0.1:8080 or https://records.example.org."
        )
    if parts.query or parts.fragment or parts.username:
        raise GatewayConfigurationError(
            "The address of an app has no question mark, fragment or password in it."
        )
    return url.rstrip("/")


def check_kind(text: str) -> ServiceKind:
    """Return the kind named. Raises `GatewayConfigurationError`, naming all there are."""
    for kind in SERVICE_KINDS:
        if kind == text.strip().lower() and kind in KINDS:
            return kind
    known = ", ".join(f"{kind} ({words})" for kind, words in KINDS.items())
    raise GatewayConfigurationError(f"“{text}” is no kind of service. Known are: {known}.")


def check_content(text: str) -> Literal["fhir", "opaque"]:
    """Return how the app is understood. Raises `GatewayConfigurationError`, naming both ways."""
    match text.strip().lower():
        case "fhir":
            return "fhir"
        case "opaque":
            return "opaque"
    raise GatewayConfigurationError(f"Content is fhir or opaque, not “{text}”.")


#: A built-in role that the rules let into such a service.
_ROLES: dict[ServiceKind, str] = {
    "generic": "staff",
    "crisis": "crisis-worker",
    "forum": "moderator",
    "elearning": "staff",
}


def suggested_role(kind: ServiceKind) -> str:
    """A role for the first account that can use such an app."""
    return _ROLES.get(kind, "clinician")


def suggested_content(kind: ServiceKind) -> Literal["fhir", "opaque"]:
    """Records usually speak FHIR, the rest does not."""
    return "fhir" if kind == "ehr" else "opaque"


def write_first(first: FirstApp) -> str:
    """The file's text."""
    path = urlsplit(first.upstream).path.rstrip("/") or "/"
    base = first.upstream[: -len(path)] if path != "/" else first.upstream
    fhir_path = path if path != "/" else "/"
    route = _FHIR if first.content == "fhir" else _OPAQUE
    return _HEAD.format(port=first.port, admin_port=first.port + 1) + route.format(
        kind=first.kind,
        words=KINDS[first.kind],
        upstream=json.dumps(base),
        path=json.dumps(fhir_path),
    )


_HEAD = """\
# Havengate stands in front of the apps named below. Every request is identified, decided by the
# rules, protected and logged before an answer leaves. Start it with: havengate up
# Paths are relative to this file. An unknown word here stops the start, with the nearest right one.

# Name of your organisation: keys and pseudonyms of two organisations never meet.
# Do not change it once records are stored: nothing sealed under another name opens.
tenant = "clinic"

[gateway]
host = "127.0.0.1"         # 0.0.0.0: reachable from other machines
port = {port}
admin_port = {admin_port}          # /healthz, /readyz and /metrics, on this machine only
# public_url = "https://gateway.example.org"   # how people reach it, if not https://localhost:{port}

# [gateway.tls]            # your own certificate; browsers ask about the one that is made here
# certificate_file = "tls/fullchain.pem"
# key_file = "tls/key.pem"

# Who may come in: accounts made with `havengate users add`, and the bearer tokens of your identity
# provider, if you have one:
# [[gateway.identity.providers]]
# issuer = "https://login.example.org"
# audience = "havengate"
# jwks_url = "https://login.example.org/.well-known/jwks.json"

# Apps behind the gateway call out through it, to the hosts listed and no others:
# [gateway.outbound]
# apps = [ {{ name = "records", key_hash_file = "outbound-records.key" }} ]
# destinations = [ {{ host = "labs.example.org", purposes = ["TREAT"] }} ]

# [policies]               # your own rules beside the built-in ones: docs/rules.md
# directory = "policies"

"""

_FHIR = """\
# The app. Add a [[gateway.routes]] for each further one; the longest path wins.
[[gateway.routes]]
name = "records"
kind = "{kind}"               # {words}
path = {path}
upstream = {upstream}
content = "fhir"           # bodies are understood and decided record by record
# Relations (CareTeam, Encounter, generalPractitioner) and consents are asked of the same app.
patient_facts = "upstream"
# An app that has no Consent resources: without this, it is closed to all staff.
# patient_consents = "none"
fields = [
    # The app keeps only ciphertext of these; `index` lets exact values be found by that parameter.
    {{ path = "Observation.valueString", seal = true }},
    {{ path = "Observation.note.text", seal = true }},
    # {{ path = "Patient.telecom.value", seal = true, index = "telecom" }},
]
"""

_OPAQUE = """\
# The app. Add a [[gateway.routes]] for each further one; the longest path wins.
[[gateway.routes]]
name = "app"
kind = "{kind}"               # {words}
path = {path}
upstream = {upstream}
content = "opaque"         # pages and files pass as they are, for those whom the rules let in
# content = "json" with [[gateway.routes.rules]] lets the gateway understand an API: see
# docs/operating.md, "Apps that do not speak FHIR".
"""
