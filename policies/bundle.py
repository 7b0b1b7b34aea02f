"""Rules read from folders, checked as a whole, and frozen: a bundle.

Lives here: which annotations a rule must have, what makes a set of files loadable, and the hash
that names it. Before: files (`*.cedar`) of the built-in packs and of the clinic. After:
`policies.engine` decides with a bundle, `policies.store` swaps one for another while requests run.

A bundle loads whole or not at all. Every refusal names file and line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

import cedarpy

from policies.errors import BundleError, PolicyConfigurationError
from policies.model import LABELS, REMEDIES, ROLES, RemedyKind
from policies.obligations import ExcludeFromCounts, Obligation, parse_obligations
from policies.scope import Reads, Scope, attributes_read, parse_scope
from policies.source import Statement, nesting, statements

BUILT_IN: Final = Path(__file__).with_name("packs")
SCHEMA_FILE: Final = BUILT_IN / "schema.cedarschema"
#: Bounds of a bundle: a decision is linear in the rules, and their text is parsed at once.
MAX_RULES: Final = 2_000
MAX_FILE_BYTES: Final = 1_000_000
# Cedar's parser descends into what is nested and ends the process when its stack is used up.
MAX_STATEMENT: Final = 16_384
MAX_BRACKETS: Final = 16
MAX_DEPTH: Final = 100

_ANNOTATIONS: Final = frozenset({"id", "title", "cites", "reason", "remedy", "grants", "note"})
# The form that an audit entry accepts as a rule id.
_ID = re.compile(r"(?!eyJ)[A-Za-z0-9]{1,24}(?:[._:/-][A-Za-z0-9]{1,24}){0,5}").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One policy with what its annotations say.

    `grants` is false for a permit that only adds obligations to what other rules allow. `reads` are
    the context attributes that its conditions look at; `None` means that it may look at all.
    `telling`: a forbid that looks at labels, confidentiality or consent; to hear that it denied
    says something about what is in the record.
    """

    id: str
    title: str
    cites: str
    effect: Literal["permit", "forbid"]
    grants: bool
    reason: str
    remedy: RemedyKind
    obligations: tuple[Obligation, ...]
    where: str
    text: str = field(repr=False)
    policy: Mapping[str, Any] = field(repr=False)
    scope: Scope = field(repr=False)
    reads: Reads | None = field(repr=False)
    telling: bool = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Rules that were checked against the schema, in the order of their files.

    `hash` is SHA-256 over all of it, in hexadecimal.
    """

    rules: tuple[Rule, ...]
    schema: str = field(repr=False)
    hash: str

    def without(self, rule_id: str) -> Bundle:
        """The same bundle less one rule: what explanations and tests compare with."""
        kept = tuple(rule for rule in self.rules if rule.id != rule_id)
        return Bundle(rules=kept, schema=self.schema, hash=f"{self.hash} without {rule_id}")


def load(directories: Sequence[Path] = (), *, roles: Iterable[str] = ()) -> Bundle:
    """Read the built-in packs and every `*.cedar` file below `directories`.

    Raises `BundleError` for the first rule that is not right, `PolicyConfigurationError` for a
    folder that cannot be read.
    """
    files = [*_files(BUILT_IN), *(file for folder in directories for file in _files(folder))]
    return parse_bundle(
        [(str(file), _read(file)) for file in files],
        schema=_read(SCHEMA_FILE),
        roles=(*ROLES, *roles),
    )


def parse_bundle(
    files: Sequence[tuple[str, str]], *, schema: str, roles: Iterable[str] = ROLES
) -> Bundle:
    """Build a bundle from texts and their names. Raises `BundleError`."""
    try:
        compiled = cedarpy.Schema.from_str(schema)
    except ValueError as error:
        raise BundleError("schema.cedarschema", f"is not a Cedar schema: {error}") from error
    known_roles = frozenset(roles)
    rules: list[Rule] = []
    places: dict[str, str] = {}
    digest = hashlib.sha256(schema.encode())
    for name, text in files:
        digest.update(f"\0{Path(name).name}\0".encode() + text.encode())
        for statement in statements(text):
            rule = _rule(statement, f"{name}:{statement.line}", compiled, known_roles)
            if rule.id in places:
                raise BundleError(
                    rule.where, f"@id “{rule.id}” is taken by {places[rule.id]}; give it another."
                )
            places[rule.id] = rule.where
            rules.append(rule)
    if not 0 < len(rules) <= MAX_RULES:
        raise BundleError("bundle", f"expected 1 to {MAX_RULES} rules, found {len(rules)}.")
    return Bundle(rules=tuple(rules), schema=schema, hash=digest.hexdigest())


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PolicyConfigurationError(
            f"There is no folder {folder}. Make it, or correct policies.directory."
        )
    return sorted(folder.rglob("*.cedar"))


def _read(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PolicyConfigurationError(f"Cannot read {file}: {error.strerror}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise BundleError(str(file), f"is larger than {MAX_FILE_BYTES} bytes; cut it in two.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BundleError(str(file), "is not UTF-8 text.") from error


def _rule(statement: Statement, where: str, schema: cedarpy.Schema, roles: frozenset[str]) -> Rule:
    policy = _parse(statement, where)
    annotations = cast("dict[str, str | None]", policy.get("annotations", {}))
    texts = {name: value or "" for name, value in annotations.items()}
    _check_annotations(texts, policy["effect"], where)
    _check_schema(statement, where, schema)
    _check_roles(policy, where, roles)
    try:
        obligations = parse_obligations(texts)
    except ValueError as error:
        raise BundleError(where, f"{error}.") from error
    _check_obligations(obligations, policy["effect"], where)
    return Rule(
        id=texts["id"],
        title=texts["title"],
        cites=texts["cites"],
        effect=policy["effect"],
        grants=policy["effect"] == "permit" and "grants" not in texts,
        reason=texts.get("reason", ""),
        remedy=cast("RemedyKind", texts.get("remedy", "administrator")),
        obligations=obligations,
        where=where,
        text=statement.text,
        policy=policy,
        scope=parse_scope(policy),
        reads=attributes_read(policy),
        telling=policy["effect"] == "forbid" and _looks_inside(policy),
    )


def _looks_inside(policy: Mapping[str, Any]) -> bool:
    """Whether anything in a policy depends on what is in the record or was consented to."""
    stack: list[object] = [policy]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if node.get("type") in {"Label", "Confidentiality"} or node.get("attr") == "consent":
                return True
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return False


def _parse(statement: Statement, where: str) -> dict[str, Any]:
    if len(statement.text) > MAX_STATEMENT or nesting(statement.text) > MAX_BRACKETS:
        raise BundleError(
            where,
            f"expected at most {MAX_STATEMENT} characters and {MAX_BRACKETS} brackets in each "
            "other; cut the rule in two.",
        )
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(statement.text))
    except (ValueError, RecursionError) as error:
        raise BundleError(where, f"is not Cedar: {error}.") from error
    policies = list(parsed["staticPolicies"].values())
    if len(policies) != 1 or parsed["templates"]:
        raise BundleError(where, "expected one policy without slots (?principal, ?resource).")
    if _depth(policies[0]) > MAX_DEPTH:
        raise BundleError(where, "its condition is nested too deep or too long; cut it in two.")
    return cast("dict[str, Any]", policies[0])


def _depth(policy: object) -> int:
    deepest = 0
    stack: list[tuple[object, int]] = [(policy, 1)]
    while stack:
        node, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(node, dict):
            node = list(node.values())
        if isinstance(node, list):
            stack += [(child, depth + 1) for child in node]
    return deepest


def _check_annotations(texts: Mapping[str, str], effect: str, where: str) -> None:
    for name in texts:
        if name not in _ANNOTATIONS and not name.startswith("obligation_"):
            near = difflib.get_close_matches(name, _ANNOTATIONS | {"obligation_redact"}, n=1)
            hint = f" Did you mean “@{near[0]}”?" if near else ""
            raise BundleError(where, f"unknown annotation “@{name}”.{hint}")
    needed = ["id", "title", "cites"] + (["reason", "remedy"] if effect == "forbid" else [])
    for name in needed:
        if not texts.get(name):
            raise BundleError(where, f'a {effect} rule needs @{name}("…").')
    if not _ID(texts["id"]):
        raise BundleError(
            where, "@id must be words of letters or digits joined by one of . _ : / -, at most six."
        )
    if effect == "forbid" and texts["remedy"] not in REMEDIES:
        raise BundleError(where, f"@remedy must be one of {', '.join(REMEDIES)}.")
    if "grants" in texts and (texts["grants"] != "nothing" or effect == "forbid"):
        raise BundleError(where, '@grants("nothing") is all that it can say, and on a permit.')


def _check_schema(statement: Statement, where: str, schema: cedarpy.Schema) -> None:
    result = cedarpy.validate_policies(statement.text, schema)
    if not result.validation_passed:
        problems = sorted(
            {error.error.replace("for policy `policy0`, ", "") for error in result.errors}
        )
        raise BundleError(where, f"does not fit the schema: {problems[0]}.")


def _check_roles(policy: Mapping[str, Any], where: str, roles: frozenset[str]) -> None:
    for role in sorted(_role_names(policy)):
        if role not in roles:
            near = difflib.get_close_matches(role, roles, n=1)
            hint = f"did you mean “{near[0]}”?" if near else "name it in policies.roles."
            raise BundleError(where, f"there is no role “{role}”; {hint}")


def _role_names(node: object) -> set[str]:
    """Ids of all Role entities named anywhere in a policy's JSON form."""
    found: set[str] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if item.get("type") == "Role" and isinstance(item.get("id"), str):
                found.add(item["id"])
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return found


def _check_obligations(obligations: Iterable[Obligation], effect: str, where: str) -> None:
    for obligation in obligations:
        if effect == "forbid":
            raise BundleError(where, "a forbid rule has no obligations: nothing is released.")
        if isinstance(obligation, ExcludeFromCounts) and not obligation.labels <= set(LABELS):
            raise BundleError(where, f"labels are {', '.join(LABELS)}.")
