"""Everything around a guard, real: a store, an enrolment, signed studies, a witnessed log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from federated.manifest import DeclaredQuery, Study, roster_hash
from federated.model import PersonRows, PrivacyCost, Sensitivity
from federated.node.budget import Budget
from federated.node.consent import Consents, Scope
from federated.node.contact import ContactRequest
from federated.node.enrolment import Enrolment, enrol, remembered
from federated.node.guard import Admission, Guard, GuardPorts
from federated.node.receipts import Receipt, Receipts
from federated.node.store import Person, Store
from federated.signed_study import SignedStudy
from federated.study_log import make_bundle
from tests.federated.node.ledgers import adding
from tests.federated.node.tables import fill
from tests.federated.studies import NOW, ORIGIN, Parties, StudyLog, study

CODE = "cd" * 32
ROSTER = {f"node-{number}": bytes([number]) * 32 for number in range(12)}
NODE = "node-3"
CHANGES = {"ab" * 32: roster_hash(ROSTER)}


def price(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    return PrivacyCost(
        epsilon=query.epsilon,
        delta=query.delta,
        noise=query.noise,
        sensitivity=Sensitivity(l1=1.0, l2=1.0),
    )


class SpiedStore(Store):
    """A real store that counts how often rows were read for a study."""

    reads = 0

    def rows(self, person: Person, columns: frozenset[str]) -> PersonRows:
        self.reads += 1
        return super().rows(person, columns)


class World:
    """A node and everybody who can ask it something. By default all is in order."""

    def __init__(self, directory: Path, store: SpiedStore, people: Sequence[str] = ("me",)) -> None:
        self.directory = directory
        self.store = store
        self.parties = Parties()
        self.log = StudyLog(directory)
        self.ports = GuardPorts(price=price, rounds=lambda _: 1, code_hash=CODE)
        self.budget = Budget(store, adding)
        self.consents = Consents(store)
        self.now = NOW
        self.last = -1
        enrol(store, self.enrolment())
        fill(store, {name: {"mood": [1.0, 2.0], "sleep_hours": [7.0, 8.0]} for name in people})
        self.consent()

    def enrolment(self, **changes: object) -> Enrolment:
        parties = self.parties
        made = Enrolment(
            node=NODE,
            coordinator=(parties.coordinator.public.hex(),),
            ethics_board=(parties.board.public.hex(),),
            sites={name: (key.public.hex(),) for name, key in parties.sites.items()},
            origin=ORIGIN,
            log_keys=tuple(key.text for key in self.log.keys),
            witness_keys=tuple(key.text for key in self.log.witness_keys),
        )
        return msgspec.structs.replace(made, **changes)

    def consent(self, scope: Scope | None = None) -> None:
        standing = Scope(
            kinds=frozenset({"mean"}),
            columns=frozenset({"mood", "sleep_hours"}),
            purposes=frozenset({"HRESCH"}),
        )
        self.consents.give(self.store.people(), scope or standing, now=self.now)

    def study(self, changes: Mapping[str, str] | None = None) -> Study:
        return study({**CHANGES, **(changes or {})})

    def publish(self, of: Study) -> int:
        self.last = self.log.append_published(of)
        return self.last

    def request(
        self, of: Study, *, signed: SignedStudy | None = None, index: int | None = None,
        **changes: object,
    ) -> ContactRequest:  # fmt: skip
        """A request in order for a study that is published here, unless it was."""
        place = self.publish(of) if index is None else index
        seen = remembered(self.store, ORIGIN).size
        made = ContactRequest(
            study=(signed or self.parties.sign(of)).encode(),
            proof=make_bundle(self.log.directory, place, from_size=seen).encode(),
            query="sleep",
            run="run-1",
            round_number=0,
            roster=ROSTER,
            taking_part={**dict.fromkeys(ROSTER, 1), NODE: max(1, len(self.store.people()))},
        )
        return replace(made, **changes)  # type: ignore[arg-type]

    @property
    def guard(self) -> Guard:
        return Guard(self.store, self.budget, self.ports)

    def admit(
        self, request: ContactRequest | bytes, of: Study, configuration: object = None
    ) -> Admission:
        return self.guard.admit(
            request,
            configuration=configuration or of.run_configuration(),  # type: ignore[arg-type]
            now=self.now,
        )

    def receipts(self, name: str = "me") -> tuple[Receipt, ...]:
        return Receipts(self.store).of(self.store.person(name))
