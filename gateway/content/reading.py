"""What an app answers to an inspected request, as far as the asker may have it.

Used for reads as a whole, and for the answer to a write (`gateway.content.writing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from gateway.content import bodies, release
from gateway.content.fields import JSONFields
from gateway.content.pointers import JSON
from gateway.content.records import Decided, ask_all, decide, finish, name_ahead
from gateway.content.rules import Matched, Rule, patient_id
from gateway.core.commands import Fetched
from gateway.core.enforcement import Enforcement, Question, RefusedError, Reply, Steps
from gateway.core.messages import Headers, ResponseHead
from gateway.errors import BadRequestError, UpstreamContentError, UpstreamError
from gateway.fhir.release import notice_text
from policies.labels import Labels
from policies.model import Action, Allowed, Denied
from policies.obligations import Obligation, RedisclosureNotice, Review, StepUp, join

_ABSENT = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
#: What can be done about an answer that is not JSON.
_WITHOUT_LOOKING = (StepUp, Review, RedisclosureNotice)
#: The header field in which a notice goes with what it is about.
NOTICE_HEADER = "redisclosure-notice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One inspected exchange's way back."""

    enforcement: Enforcement
    matched: Matched
    fields: JSONFields

    @property
    def rule(self) -> Rule:
        """The rule that the request was matched by."""
        return self.matched.rule

    def labels(self) -> Labels:
        """What is known of a record that nobody has seen yet."""
        kind = self.enforcement.route.settings.kind
        return self.enforcement.labeller.label_codes((), kind=kind)

    def question(self, action: Action, patient: str | None) -> Question:
        """The question that can be asked before anything was seen."""
        author = self.matched.author
        return Question(
            action=action,
            type=self.rule.type,
            id=self.matched.id,
            patient=patient,
            authors=frozenset({author} if author else ()),
            labels=self.labels(),
        )

    def named(self) -> frozenset[str]:
        """The patient that path and query name. Raises `BadRequestError` if they name two."""
        named = {self.matched.patient} if self.matched.patient is not None else set()
        if self.rule.patient_parameter:
            value = bodies.parameter(self.enforcement.head.query, self.rule.patient_parameter)
            if value is not None:
                patient = patient_id(value)
                if patient is None:
                    raise BadRequestError("Expected the id of one patient in the query.")
                named.add(patient)
        if len(named) > 1:
            raise BadRequestError("Path and query name different patients.")
        return frozenset(named)

    # --- Reading ------------------------------------------------------------------------------

    def read(self, query: str) -> Steps[Reply]:
        """The whole of a GET or HEAD."""
        asking, rule = self.enforcement, self.rule
        action = rule.action_for(asking.head.method)
        asked = self.named()
        yield from asking.know(asked)
        tops = [self.question(action, patient) for patient in asked or (None,)]
        obligations: tuple[Obligation, ...] = ()
        # Of a record whose patient is not known yet only a yes means something already.
        _, known = ask_all(asking, tops)
        if asked or not rule.has_patients or isinstance(known, Allowed):
            obligations = join(one for top in tops for one in asking.demand(top).obligations)
            yield from asking.begin()
        fetched = yield from asking.fetch(
            bodies.upstream_head(asking.head, query=query, reading=True)
        )
        refusal = known if isinstance(known, Denied) else None
        return (
            yield from self.reply(
                fetched, action=action, asked=asked, obligations=obligations, refusal=refusal
            )
        )

    def reply(
        self,
        fetched: Fetched,
        *,
        action: Action,
        asked: frozenset[str],
        obligations: tuple[Obligation, ...],
        refusal: Denied | None = None,
        written: bool = False,
    ) -> Steps[Reply]:
        """The app's answer, as far as it may leave.

        `refusal` is what to say to somebody of whom nothing has been allowed yet. `written`: the
        answer is to a write that was allowed, and what may not be seen of it is left away.
        """
        status = fetched.head.status
        if refusal is not None and status >= HTTPStatus.MULTIPLE_CHOICES:
            raise RefusedError(refusal, hide=True)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status < HTTPStatus.OK:
            raise UpstreamError(f"The app behind answered with an error of its own ({status}).")
        if status >= HTTPStatus.MULTIPLE_CHOICES:
            return self._not_done(fetched, asked, obligations, written=written)
        if status in {HTTPStatus.PARTIAL_CONTENT, HTTPStatus.MULTI_STATUS}:
            raise _unusable("a whole answer", "a part or a collection of answers")
        if not fetched.body:
            if refusal is not None:
                raise RefusedError(refusal, hide=True)
            return self._head_only(fetched, obligations, location=written)
        if not bodies.is_json(fetched.head.headers.get("content-type")):
            return self._unseen(fetched, asked, obligations, written=written)
        try:
            body = bodies.parse_json(fetched.body)
        except ValueError as error:
            raise _unusable("well-formed JSON with each member once", "something else") from error
        records, listed = self._records(body)
        decided = yield from decide(
            self.enforcement,
            records,
            self.matched,
            action=action,
            fields=self.fields,
            asked=asked,
            lenient=written and not listed,
        )
        if listed:
            return (yield from self._list(fetched, body, decided, obligations, refusal))
        return (yield from self._single(fetched, decided[0], obligations, written=written))

    def _records(self, body: JSON) -> tuple[list[JSON], bool]:
        if self.rule.items is None:
            records, listed = (body, True) if isinstance(body, list) else ([body], False)
        else:
            found = self.rule.items.find(body)
            if len(found) != 1 or not isinstance(found[0], list):
                raise _unusable("a list where the rule says", "none")
            records, listed = found[0], True
        if len(records) > self.enforcement.limits.looked_through:
            raise UpstreamContentError(
                f"Expected at most {self.enforcement.limits.looked_through} records in one answer, "
                f"got {len(records)}; ask the app for fewer at once."
            )
        return records, listed

    # --- One record -------------------------------------------------------------------------------

    def _single(
        self,
        fetched: Fetched,
        one: Decided,
        obligations: tuple[Obligation, ...],
        *,
        written: bool,
    ) -> Steps[Reply]:
        asking, decision = self.enforcement, one.decision
        if isinstance(decision, Denied):
            if written:
                asking.withhold(one.question, decision)
                return self._head_only(fetched, obligations, location=True)
            raise RefusedError(decision, hide=not self.may_know_of(one.question))
        if asking.trail.begun is None:
            asking.demand(one.question)
            yield from asking.begin()
        # The record's own decision says what is done to it; the request's adds its notices.
        yield from name_ahead(asking, [(one, decision)], self.rule)
        content = finish(asking, one, decision, self.rule, self.fields)
        all_of_it = join((*obligations, *decision.obligations))
        headers = bodies.released_headers(fetched.head.headers, asking.route, location=written)
        hidden = release.hides(decision.obligations, self.rule.type)
        if asking.head.method in {"GET", "HEAD"} and not hidden:
            headers, unchanged = self._with_etag(fetched, headers)
            if unchanged:
                return Reply(head=ResponseHead(status=HTTPStatus.NOT_MODIFIED, headers=headers))
        return self._json(fetched, headers, content, all_of_it)

    def may_know_of(self, question: Question) -> bool:
        """Whether he may see other records of this patient, and so learn that one is closed."""
        plain = self.question(question.action, question.patient)
        return question.patient is not None and isinstance(self.enforcement.ask(plain), Allowed)

    def _with_etag(self, fetched: Fetched, headers: Headers) -> tuple[Headers, bool]:
        etag = fetched.head.headers.get("etag")
        for name in ("etag", "last-modified"):
            value = fetched.head.headers.get(name)
            if value is not None:
                headers = headers.with_(name, value)
        return headers, bodies.not_modified(self.enforcement.head, etag)

    # --- Many -------------------------------------------------------------------------------------

    def _list(
        self,
        fetched: Fetched,
        body: JSON,
        decided: list[Decided],
        obligations: tuple[Obligation, ...],
        refusal: Denied | None,
    ) -> Steps[Reply]:
        asking = self.enforcement
        going: list[tuple[Decided, Allowed]] = []
        for one in decided:
            if isinstance(one.decision, Allowed):
                going.append((one, one.decision))
            else:
                asking.withhold(one.question, one.decision)
        if refusal is not None and not going:
            # Said whatever the list held: it tells nothing about what was left out.
            raise RefusedError(refusal)
        everything = join(
            (*obligations, *(each for _, allowed in going for each in allowed.obligations))
        )
        limit = release.row_limit(everything)
        cut = limit is not None and len(going) > limit
        going = going[:limit]
        if asking.trail.begun is None:
            asking.demand(going[0][0].question)
            yield from asking.begin()
        yield from name_ahead(asking, going, self.rule)
        listed = [finish(asking, one, allowed, self.rule, self.fields) for one, allowed in going]
        uncounted = release.out_of_counts(everything)
        counted = sum(not (one.question.labels.codes & uncounted) for one, _ in going)
        total = None if cut else self._total(body, len(decided), counted)
        asking.count("returned", len(listed))
        headers = bodies.released_headers(fetched.head.headers, asking.route)
        return self._json(fetched, headers, self._enveloped(body, listed, total), everything)

    def _total(self, body: JSON, came: int, counted: int) -> int | None:
        """The corrected total; None unless the app counted exactly what it sent."""
        found = self.rule.total.find(body) if self.rule.total is not None else []
        exact = len(found) == 1 and type(found[0]) is int and found[0] == came
        return counted if exact else None

    def _enveloped(self, body: JSON, listed: list[JSON], total: int | None) -> JSON:
        rule = self.rule
        if rule.items is None:
            return listed
        made = bodies.envelope(body, rule.items, rule.keep, listed)
        if rule.total is not None and total is not None:
            bodies.put(made, rule.total, total)
        return made

    # --- Everything else --------------------------------------------------------------------------

    def _not_done(
        self,
        fetched: Fetched,
        asked: frozenset[str],
        obligations: tuple[Obligation, ...],
        *,
        written: bool,
    ) -> Reply:
        """A redirect, or the app's own refusal: its words may quote a record."""
        status = fetched.head.status
        route = self.enforcement.route
        trusted = self._needs_no_look(asked, obligations)
        if status < HTTPStatus.BAD_REQUEST:
            if status == HTTPStatus.NOT_MODIFIED or not (trusted or written):
                raise _unusable("an answer to an unconditional request", "a redirect")
            return self._head_only(fetched, obligations, location=True)
        if trusted:
            headers = bodies.released_headers(fetched.head.headers, route)
            return self._whole(fetched, headers, fetched.body, obligations)
        headers = Headers((("content-type", "application/problem+json"),))
        return Reply(head=ResponseHead(status=status, headers=headers), body=bodies.problem(status))

    def _unseen(
        self,
        fetched: Fetched,
        asked: frozenset[str],
        obligations: tuple[Obligation, ...],
        *,
        written: bool,
    ) -> Reply:
        """Something other than JSON, which nobody looks into."""
        if self._needs_no_look(asked, obligations):
            headers = bodies.released_headers(
                fetched.head.headers, self.enforcement.route, location=written
            )
            return self._whole(fetched, headers, fetched.body, obligations)
        if written:
            return self._head_only(fetched, obligations, location=True)
        raise _unusable("JSON, as this request needs to be looked into", "something else")

    def _needs_no_look(self, asked: frozenset[str], obligations: tuple[Obligation, ...]) -> bool:
        """Whether it is known whose it is, and nothing must be done to what is in it."""
        whose = self.enforcement.trail.begun is not None and (asked or not self.rule.has_patients)
        return (
            bool(whose)
            and not self.fields.of(self.rule.type)
            and all(isinstance(one, _WITHOUT_LOOKING) for one in obligations)
        )

    def _head_only(
        self, fetched: Fetched, obligations: tuple[Obligation, ...], *, location: bool
    ) -> Reply:
        headers = bodies.released_headers(
            fetched.head.headers, self.enforcement.route, location=location
        ).without(("content-type", "content-disposition"))
        return self._whole(fetched, headers, b"", obligations)

    def _json(
        self,
        fetched: Fetched,
        headers: Headers,
        content: JSON,
        obligations: tuple[Obligation, ...],
    ) -> Reply:
        kind = bodies.media_type(headers.get("content-type"))
        headers = headers.with_("content-type", kind)
        return self._whole(fetched, headers, bodies.dump_json(content), obligations)

    def _whole(
        self, fetched: Fetched, headers: Headers, body: bytes, obligations: tuple[Obligation, ...]
    ) -> Reply:
        notices = sorted(release.notices(obligations))
        if notices:
            text = " ".join(" ".join(notice_text(one).split()) for one in notices)
            headers = headers.with_(NOTICE_HEADER, text)
        return Reply(head=ResponseHead(status=fetched.head.status, headers=headers), body=body)


def absent(fetched: Fetched) -> bool:
    """Whether the app says that there is no such record."""
    return fetched.head.status in _ABSENT


def _unusable(expected: str, got: str) -> UpstreamContentError:
    return UpstreamContentError(
        f"Expected {expected} from the app, got {got}; see the rule of this route for the path."
    )
