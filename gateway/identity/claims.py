"""From the claims of a verified token to the principal that rules see. Pure.

OpenID Connect Core 1.0 section 2 (`acr`, `amr`, `auth_time`), SMART App Launch 2.2 (`fhirUser`,
`patient`, scopes), RFC 9068 (`client_id`). Four decisions are made here:

- `patient` is the patient *in context*. It is the own record of whoever shows the token only if
  `fhirUser` says the same, or if nothing says that he may be somebody else: no `fhirUser`, no role
  known or unknown, and no scope of SMART, where the claim never says who the person is. A clinician
  who opened an app beside a patient's record does not become that patient.
- An absolute `fhirUser` counts on the provider's audience or `fhir_bases` only: `Patient/3` of
  another server is somebody else. A token with another one is refused.
- Scopes limit as soon as one begins with `patient/`, `user/` or `system/`, or the client was
  launched by SMART (`launch…`, `fhirUser`). A token with OpenID's own scopes alone limits nothing;
  a program without scopes may do nothing.
- A second factor without `auth_time` has no age, and so counts as none.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from gateway.identity.model import Identified
from gateway.identity.purposes import default_purpose
from gateway.identity.records import person_name, shown_role
from gateway.settings import IdentityProviderSettings
from policies.model import PURPOSES, Assurance, Principal, Purpose, SecondFactor

_RESOURCE_SCOPES: Final = ("patient/", "user/", "system/")
_LAUNCH_SCOPES: Final = ("launch", "launch/", "fhiruser")
_MAX_SCOPES: Final = 256
_MAX_ROLES: Final = 64
_MAX_SUBJECT: Final = 512
_ID = re.compile(r"[A-Za-z0-9.-]{1,64}").fullmatch
_FHIR_USER = re.compile(
    r"(?:(https?://\S{1,400})/)?(Practitioner|PractitionerRole|Patient|RelatedPerson|Person)"
    r"/([A-Za-z0-9.-]{1,64})"
).fullmatch
# The log takes names of this form (`audit.model`).
_CLIENT = re.compile(r"[a-z0-9]{1,24}(-[a-z0-9]{1,24}){0,5}").fullmatch
_FACTORS: Final[dict[str, SecondFactor]] = {
    "hwk": "webauthn", "swk": "webauthn", "fido": "webauthn", "webauthn": "webauthn",
    "phr": "webauthn", "phrh": "webauthn", "sc": "certificate", "x509": "certificate",
}  # fmt: skip


def identified_by(
    claims: Mapping[str, Any], provider: IdentityProviderSettings, *, roles: frozenset[str]
) -> Identified | None:
    """Who the claims say this is; None if they do not say it clearly.

    `roles` are those that rules know. Purposes of the request itself come later.
    """
    client = _client(claims)
    subject = claims.get("sub")
    reference = _fhir_user(claims.get(provider.fhir_user_claim), provider)
    if reference is None or not _subject_is_clear(subject):
        return None
    own_roles = _roles(claims, provider, roles)
    if (
        not reference
        and claims.get(provider.patient_claim) is None
        and client
        and (subject is None or subject == claims.get("client_id", claims.get("azp")))
    ):
        return _service(claims, provider, client, own_roles)
    if subject is None:
        return None
    return _person(claims, provider, subject, reference, own_roles, client)


def account_of_subject(issuer: str, subject: str) -> str:
    """The stable name of a provider's subject, where nothing says which person of ours it is."""
    return f"account/{_digest(issuer, subject)}"


def _person(
    claims: Mapping[str, Any],
    provider: IdentityProviderSettings,
    subject: str,
    reference: str,
    roles: frozenset[str],
    client: str,
) -> Identified | None:
    account = account_of_subject(provider.issuer, subject)
    context = claims.get(provider.patient_claim)
    if context is not None and not (isinstance(context, str) and _ID(context)):
        return None
    patient = None
    if reference.startswith("Patient/"):
        patient = reference.partition("/")[2]
    elif _is_own_context(claims, provider, reference):
        patient = context
    references = frozenset({reference} if reference else ()) | frozenset(
        () if patient is None else {f"Patient/{patient}"}
    )
    stated = _purposes(claims, provider)
    if _at(claims, provider.purpose_claim) and not stated:
        # Whatever it limits the person to, it is none of what is known here.
        return None
    principal = Principal(
        kind="user",
        id=account,
        roles=roles,
        assurance=_assurance(claims, provider),
        patient=patient,
        references=references,
        scopes=_scopes(claims),
        purposes=frozenset(stated),
    )
    return Identified(
        principal=principal,
        means="bearer",
        person=person_name(
            patient=patient,
            references=frozenset({reference} if reference else ()),
            otherwise=account,
            roles=roles,
        ),
        purpose=stated[0] if stated else default_purpose(principal, {}),
        role=shown_role(roles, patient=patient is not None),
        client=client,
        claims=_auth_time(claims),
    )


def _service(
    claims: Mapping[str, Any],
    provider: IdentityProviderSettings,
    client: str,
    roles: frozenset[str],
) -> Identified:
    purposes = _purposes(claims, provider)
    principal = Principal(
        kind="service",
        id=_digest(provider.issuer, client),
        roles=roles,
        scopes=_scopes(claims) or frozenset(),
        purposes=frozenset(purposes),
    )
    return Identified(
        principal=principal,
        means="bearer",
        person=client,
        purpose=purposes[0] if purposes else default_purpose(principal, {}),
        role=shown_role(roles, patient=False),
        client=client,
    )


def _subject_is_clear(subject: object) -> bool:
    return subject is None or (isinstance(subject, str) and 0 < len(subject) <= _MAX_SUBJECT)


def _client(claims: Mapping[str, Any]) -> str:
    """The application, under a name that the log takes; empty if none is named."""
    name = claims.get("client_id", claims.get("azp", ""))
    if not isinstance(name, str) or not name:
        return ""
    return name if _CLIENT(name) else f"client/{_digest('client', name)[:24]}"


def _fhir_user(value: object, provider: IdentityProviderSettings) -> str | None:
    """`Practitioner/7`; empty if there is none; None if it cannot be understood, or is not here."""
    if value is None:
        return ""
    found = _FHIR_USER(value) if isinstance(value, str) else None
    if found is None:
        return None
    here = {one.rstrip("/") for one in (provider.audience, *provider.fhir_bases)}
    return f"{found[2]}/{found[3]}" if found[1] is None or found[1] in here else None


def _is_own_context(
    claims: Mapping[str, Any], provider: IdentityProviderSettings, reference: str
) -> bool:
    """Whether the patient in context can be nobody but the person."""
    stated = (reference, _at(claims, provider.roles_claim))
    return claims.get(provider.patient_claim) is not None and not (
        any(stated) or _scopes(claims) is not None
    )


def _roles(
    claims: Mapping[str, Any], provider: IdentityProviderSettings, known: frozenset[str]
) -> frozenset[str]:
    given = _words(_at(claims, provider.roles_claim))[:_MAX_ROLES]
    if provider.roles:
        return frozenset(provider.roles[one] for one in given if one in provider.roles)
    return frozenset(given) & known


def _at(claims: Mapping[str, Any], name: str) -> object:
    """A claim by its name, or (`realm_access.roles`) inside of others."""
    if name in claims:
        return claims[name]
    found: object = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list):
        return [one for one in value if isinstance(one, str)]
    return []


def _scopes(claims: Mapping[str, Any]) -> frozenset[str] | None:
    given = _words(claims.get("scope", claims.get("scp")))
    limiting = [one for one in given if one.lower().startswith(_RESOURCE_SCOPES)]
    if len(limiting) > _MAX_SCOPES:
        return frozenset()
    launched = any(
        one.lower() in _LAUNCH_SCOPES or one.lower().startswith("launch/") for one in given
    )
    return frozenset(limiting) if limiting or launched else None


def _purposes(claims: Mapping[str, Any], provider: IdentityProviderSettings) -> list[Purpose]:
    given = _words(_at(claims, provider.purpose_claim))
    return [one for one in PURPOSES if one in given]


def _assurance(claims: Mapping[str, Any], provider: IdentityProviderSettings) -> Assurance:
    shown = [*_words(claims.get("amr")), *_words(claims.get("acr"))]
    counting = [one for one in shown if one in provider.second_factor]
    at = _number(claims.get("auth_time"))
    if not counting or at is None:
        return Assurance()
    kinds: list[SecondFactor] = [_FACTORS.get(one, "totp") for one in counting]
    best = next((one for one in kinds if one != "totp"), kinds[0])
    return Assurance(second_factor=best, second_factor_at=at)


def _auth_time(claims: Mapping[str, Any]) -> dict[str, str | list[str]]:
    at = _number(claims.get("auth_time"))
    return {} if at is None else {"auth_time": str(int(at))}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value < 2**53 else None


def _digest(*parts: str) -> str:
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]
