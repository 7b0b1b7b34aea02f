"""A clinic in memory: a small FHIR app that knows nothing of the gateway, and the gateway in front.

The app keeps versions, pages its answers, follows `_include` and `_revinclude`, and believes
everybody. The gateway is the real one: core, handler, rules; keys are in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson

from gateway.core.exchange import Site
from gateway.core.messages import RequestHead
from gateway.fhir.handler import FHIRHandler
from gateway.fhir.links import Pager
from gateway.identity.model import Identified
from gateway.routes import compile_routes
from gateway.settings import FieldSettings, LimitSettings, RouteSettings
from policies.store import InForce
from tests.gateway.core.world import NOW, World, clinician, in_force, request
from tests.gateway.fhir.sealers import MemorySealer

__all__ = ["NOW", "Answer", "Clinic", "FHIRApp", "clinician"]

type Json = dict[str, Any]
type Given = tuple[int, dict[str, str], bytes]

FHIR = {"content-type": "application/fhir+json"}
APP = "http://127.0.0.1:9/fhir"
PSYNOTE = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "PSYTHPN"}
SUBSTANCE = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "42CFRPart2"}


class FHIRApp:
    """Versions of resources by type and id; None stands for a deletion."""

    def __init__(self, resources: Iterable[Json] = (), *, page: int = 1_000) -> None:
        self.kept: dict[tuple[str, str], list[Json | None]] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.bodies: list[bytes] = []
        self.page = page
        self.fresh = 0
        for one in resources:
            self.store(one)

    def store(self, resource: Json) -> Json:
        versions = self.kept.setdefault((resource["resourceType"], resource["id"]), [])
        meta = {**resource.get("meta", {}), "versionId": str(len(versions) + 1)}
        kept = {**copy.deepcopy(resource), "meta": meta}
        versions.append(kept)
        return kept

    def now(self, kind: str, one: str) -> Json | None:
        return self.kept.get((kind, one), [None])[-1]

    def __call__(  # noqa: C901, PLR0911, PLR0912 - one table
        self, head: RequestHead, body: bytes
    ) -> Given:
        self.requests.append((head.method, head.path, head.query))
        self.bodies.append(body)
        for name in ("if-none-match", "if-modified-since", "if-none-exist"):
            assert head.method != "GET" or head.headers.get(name) is None
        path = head.path.removeprefix("/fhir").strip("/")
        parts = path.split("/") if path else []
        pairs = parse_qsl(head.query, keep_blank_values=True)
        if parts[-1:] == ["_search"]:
            return self._search(parts[:-1], parse_qsl(body.decode(), keep_blank_values=True))
        match head.method, parts:
            case "GET", ["metadata"]:
                return self._ok({"resourceType": "CapabilityStatement", "status": "active"})
            case "POST", []:
                return self._transaction(orjson.loads(body))
            case "GET", [] | [_]:
                return self._search(parts, pairs)
            case "GET", ["Patient", one, "$everything"]:
                return self._search([], [("everything", one), *pairs])
            case "GET", ["Patient", _, kind] if kind[0].isupper():
                return self._search(parts, pairs)
            case "GET", [kind, "_history"]:
                return self._history(kind, None, pairs)
            case "GET", [kind, one]:
                return self._read(kind, one, None)
            case "GET", [kind, one, "_history"]:
                return self._history(kind, one, pairs)
            case "GET", [kind, one, "_history", version]:
                return self._read(kind, one, int(version))
            case "POST", [kind, "$validate"]:
                return self._ok({"resourceType": "OperationOutcome", "issue": []})
            case "POST", [kind]:
                self.fresh += 1
                return self._put(kind, f"new-{self.fresh}", head, orjson.loads(body))
            case "PUT", [kind, one]:
                return self._put(kind, one, head, orjson.loads(body))
            case "DELETE", [kind, one]:
                self.kept[kind, one].append(None)
                return 204, {}, b""
        return 400, FHIR, orjson.dumps({"resourceType": "OperationOutcome", "issue": []})

    def _ok(self, content: Json, status: int = 200, **headers: str) -> Given:
        return status, FHIR | headers, orjson.dumps(content)

    def _read(self, kind: str, one: str, version: int | None) -> Given:
        versions = self.kept.get((kind, one), [])
        found = versions[(version or len(versions)) - 1] if versions else None
        if found is None:
            text = f"{kind}/{one} is not here, said the app"
            gone = {"resourceType": "OperationOutcome", "issue": [{"diagnostics": text}]}
            return self._ok(gone, 410 if versions else 404)
        number = found["meta"]["versionId"]
        return self._ok(found, etag=f'W/"{number}"')

    def _put(self, kind: str, one: str, head: RequestHead, content: Json) -> Given:
        before = self.now(kind, one)
        wanted = head.headers.get("if-match")
        is_now = f'W/"{before["meta"]["versionId"]}"' if before else wanted
        if wanted not in {None, is_now}:
            return self._ok({"resourceType": "OperationOutcome", "issue": []}, 412)
        kept = self.store({**content, "id": one})
        number = kept["meta"]["versionId"]
        location = f"{APP}/{kind}/{one}/_history/{number}"
        status = 201 if before is None else 200
        return self._ok(kept, status, etag=f'W/"{number}"', location=location)

    def _transaction(self, bundle: Json) -> Given:
        entries = []
        for entry in bundle["entry"]:
            kind, _, one = entry["request"]["url"].partition("/")
            if entry["request"]["method"] == "DELETE":
                self.kept[kind, one].append(None)
                entries.append({"response": {"status": "204"}})
                continue
            self.fresh += 1
            kept = self.store({**entry["resource"], "id": one or f"new-{self.fresh}"})
            location = f"{kind}/{kept['id']}/_history/{kept['meta']['versionId']}"
            answer = {"status": "201 Created", "location": location, "etag": 'W/"1"'}
            entries.append({"resource": kept, "response": answer})
        return self._ok(
            {"resourceType": "Bundle", "type": "transaction-response", "entry": entries}
        )

    # --- Searching --------------------------------------------------------------------------------

    def _search(self, parts: list[str], pairs: list[tuple[str, str]]) -> Given:
        asked = dict(pairs)
        kind = parts[-1] if parts else ""
        found = [v[-1] for (t, _), v in self.kept.items() if t == (kind or t)]
        rest = [one for one in found if one is not None]
        if len(parts) == 3:
            rest = [one for one in rest if _patient(one) == parts[1]]
        if "everything" in asked:
            rest = [one for one in rest if asked["everything"] in {_patient(one), one["id"]}]
        for name, value in pairs:
            rest = [one for one in rest if _fits(one, name, value)]
        if "_sort" in asked:
            rest.sort(key=lambda one: (_text(one, asked["_sort"].lstrip("-")), one["id"]))
        return self._paged("searchset", [_hit(one) for one in rest], parts, pairs)

    def _history(self, kind: str, one: str | None, pairs: list[tuple[str, str]]) -> Given:
        entries: list[Json] = []
        for (of_type, its_id), versions in self.kept.items():
            if of_type != kind or one not in {None, its_id}:
                continue
            for version in reversed(versions):
                request = {"method": "PUT", "url": f"{kind}/{its_id}"}
                if version is None:
                    entries.append({"request": request | {"method": "DELETE"}})
                else:
                    url = f"{APP}/{kind}/{its_id}"
                    entries.append({"fullUrl": url, "resource": version, "request": request})
        if one is not None and not entries:
            return self._ok({"resourceType": "OperationOutcome", "issue": []}, 404)
        parts = [kind, one, "_history"] if one else [kind, "_history"]
        return self._paged("history", entries, parts, pairs)

    def _paged(
        self, kind: str, entries: list[Json], parts: list[str], pairs: list[tuple[str, str]]
    ) -> Given:
        asked = dict(pairs)
        size = min(int(asked.get("_count", 20)), self.page)
        offset = int(asked.get("offset", 0))
        here = entries[offset : offset + size]
        bundle: Json = {
            "resourceType": "Bundle", "id": "b1", "type": kind, "total": len(entries),
            "link": [{"relation": "self", "url": f"{APP}/?everything"}],
            "entry": here + (self._included(here, pairs) if kind == "searchset" else []),
        }  # fmt: skip
        if offset + size < len(entries):
            more = [pair for pair in pairs if pair[0] != "offset"]
            query = urlencode([*more, ("offset", str(offset + size))])
            url = f"{APP}/{'/'.join(parts)}?{query}"
            bundle["link"].append({"relation": "next", "url": url})
        return self._ok(bundle, etag=f'W/"{len(entries)}"')

    def _included(self, here: list[Json], pairs: list[tuple[str, str]]) -> list[Json]:
        found: dict[tuple[str, str], Json] = {}
        for name, _ in pairs:
            for entry in here:
                one = entry["resource"]
                patient = self.now("Patient", _patient(one) or "")
                if name == "_include" and patient:
                    found["Patient", patient["id"]] = patient
                if name == "_revinclude":
                    for (kind, its_id), versions in self.kept.items():
                        other = versions[-1]
                        if kind == "Observation" and other and _patient(other) == one["id"]:
                            found[kind, its_id] = other
        return [_hit(one, "include") for one in found.values()]


def _hit(one: Json, mode: str = "match") -> Json:
    url = f"{APP}/{one['resourceType']}/{one['id']}"
    return {"fullUrl": url, "resource": one, "search": {"mode": mode, "score": 0.5}}


def _patient(one: Json) -> str | None:
    if one["resourceType"] == "Patient":
        return str(one["id"])
    reference = (one.get("subject") or one.get("patient") or {}).get("reference", "")
    return reference.rpartition("/")[2] or None


def _text(one: Json, parameter: str) -> str:
    match parameter:
        case "value-string":
            return str(one.get("valueString", ""))
        case "code":
            return str(one.get("code", {}).get("coding", [{}])[0].get("code", ""))
        case "family":
            return str(one.get("name", [{}])[0].get("family", ""))
        case _:
            return str(one.get(parameter, ""))


def _fits(one: Json, name: str, value: str) -> bool:
    values = value.split(",")
    match name:
        case "_id":
            return one["id"] in values
        case "patient" | "subject" | "subject:Patient":
            return _patient(one) in {each.rpartition("/")[2] for each in values}
        case "_tag":
            tags = one["meta"].get("tag", [])
            return any(f"{tag['system']}|{tag['code']}" in values for tag in tags)
        case "code" | "family" | "value-string" | "status":
            return _text(one, name) in values
    return True


@dataclass
class Answer:
    """What a client sees."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def ids(self) -> list[str]:
        """Of the resources in a Bundle."""
        return [e["resource"]["id"] for e in self.json.get("entry", []) if "id" in e["resource"]]

    def link(self, relation: str) -> str | None:
        links = {one["relation"]: one["url"] for one in self.json.get("link", [])}
        found: str | None = links.get(relation)
        return found


@dataclass
class Clinic:
    """An app, the gateway before it, and who asks."""

    app: Callable[[RequestHead, bytes], Given]
    who: Identified = field(default_factory=clinician)
    team: frozenset[str] = frozenset({"p1", "p2"})
    fields: tuple[FieldSettings, ...] = ()
    limits: LimitSettings = field(default_factory=LimitSettings)
    consents: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=lambda: ["chosen-1", "chosen-2"])
    sealer: MemorySealer = field(default_factory=lambda: MemorySealer(lacking=True))
    world: World = field(default_factory=World)
    rules: Callable[[], InForce] = in_force

    def __post_init__(self) -> None:
        settings = RouteSettings(
            name="ehr", kind="ehr", upstream="http://127.0.0.1:9", path="/fhir", content="fhir",
            fields=self.fields,
        )  # fmt: skip
        pager = Pager(b"k" * 32)
        handler = FHIRHandler(settings, pager=pager, new_id=lambda: self.ids.pop(0))
        self.site = Site(
            tenant="clinic",
            routes=compile_routes([settings]),
            handlers={"ehr": handler},
            in_force=self.rules,
            sealer=self.sealer,
            limits=self.limits,
            strip=lambda headers: headers,
            clock=lambda: NOW,
        )

    def ask(
        self, method: str, target: str, content: Any = None, *, raw: bytes = b"", **headers: Any
    ) -> Answer:
        body = raw if content is None else orjson.dumps(content)
        if content is not None:
            headers.setdefault("content_type", "application/fhir+json")
        if body or method in {"POST", "PUT", "PATCH"}:
            headers.setdefault("content_length", str(len(body)))
        target = target.removeprefix("https://gateway.test")
        target = target if target.startswith("/fhir") else f"/fhir{target}"
        self.world = World(
            who=self.who, care_team=self.team, consents=self.consents, app=self.app, body=[body]
        )
        self.world.run(request(method, target, **headers), self.site)
        head = self.world.heads[-1]
        return Answer(head.status, dict(head.headers), bytes(self.world.sent))

    def get(self, target: str, **headers: Any) -> Answer:
        return self.ask("GET", target, **headers)

    def as_(self, who: Identified) -> Clinic:
        return replace(self, who=who)


def patient(one: str, **more: Any) -> Json:
    return {"resourceType": "Patient", "id": one, "name": [{"family": f"Family-{one}"}], **more}


def observation(one: str, of: str, code: str = "a", **more: Any) -> Json:
    return {
        "resourceType": "Observation",
        "id": one,
        "status": "final",
        "code": {"coding": [{"system": "http://example.org", "code": code}]},
        "subject": {"reference": f"Patient/{of}"},
        **more,
    }


def note(one: str, of: str, by: str = "Practitioner/2", label: Json = PSYNOTE) -> Json:
    return {
        "resourceType": "DocumentReference",
        "id": one,
        "status": "current",
        "meta": {"security": [label]},
        "subject": {"reference": f"Patient/{of}"},
        "author": [{"reference": by}],
        "content": [{"attachment": {"data": "c2VjcmV0"}}],
    }
