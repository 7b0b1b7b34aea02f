"""Bearer tokens: only what a configured provider signed, for us, now, and as it says."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import AccountError, GatewayConfigurationError, UnavailableError
from gateway.identity.bearer import BearerTokens, last_expiry, to_revoke
from gateway.identity.claims import identified_by
from gateway.identity.jwks import KeySet
from gateway.identity.model import Identified
from gateway.identity.revocations import subject_of, token_with_id
from gateway.settings import IdentityProviderSettings
from policies.model import ROLES
from tests.gateway.identity.workbench import START, Bench, Clock

ISSUER = "https://idp.example"
_SHARED = [HealthCheck.function_scoped_fixture]
KEY = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
OTHER = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
SHORT = rsa.generate_private_key(public_exponent=65_537, key_size=1_024)  # noqa: S505 - too short, as the test wants it
CURVE = ec.generate_private_key(ec.SECP256R1())


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    algorithms = jwt.algorithms
    kind = algorithms.RSAAlgorithm if hasattr(key, "decrypt") else algorithms.ECAlgorithm
    found: dict[str, Any] = dict(kind.to_jwk(key.public_key(), as_dict=True))
    return found | ({} if kid is None else {"kid": kid}) | more


def provider(tmp_path: Path, *keys: dict[str, Any], **more: Any) -> IdentityProviderSettings:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": keys or (jwk(KEY, "a"), jwk(CURVE, "c"))}))
    values: dict[str, Any] = {
        "issuer": ISSUER, "audience": "havengate", "jwks_file": str(path), "leeway_s": 0.0,
        "fhir_bases": ("https://ehr.example/r4",),
    }  # fmt: skip
    return IdentityProviderSettings(**values | more)


def claims(**changes: Any) -> dict[str, Any]:
    made = {
        "iss": ISSUER, "aud": "havengate", "sub": "u-1", "iat": START, "exp": START + 300,
        "jti": "t-1", "roles": ["clinician"], "fhirUser": "https://ehr.example/r4/Practitioner/7",
        "azp": "portal", "amr": ["pwd", "otp"], "auth_time": START - 60,
    } | changes  # fmt: skip
    return {name: value for name, value in made.items() if value is not None}


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def token(given: dict[str, Any], *, key: Any = KEY, algorithm: str = "RS256", **header: Any) -> str:
    """A signed token, also one that a library would refuse to make."""
    whole = {"alg": algorithm, "typ": "JWT", "kid": "a", **header}
    parts = [_base64(json.dumps(part).encode()) for part in (whole, given)]
    signing = jwt.get_algorithm_by_name(algorithm)
    return ".".join([*parts, _base64(signing.sign(".".join(parts).encode(), key))])


@pytest.fixture
def tokens(one: Bench, tmp_path: Path) -> BearerTokens:
    return made(one, provider(tmp_path))


def made(one: Bench, *settings_: IdentityProviderSettings) -> BearerTokens:
    revocations = one.identity.directory.revocations
    return BearerTokens(settings_, revocations=revocations, clock=one.clock)


async def test_a_right_token_says_who_and_how_sure(tokens: BearerTokens) -> None:
    found = await tokens.identify(token(claims()))
    assert isinstance(found, Identified)
    assert (found.person, found.role, found.client) == ("Practitioner/7", "clinician", "portal")
    assert found.principal.roles == {"clinician"}
    assert found.principal.references == {"Practitioner/7"}
    assert found.principal.assurance.second_factor == "totp"
    assert found.principal.assurance.second_factor_at == START - 60
    assert found.principal.scopes is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"iss": "https://evil.example"}, "bad_token"),
        ({"iss": [ISSUER]}, "bad_token"),
        ({"aud": "other"}, "bad_token"),
        ({"aud": None}, "bad_token"),
        ({"exp": None}, "bad_token"),
        ({"exp": START}, "expired_token"),
        ({"exp": "soon"}, "bad_token"),
        ({"exp": True}, "bad_token"),
        ({"iat": None}, "bad_token"),
        ({"iat": START + 5}, "bad_token"),
        ({"iat": START - 90_000}, "expired_token"),
        ({"nbf": START + 5}, "bad_token"),
        ({"jti": ""}, "bad_token"),
        ({"jti": 7}, "bad_token"),
        ({"sub": None, "azp": None}, "bad_token"),
        ({"fhirUser": "Practitioner/../7"}, "bad_token"),
        ({"fhirUser": ["Practitioner/7"]}, "bad_token"),
        ({"patient": "3/../4"}, "bad_token"),
    ],
)
async def test_refuses_claims_that_are_not_right(
    tokens: BearerTokens, change: dict[str, Any], reason: str
) -> None:
    assert await tokens.identify(token(claims(**change))) == reason


async def test_refuses_a_signature_by_another_key(tokens: BearerTokens) -> None:
    assert await tokens.identify(token(claims(), key=OTHER)) == "bad_token"
    assert await tokens.identify(token(claims(), kid="zz")) == "bad_token"
    assert await tokens.identify(token(claims(), kid="c")) == "bad_token"
    assert await tokens.identify(token(claims(), key=CURVE, algorithm="ES256")) == "bad_token"
    right = token(claims(), key=CURVE, algorithm="ES256", kid="c")
    assert isinstance(await tokens.identify(right), Identified)


async def test_the_token_does_not_choose_the_algorithm(tokens: BearerTokens) -> None:
    public = KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    parts = [
        _base64(json.dumps(part).encode())
        for part in ({"alg": "HS256", "typ": "JWT", "kid": "a"}, claims())
    ]
    algorithm = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    code = algorithm.sign(".".join(parts).encode(), public)
    confused = ".".join([*parts, _base64(code)])
    none = {"alg": "none", "typ": "JWT", "kid": "a"}
    unsigned = f"{_base64(json.dumps(none).encode())}.{parts[1]}."
    for wrong in (
        confused,
        unsigned,
        *(token(claims(), algorithm=one) for one in ("RS512", "PS256")),
    ):
        assert await tokens.identify(wrong) == "bad_token"


@pytest.mark.parametrize(
    "header",
    [{"crit": ["exp"]}, {"typ": "logout+jwt"}, {"typ": "dpop+jwt"}, {"kid": 7}, {"zip": "DEF"}],
)
async def test_refuses_headers_that_it_would_have_to_understand(
    tokens: BearerTokens, header: dict[str, Any]
) -> None:
    assert await tokens.identify(token(claims(), **header)) == "bad_token"


async def test_an_id_is_needed_where_there_are_several_keys(one: Bench, tmp_path: Path) -> None:
    several = made(one, provider(tmp_path))
    bare = jwt.encode(claims(), KEY, algorithm="RS256")
    assert await several.identify(bare) == "bad_token"
    single = made(one, provider(tmp_path, jwk(KEY, None)))
    assert isinstance(await single.identify(bare), Identified)


@pytest.mark.parametrize(
    "key",
    [jwk(SHORT, "a"), jwk(KEY, "a", use="enc"), jwk(KEY, "a", alg="PS256"),
     jwk(KEY, "a", key_ops=["encrypt"]), {"kty": "oct", "kid": "a", "k": "AAAA"}],
)  # fmt: skip
async def test_refuses_keys_that_are_short_or_for_something_else(
    one: Bench, tmp_path: Path, key: dict[str, Any]
) -> None:
    signer = SHORT if key == jwk(SHORT, "a") else KEY
    found = await made(one, provider(tmp_path, key)).identify(token(claims(), key=signer))
    assert found == "bad_token"


async def test_a_revoked_token_is_refused_at_once_by_every_process(
    one: Bench, tmp_path: Path
) -> None:
    first, second = made(one, provider(tmp_path)), made(one, provider(tmp_path))
    mine, other = token(claims()), token(claims(jti="t-2"))
    for where in (first, second):
        assert isinstance(await where.identify(mine), Identified)
    one.identity.directory.revocations.revoke(token_with_id(ISSUER, "t-1"), until=START + 300)
    for where in (first, second):
        assert await where.identify(mine) == "revoked"
        assert isinstance(await where.identify(other), Identified)


def _handed_in(one: Bench, tmp_path: Path, given: str) -> None:
    found = to_revoke(given, [provider(tmp_path)], now=one.clock.now)
    one.identity.directory.revocations.revoke(found.token, until=found.until)


@pytest.mark.parametrize("jti", [None, "t-1"])
async def test_a_token_that_is_handed_in_is_refused_and_no_other(
    one: Bench, tmp_path: Path, jti: str | None
) -> None:
    where = made(one, provider(tmp_path))
    mine, other = token(claims(jti=jti)), token(claims(jti=jti and "t-2", auth_time=START - 61))
    for each in (mine, other):
        assert isinstance(await where.identify(each), Identified)
    _handed_in(one, tmp_path, mine)
    assert await where.identify(mine) == "revoked"
    assert isinstance(await where.identify(other), Identified)


async def test_a_revoked_token_without_id_is_known_whatever_its_signature_looks_like(
    one: Bench, tmp_path: Path
) -> None:
    where = made(one, provider(tmp_path))
    # Each signature on a curve is another one, and all are good.
    first, second = (
        token(claims(jti=None), key=CURVE, algorithm="ES256", kid="c") for _ in range(2)
    )
    assert first != second
    for each in (first, second):
        assert isinstance(await where.identify(each), Identified)
    _handed_in(one, tmp_path, first)
    for each in (first, second):
        assert await where.identify(each) == "revoked"


async def test_all_tokens_of_a_subject_end_and_later_ones_count(one: Bench, tmp_path: Path) -> None:
    where = made(one, provider(tmp_path, leeway_s=10.0))
    one.clock.now = START + 5
    tokens_ = [
        token(claims(jti=jti, iat=START + at)) for jti, at in ((None, 0), ("t", 5), ("u", 9))
    ]
    other = token(claims(sub="u-2"))
    program = token(claims(sub=None, client_id="u-1", fhirUser=None))
    for each in (*tokens_, other, program):
        assert isinstance(await where.identify(each), Identified)
    settings_ = provider(tmp_path, leeway_s=10.0)
    one.identity.directory.revocations.revoke_subject(
        subject_of(ISSUER, "u-2"), until=last_expiry(settings_, now=one.clock.now)
    )
    assert await where.identify(other) == "revoked"
    assert isinstance(await where.identify(tokens_[0]), Identified)
    one.identity.directory.revocations.revoke_subject(
        subject_of(ISSUER, "u-1"), until=last_expiry(settings_, now=one.clock.now)
    )
    # The provider's clock may be ahead of ours: so is the last one.
    for each in (*tokens_, program):
        assert await where.identify(each) == "revoked"
    one.clock.now = START + 30
    assert isinstance(await where.identify(token(claims(iat=START + 26))), Identified)


async def test_a_subject_stays_revoked_for_as_long_as_its_tokens_would_be_taken(
    one: Bench, tmp_path: Path
) -> None:
    settings_ = provider(tmp_path, max_age_s=10_000.0)
    where = made(one, settings_)
    mine = token(claims(exp=START + 50_000))
    revocations = one.identity.directory.revocations
    revocations.revoke_subject(
        subject_of(ISSUER, "u-1"), until=last_expiry(settings_, now=one.clock.now)
    )
    one.clock.now -= 500
    revocations.revoke_subject(subject_of(ISSUER, "u-1"), until=one.clock.now)
    one.clock.now += 500
    one.clock.now += 9_999
    revocations.revoke_subject(subject_of(ISSUER, "u-3"), until=one.clock.now + 1)
    assert await where.identify(mine) == "revoked"
    # What was found right is remembered for a minute at most.
    one.clock.now += 62
    assert await where.identify(mine) == "expired_token"


@pytest.mark.parametrize("given", ["", "a.b.c", "not a token", token(claims(iss="https://x"))])
def test_what_no_provider_of_ours_can_have_issued_is_not_revoked(
    one: Bench, tmp_path: Path, given: str
) -> None:
    with pytest.raises(AccountError, match="token of a configured identity provider"):
        _handed_in(one, tmp_path, given)


async def test_a_remembered_token_still_expires(tokens: BearerTokens, one: Bench) -> None:
    short = token(claims(exp=START + 20))
    assert isinstance(await tokens.identify(short), Identified)
    one.clock.now += 19
    assert isinstance(await tokens.identify(short), Identified)
    one.clock.now += 1
    assert await tokens.identify(short) == "expired_token"


@given(place=st.integers(min_value=0, max_value=2_000), bit=st.integers(min_value=0, max_value=6))
@settings(max_examples=60, deadline=None, suppress_health_check=_SHARED)
async def test_a_flipped_bit_is_refused(tokens: BearerTokens, place: int, bit: int) -> None:
    right = token(claims())
    at = place % len(right)
    wrong = right[:at] + chr(ord(right[at]) ^ (1 << bit)) + right[at + 1 :]
    signature_end = len(right) - 1
    if at == signature_end or right.rindex(".") == at:
        return  # the last character of base64 has bits that mean nothing
    assert isinstance(await tokens.identify(wrong), str)


@given(st.text(max_size=200))
@settings(deadline=None, suppress_health_check=_SHARED)
async def test_anything_else_is_no_token(tokens: BearerTokens, text: str) -> None:
    assert await tokens.identify(text) == "bad_token"


# --- What claims mean -----------------------------------------------------------------------------


def who(**changes: Any) -> Identified | None:
    settings_ = IdentityProviderSettings(
        issuer=ISSUER, audience="havengate", fhir_bases=("https://ehr.example/r4/",)
    )
    return identified_by(claims(**changes), settings_, roles=frozenset(ROLES))


def test_a_clinician_does_not_become_the_patient_in_context() -> None:
    found = who(patient="3", scope="launch/patient patient/*.rs")
    assert found is not None
    assert (found.principal.patient, found.person) == (None, "Practitioner/7")
    bare = who(patient="3", fhirUser=None)
    assert bare is not None
    assert bare.principal.patient is None
    relative = who(patient="3", roles=[], fhirUser="RelatedPerson/9")
    assert relative is not None
    assert relative.principal.patient is None


def test_a_patient_is_known_by_fhir_user_or_context() -> None:
    for changes in ({"fhirUser": "Patient/3"}, {"fhirUser": None, "patient": "3"}):
        found = who(roles=[], **changes)
        assert found is not None
        assert (found.principal.patient, found.person) == ("3", "Patient/3")
        assert (found.purpose, found.role) == ("PATRQT", "patient")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (None, None),
        ("openid profile email", None),
        ("openid fhirUser launch/patient", frozenset()),
        ("openid launch", frozenset()),
        ("user/*.rs openid", frozenset({"user/*.rs"})),
        ("patient/Observation.r USER/x", frozenset({"patient/Observation.r", "USER/x"})),
    ],
)
def test_scopes_limit_as_soon_as_one_is_about_records(
    scope: str | None, expected: frozenset[str] | None
) -> None:
    found = who(scope=scope)
    assert found is not None
    assert found.principal.scopes == expected


def test_a_client_without_a_person_is_a_program_that_may_do_nothing() -> None:
    found = who(sub="portal", client_id="portal", azp=None, fhirUser=None, roles=["app"])
    assert found is not None
    assert (found.principal.kind, found.person) == ("service", "portal")
    assert found.principal.scopes == frozenset()
    assert found.principal.purposes == frozenset()
    odd = who(sub=None, client_id="My Client/é", fhirUser=None)
    assert odd is not None
    assert odd.person.startswith("client/")


def test_a_second_factor_without_a_time_counts_as_none() -> None:
    for changes in ({"auth_time": None}, {"auth_time": "now"}, {"amr": ["pwd"]}):
        found = who(**changes)
        assert found is not None
        assert found.principal.assurance.second_factor == "none"
    keyed = who(amr=["hwk", "pin"])
    assert keyed is not None
    assert keyed.principal.assurance.second_factor == "webauthn"


def test_roles_are_those_that_rules_know_or_that_are_mapped() -> None:
    plain = who(roles=["clinician", "emperor"])
    assert plain is not None
    assert plain.principal.roles == {"clinician"}
    mapped = identified_by(
        claims(realm_access={"roles": ["Arzt", "clinician"]}),
        IdentityProviderSettings(
            issuer=ISSUER,
            audience="https://ehr.example/r4",
            roles_claim="realm_access.roles",
            roles={"Arzt": "clinician", "Pflege": "nurse"},
        ),
        roles=frozenset(ROLES),
    )
    assert mapped is not None
    assert mapped.principal.roles == {"clinician"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["sub", "azp", "client_id", "fhirUser", "patient", "roles", "scope", "scp", "acr",
             "amr", "auth_time", "purpose_of_use"]
        ),
        _JSON,
    )
)  # fmt: skip
def test_no_claim_can_break_the_reading(changes: dict[str, Any]) -> None:
    found = who(**changes)
    assert found is None or found.principal.kind in {"user", "service"}


# --- Keys over HTTP -------------------------------------------------------------------------------


class _Provider(BaseHTTPRequestHandler):
    keys: tuple[dict[str, Any], ...] = ()
    calls = 0
    status = 200
    size = 0

    def do_GET(self) -> None:
        kind = type(self)
        kind.calls += 1
        body = json.dumps({"keys": kind.keys}).encode() + b" " * kind.size
        self.send_response(kind.status)
        if kind.status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def idp() -> Iterator[tuple[type[_Provider], str]]:
    class Provider(_Provider):
        keys = (jwk(KEY, "a"),)

    server = HTTPServer(("127.0.0.1", 0), Provider)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield Provider, f"http://127.0.0.1:{server.server_port}/jwks"
    server.shutdown()
    server.server_close()
    thread.join()


def _set(url: str, clock: Clock) -> KeySet:
    settings_ = IdentityProviderSettings(issuer=ISSUER, audience="x", jwks_url=url)
    return KeySet(settings_, clock=clock)


async def test_unknown_ids_do_not_make_the_gateway_call(idp: tuple[type[_Provider], str]) -> None:
    serving, url = idp
    clock = Clock()
    keys = _set(url, clock)
    assert await keys.find("a", "RS256") is not None
    for number in range(50):
        assert await keys.find(f"x{number}", "RS256") is None
    assert serving.calls == 1
    serving.keys = (jwk(OTHER, "b"),)
    clock.now += 31
    assert await keys.find("b", "RS256") is not None
    assert await keys.find("a", "RS256") is None
    assert serving.calls == 2


async def test_the_last_keys_count_for_an_hour_when_the_provider_is_down(
    idp: tuple[type[_Provider], str],
) -> None:
    serving, url = idp
    clock = Clock()
    keys = _set(url, clock)
    await keys.find("a", "RS256")
    serving.status = 500
    clock.now += 3_500
    assert await keys.find("a", "RS256") is not None
    clock.now += 200
    with pytest.raises(UnavailableError):
        await keys.find("a", "RS256")
    serving.status = 200
    clock.now += 31
    assert await keys.find("a", "RS256") is not None


@pytest.mark.parametrize(("status", "size"), [(302, 0), (404, 0), (200, 300_000)])
async def test_answers_that_are_no_key_set_are_not_followed(
    idp: tuple[type[_Provider], str], status: int, size: int
) -> None:
    serving, url = idp
    serving.status, serving.size = status, size
    with pytest.raises(UnavailableError):
        await _set(url, Clock()).find("a", "RS256")


@pytest.mark.parametrize(
    "url", ["", "http://idp.example/jwks", "ftp://127.0.0.1/", "https://", "https://u:p@idp.example",
            "file:///etc/passwd", "http://127.0.0.1.evil.example/"],
)  # fmt: skip
def test_keys_come_over_https_or_from_this_machine(url: str) -> None:
    with pytest.raises(GatewayConfigurationError):
        _set(url, Clock())
