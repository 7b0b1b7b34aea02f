"""A clinical value passes as it was written, in both directions, sealed or not."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core.messages import RequestHead
from gateway.settings import FieldSettings
from tests.gateway.core.world import World
from tests.gateway.fhir.clinic import Clinic

NUMERALS = ["1.10", "100.00", "-0.0", "1e-7", "0.000010", "123456789012345678901234567890", "7.0"]
FHIR = "application/fhir+json"


def observation(number: str) -> bytes:
    return (
        '{"resourceType":"Observation","id":"o1","status":"final","code":{"text":"dose"},'
        '"subject":{"reference":"Patient/p1"},"valueQuantity":{"value":' + number + "},"
        '"component":[{"code":{"text":"a"},"valueQuantity":{"value":' + number + "}}]}"
    ).encode()


class Raw:
    """An app that keeps a body as it comes, byte by byte."""

    def __init__(self, kept: bytes) -> None:
        self.kept = kept

    def __call__(self, head: RequestHead, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {"content-type": FHIR, "etag": 'W/"1"'}
        if head.method in {"POST", "PUT"}:
            self.kept = body
            return 201 if head.method == "POST" else 200, headers, body
        if head.path.endswith("/o1"):
            return 200, headers, self.kept
        entry = b'{"fullUrl":"http://127.0.0.1:9/Observation/o1","resource":' + self.kept + b"}"
        bundle = b'{"resourceType":"Bundle","type":"searchset","total":1,"entry":[' + entry + b"]}"
        return 200, headers, bundle


def clinic(number: str, *fields: FieldSettings, **more: Any) -> tuple[Clinic, Raw]:
    app = Raw(observation(number))
    return Clinic(app, fields=fields, world=World(), **more), app


@pytest.mark.parametrize("number", NUMERALS)
def test_a_value_is_read_as_it_was_written(number: str) -> None:
    here, _ = clinic(number)
    for target in ("/Observation/o1", "/Observation?patient=p1"):
        answer = here.get(target)
        assert answer.status == 200
        assert answer.body.count(b'"value":' + number.encode() + b"}") == 2


@pytest.mark.parametrize("number", NUMERALS)
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_value_is_written_as_it_was_sent(number: str, method: str) -> None:
    here, app = clinic("5.5")
    target = "/Observation" if method == "POST" else "/Observation/o1"
    answer = here.ask(method, target, raw=observation(number), content_type=FHIR)
    assert answer.status in {200, 201}
    assert app.kept.count(b'"value":' + number.encode() + b"}") == 2


@pytest.mark.parametrize("number", NUMERALS)
def test_a_value_in_a_bundle_is_written_as_it_was_sent(number: str) -> None:
    here, app = clinic("5.5")
    entry = (
        b'{"request":{"method":"PUT","url":"Observation/o1"},"resource":'
        + observation(number)
        + b"}"
    )
    bundle = b'{"resourceType":"Bundle","type":"batch","entry":[' + entry + b"]}"
    answer = here.ask("POST", "/", raw=bundle, content_type=FHIR)
    assert answer.status == 200
    assert app.kept.count(b'"value":' + number.encode() + b"}") == 2


@pytest.mark.parametrize("number", NUMERALS)
@pytest.mark.parametrize("path", ["Observation.value", "Observation.value.value"])
def test_a_sealed_value_opens_as_it_was_written(number: str, path: str) -> None:
    sealed = FieldSettings(path=path, seal=True)
    here, app = clinic("5.5", sealed)
    answer = here.ask("PUT", "/Observation/o1", raw=observation(number), content_type=FHIR)
    assert answer.status == 200
    assert app.kept.count(number.encode()) == 1
    shown = here.get("/Observation/o1")
    assert shown.body.count(b'"value":' + number.encode() + b"}") == 2


@pytest.mark.parametrize("fields", [(), (FieldSettings(path="Observation.code.text", seal=True),)])
def test_what_was_read_before_does_not_stand_for_another_writing_of_the_number(
    fields: tuple[FieldSettings, ...],
) -> None:
    here, app = clinic("5.5", *fields)
    assert here.ask("PUT", "/Observation/o1", raw=app.kept, content_type=FHIR).status == 200
    for number in (b"5.5", b"5.50", b"5.5", b"5.500", b"1e1"):
        before = app.kept.partition(b'"value":')[2].partition(b"}")[0]
        app.kept = app.kept.replace(b'"value":' + before, b'"value":' + number)
        for target in ("/Observation/o1", "/Observation?patient=p1") * 3:
            answer = here.get(target)
            assert answer.body.count(b'"value":' + number + b"}") == 2
