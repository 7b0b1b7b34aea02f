"""Decides: Cedar over a checked bundle, and every way in which that can go wrong is a denial.

Before: `policies.bundle` (checked rules), `policies.facts` (a request as Cedar sees it). After: the
gateway carries out the obligations. Nothing here does I/O. Whatever is kept between requests is
made from the bundle and from equal requests only, so that it can be thrown away at any time;
threads may share an engine.

What Cedar does not do by itself is done here (see DESIGN.md):
- A forbid whose condition errors is skipped by Cedar and the answer may be Allow: any error in the
  diagnostics denies.
- Permits that only add obligations never allow.
- An obligation that the enforcing point cannot carry out denies.
- Evaluation cannot be interrupted. Cedar has no loops, so its time is bounded by the number of
  rules and the size of a request, and both have limits; an answer that still took longer than
  `deadline_s` is thrown away.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import cedarpy
import msgspec

from policies import facts
from policies.bundle import Bundle, Rule
from policies.model import Allowed, Decision, Denied, Remedy, RemedyKind, Request
from policies.obligations import ALL, StepUp, join
from policies.scope import Path, Reads, Scope

#: Most parsed sets of rules, kinds of request and answers for one kind that are kept.
MAX_SETS: Final = 512
MAX_PREPARED: Final = 8_192
MAX_ANSWERS: Final = 8

_NOTHING_ALLOWS: Final = Denied(
    reason="No rule allows this.", rules=(), remedy=Remedy(kind="administrator")
)
_NO_CONTEXT: Final = b"{}"
_encode = msgspec.json.Encoder().encode

# The wrapper around these copies each request and parses each answer into dictionaries.
_evaluate: Final = cedarpy._internal.is_authorized_batch  # noqa: SLF001 - the same, uncopied
_entities: Final = cedarpy._internal.Entities.from_json_str  # noqa: SLF001 - what it takes


class _Diagnostics(msgspec.Struct):
    reason: list[str]
    errors: list[str]


class _Answer(msgspec.Struct):
    decision: Literal["Allow", "Deny"]
    diagnostics: _Diagnostics


_decode = msgspec.json.Decoder(_Answer).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The rules that a kind of request can match, parsed, and the context attributes they read."""

    policies: cedarpy.PolicySet
    reads: Reads | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What Cedar's answer comes to, before the age of the second factor is looked at."""

    decision: Decision
    step_up: StepUp | None = None
    asked_by: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What requests of one kind have in common: their rules and their parsed entities.

    `verdicts` by the text of the context as far as those rules read it.
    """

    part: _Part
    mask: int
    entities: Any
    request: Mapping[str, object]
    verdicts: OrderedDict[bytes, _Verdict]


class Engine:
    """Answers requests from one bundle.

    `deadline_s` is the longest that an answer may take to be used, in CPU time of the thread: a
    machine that stands still is the gateway's to notice, a rule that eats time is noticed here.
    `keep_answers`: an equal question is not asked again. `whole` evaluates every rule
    with the whole context for every request and keeps no answer: slow, and the reference that the
    fast way is tested against.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        deadline_s: float = 1.0,
        clock: Callable[[], float] = time.thread_time,
        whole: bool = False,
        keep_answers: bool = True,
    ) -> None:
        self.bundle = bundle
        self._deadline_s = deadline_s
        self._clock = clock
        self._whole = whole
        self._keep_answers = keep_answers and not whole
        self._rules = bundle.rules
        self._everything = (1 << len(bundle.rules)) - 1
        self._telling = sum(1 << place for place, one in enumerate(bundle.rules) if one.telling)
        self._masks: dict[tuple[str, object], int] = {}
        self._parts: OrderedDict[int, _Part] = OrderedDict()
        self._prepared: OrderedDict[facts.EntityKey, _Prepared] = OrderedDict()
        self._index()
        self._part(self._everything)

    @property
    def reads_ids(self) -> bool:
        """Whether any rule looks at the id of a single record: if none does, equals are equal."""
        reads = self._part(self._everything).reads
        return reads is None or "id" in reads.values or "id" in reads.presence

    def decide(self, request: Request, *, enforceable: Collection[type] = ALL) -> Decision:
        """Answer one request. Raises only to end the process: what goes wrong is a denial.

        `enforceable`: the kinds of obligations that the caller can carry out.
        """
        started = self._clock()
        try:
            decision = self._decide(request, enforceable)
        except (KeyboardInterrupt, SystemExit):
            raise
        # A panic of the rules engine is no `Exception`.
        except BaseException as error:  # noqa: BLE001 - whatever went wrong, the answer is no
            return _failed(f"policies.{type(error).__name__}", "The rules could not be evaluated.")
        if self._clock() - started > self._deadline_s:
            return _failed("policies.late", "The rules took too long.")
        return decision

    def _decide(self, request: Request, enforceable: Collection[type]) -> Decision:
        too_large = facts.oversized(request)
        if too_large is not None:
            return _failed("policies.oversized", f"In this request {too_large} is too large.")
        unknown = facts.unknown_word(request)
        if unknown is not None:
            return _failed("policies.unknown_word", f"This request has {unknown} nobody knows.")
        verdict = self._ask(request)
        decision = verdict.decision
        if isinstance(decision, Denied):
            return decision
        if not all(type(one) in enforceable for one in decision.obligations):
            return _failed(
                "policies.unenforceable", "What this access requires cannot be done here."
            )
        if verdict.step_up is None:
            return decision
        return _stepped_up(verdict, decision, facts.second_factor_age_s(request))

    def _ask(self, request: Request) -> _Verdict:
        key = facts.entity_key(request)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepare(request)
            _keep(self._prepared, key, prepared, MAX_PREPARED)
        context = self._context(request, prepared.part.reads)
        verdict = prepared.verdicts.get(context)
        if verdict is None:
            verdict = self._evaluated(prepared, context)
            if self._keep_answers:
                _keep(prepared.verdicts, context, verdict, MAX_ANSWERS)
        return verdict

    def _context(self, request: Request, reads: Reads | None) -> bytes:
        """The context as JSON, as far as the rules read it."""
        whole = facts.circumstances(request)
        if reads is None or self._whole:
            return _encode(whole)
        read: dict[str, Any] = {name: whole[name] for name in reads.values if name in whole}
        # Nobody looks at the value, so the same one for all keeps answers usable for longer.
        read |= {name: True for name in reads.presence if name in whole}
        return _encode(read)

    def _evaluated(self, prepared: _Prepared, context: bytes) -> _Verdict:
        verdict, rules = self._answered(prepared, prepared.part, context)
        if not isinstance(verdict.decision, Denied) or not any(rule.telling for rule in rules):
            return verdict
        # Who would be denied the record if nothing special were in it hears that answer, and learns
        # nothing of what is in it.
        plain = self._part(prepared.mask & ~self._telling)
        told, _ = self._answered(prepared, plain, context)
        if not isinstance(told.decision, Denied) or told.decision.failure:
            return verdict
        return _Verdict(decision=replace(told.decision, rules=verdict.decision.rules))

    def _answered(
        self, prepared: _Prepared, part: _Part, context: bytes
    ) -> tuple[_Verdict, list[Rule]]:
        asked = dict(prepared.request)
        if context != _NO_CONTEXT:
            asked["context"] = context.decode()
        texts = _evaluate([asked], part.policies, prepared.entities, None, False)
        answer = _decode(texts[0])
        if answer.diagnostics.errors:
            failed = _failed("policies.evaluation_failed", "A rule could not be evaluated.")
            return _Verdict(decision=failed), []
        rules = [self._rules[int(place)] for place in answer.diagnostics.reason]
        return (_allowed(rules) if answer.decision == "Allow" else _denied(rules)), rules

    def _prepare(self, request: Request) -> _Prepared:
        principal, resource = facts.principal_uid(request), facts.resource_uid(request)
        entities = facts.entities(request)
        mask = self._everything if self._whole else self._applicable(request, entities)
        return _Prepared(
            part=self._part(mask),
            mask=mask,
            entities=_entities(_encode(entities).decode()),
            request={
                "principal": {"type": principal[0], "id": principal[1]},
                "action": {"type": "Action", "id": request.action},
                "resource": {"type": resource[0], "id": resource[1]},
            },
            verdicts=OrderedDict(),
        )

    # --- which rules can match -------------------------------------------------------------------

    def _index(self) -> None:
        """One bit per rule: which rules each action, purpose, type and group leaves open."""
        for place, rule in enumerate(self._rules):
            bit, scope = 1 << place, rule.scope
            self._mark("action", scope.actions, bit)
            self._mark("purpose", scope.purposes, bit)
            self._mark("principal", [(scope.principal_type, scope.principal_in)], bit)
            self._mark("resource", [(scope.resource_type, scope.resource_in)], bit)

    def _mark(self, kind: str, keys: Collection[object] | None, bit: int) -> None:
        for key in (None,) if keys is None else keys:
            self._masks[kind, key] = self._masks.get((kind, key), 0) | bit

    def _applicable(self, request: Request, entities: list[dict[str, Any]]) -> int:
        """Bits of the rules that this request can match (`policies.scope` says why)."""
        roles = () if request.principal.kind == "anonymous" else request.principal.roles
        groups = facts.resource_parents(request.resource)
        found = (
            self._open_for("action", request.action)
            & self._open_for("purpose", request.context.purpose)
            & self._open_to(
                "principal", facts.principal_uid(request)[0], [("Role", role) for role in roles]
            )
            & self._open_to("resource", facts.resource_uid(request)[0], groups)
        )
        mine = frozenset(groups)
        attributes = {"principal": entities[0]["attrs"], "resource": entities[1]["attrs"]}
        for place, rule in enumerate(self._rules):
            if _ruled_out(rule.scope, mine, attributes):
                found &= ~(1 << place)
        return found

    def _open_for(self, kind: str, key: str) -> int:
        return self._masks.get((kind, None), 0) | self._masks.get((kind, key), 0)

    def _open_to(self, kind: str, entity_type: str, groups: list[tuple[str, str]]) -> int:
        masks = self._masks.get
        found = 0
        for group in (None, *groups):
            found |= masks((kind, (None, group)), 0) | masks((kind, (entity_type, group)), 0)
        return found

    def _part(self, mask: int) -> _Part:
        part = self._parts.get(mask)
        if part is None:
            part = self._parse(mask)
            _keep(self._parts, mask, part, MAX_SETS)
        return part

    def _parse(self, mask: int) -> _Part:
        chosen = {place: rule for place, rule in enumerate(self._rules) if mask >> place & 1}
        # Policies are named by their place, so that an answer leads back to the rule at once.
        policies = {str(place): rule.policy for place, rule in chosen.items()}
        text = json.dumps({"staticPolicies": policies, "templates": {}, "templateLinks": []})
        return _Part(
            policies=cedarpy.PolicySet.from_json_str(text),
            reads=_all_reads([rule.reads for rule in chosen.values()]),
        )


def _all_reads(reads: Iterable[Reads | None]) -> Reads | None:
    values: frozenset[str] = frozenset()
    presence: frozenset[str] = frozenset()
    for one in reads:
        if one is None:
            return None
        values |= one.values
        presence |= one.presence
    return Reads(values=values, presence=presence - values)


def _ruled_out(
    scope: Scope, groups: frozenset[tuple[str, str]], attributes: Mapping[str, Any]
) -> bool:
    """True only if it is clear that the conditions do not hold: the rest is left to Cedar."""
    return (
        any(groups.isdisjoint(one) for one in scope.resource_any)
        or any(_value(attributes, path) is False for path in scope.holds)
        or any(_value(attributes, path) is True for path in scope.holds_not)
    )


def _value(attributes: Mapping[str, Any], path: Path) -> object:
    value: Any = attributes
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _keep[K, V](cache: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    """Keep a value; when there are too many, the oldest goes."""
    cache[key] = value
    if len(cache) > limit:
        cache.popitem(last=False)


def _allowed(rules: list[Rule]) -> _Verdict:
    if not any(rule.grants for rule in rules):
        return _Verdict(decision=_NOTHING_ALLOWS)
    obligations = join(one for rule in rules for one in rule.obligations)
    return _Verdict(
        decision=Allowed(obligations=obligations, rules=_ids(rules)),
        step_up=next((one for one in obligations if isinstance(one, StepUp)), None),
        asked_by=tuple(rules),
    )


def _stepped_up(verdict: _Verdict, decision: Allowed, age_s: int | None) -> Decision:
    """The decision, if the second factor is fresh enough for every rule that asks for it."""
    too_old = [
        rule
        for rule in verdict.asked_by
        for one in rule.obligations
        if isinstance(one, StepUp) and (age_s is None or age_s > one.max_age_s)
    ]
    if not too_old:
        return decision
    return Denied(
        reason="Your second factor was shown too long ago for this.",
        rules=_ids(too_old),
        remedy=Remedy(kind="step_up"),
    )


def _denied(rules: list[Rule]) -> _Verdict:
    forbids = sorted((rule for rule in rules if rule.effect == "forbid"), key=_remedy_order)
    if not forbids:
        return _Verdict(decision=_NOTHING_ALLOWS)
    hardest = forbids[0]
    return _Verdict(
        decision=Denied(
            reason=hardest.reason, rules=_ids(forbids), remedy=Remedy(kind=hardest.remedy)
        )
    )


#: When several rules deny, the reason and remedy of the one that is hardest to mend are told.
_ORDER: Final[tuple[RemedyKind, ...]] = (
    "operator", "records_office", "administrator", "encrypt", "scope", "purpose", "consent",
    "shorter_grant", "break_glass", "step_up",
)  # fmt: skip


def _remedy_order(rule: Rule) -> tuple[int, str]:
    return _ORDER.index(rule.remedy), rule.id


def _ids(rules: Iterable[Rule]) -> tuple[str, ...]:
    return tuple(sorted(rule.id for rule in rules))


def _failed(failure: str, reason: str) -> Denied:
    return Denied(reason=reason, rules=(), remedy=Remedy(kind="operator"), failure=failure)
