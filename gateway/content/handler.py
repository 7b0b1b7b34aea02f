"""Exchanges with apps that do not speak FHIR: JSON by rules, and what passes unseen.

| route | path | what happens |
|---|---|---|
| opaque | any | passes in pieces once the rules allow it; a rule may say type, patient, public |
| json | of a rule for `Page` | the same |
| json | of another rule | inspected: decided record by record |
| json | of no rule | refused: an answer that nobody can read could be about anybody |

Static files of a json route need one rule: `path = "/static/{rest*}"`, `type = "Page"`. Such a
rule for everything (`/{rest*}`) lets everything pass unseen that no other rule names, JSON as well.

A list is asked for as `search` and each member is decided with its own patient and labels. What was
denied leaves no trace: not in the list, not in `total`, which is released only if it counted
exactly the members that came; how many other pages hide nobody can tell. A read of one record whose
patient the request does not name is decided when the record is there; who may see nothing of that
patient is answered as if it were not there.

A write needs every patient concerned before anything is sent: from path, query, body, and, where
the rule says in `patient` where a record names him, from the record as it is now. A POST whose body
names a record that is there by its id (where the rule says in `id`, or in a member called `id`,
`_id`, `uuid`, `guid` or `pk`) is asked about as a change of that record, too. It is refused if no
rule for GET with `{id}` lets the record be read, or if it is only not found among one patient's. A
PUT or PATCH names no other record than its path. So a write that may be of a patient's record is
JSON, an object or a list of objects; a photo or a form is for a rule for `Page`. Objects within a
record count: an id there names the record, too (unless the rule says `id` and nothing of the type
is sealed), and a patient or a protected member there is refused where none belongs. So does an id
in the query, where the record as it is now is not read with the same query.

Not seen: what a parameter of an app's query tests, links inside of records, and a change that
somebody else makes between reading whose record it is and writing it. An opaque route, and a
`Page`, see no bodies: a form there may name another method.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from gateway.content import bodies
from gateway.content.fields import compile_fields
from gateway.content.reading import Reading
from gateway.content.rules import ACTION_OF_METHOD, PAGE, Matched, compile_rules
from gateway.content.writing import Writing
from gateway.core.enforcement import Enforcement, Question, Reply, Steps
from gateway.core.handler import Inspected, Streamed
from gateway.core.messages import RequestHead
from gateway.errors import UnsupportedError
from gateway.settings import RouteSettings
from policies.model import Action

#: Actions that are there to see records: what they may not show they do not show at all.
_SHOWING: frozenset[Action] = frozenset({
    "read", "history", "search", "count", "export", "disclose",
})  # fmt: skip


class ContentHandler:
    """Serves one route with `content` `json` or `opaque`.

    Raises `GatewayConfigurationError`, with the route and what to write instead.
    """

    def __init__(self, settings: RouteSettings) -> None:
        self._inspects = settings.content == "json"
        self._rules = compile_rules(settings)
        self._fields = compile_fields(
            settings.fields, service=settings.name, types=self._rules.types
        )

    def plan(self, head: RequestHead) -> Inspected | Streamed:
        """Say from the head alone how the exchange must go.

        Raises `BadRequestError` and `UnsupportedError`.
        """
        bodies.check_method(head)
        matched = self._rules.match(head.method, head.path)
        if matched is None:
            if self._inspects:
                raise UnsupportedError(
                    "Nothing here says what this is, so nobody may have it. The operator can add "
                    "a rule for it.",
                    status=404,
                )
            action = ACTION_OF_METHOD[head.method]
            return Streamed(questions=(Question(action=action, type=PAGE),))
        if self._inspects and not matched.rule.passes_unseen:
            return Inspected(public=matched.rule.public)
        question = Question(
            action=matched.rule.action_for(head.method),
            type=matched.rule.type,
            id=matched.id,
            patient=matched.patient,
            authors=frozenset({matched.author} if matched.author else ()),
        )
        return Streamed(questions=(question,), public=matched.rule.public)

    def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
        """Carry out an inspected exchange. May raise `RefusedError` and any `GatewayError`."""
        head = enforcement.head
        matched = self._rules.match(head.method, head.path)
        if matched is None:
            raise UnsupportedError("Nothing here says what this is.", status=404)
        reading = Reading(enforcement=enforcement, matched=matched, fields=self._fields)
        if head.method in {"GET", "HEAD"}:
            reply = yield from reading.read((yield from self._query(enforcement, matched)))
            return replace(reply, body=b"") if head.method == "HEAD" else reply
        shows = head.method == "POST" and matched.rule.action_for(head.method) in _SHOWING
        writing = Writing(reading=reading, rules=self._rules, shows=shows)
        query = yield from self._query(enforcement, matched)
        return (yield from writing.write(body, query))

    def _query(self, enforcement: Enforcement, matched: Matched) -> Steps[str]:
        read = partial(
            self._fields.query,
            enforcement.head.query,
            matched.rule.type,
            service=enforcement.route.name,
            sealer=enforcement.sealer,
        )
        return (yield from enforcement.at_hand(read))
