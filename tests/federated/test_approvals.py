"""Nothing runs before everybody it needs has approved it; nobody decides about his own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from audit.errors import LogUnavailableError
from audit.recorder import Begun, End
from federated.approvals import FileSigner, Stopping
from federated.errors import ApprovalError, BudgetExhaustedError, ManifestError
from federated.schema import studies as studies_table
from federated.schema import study_steps
from federated.signed_study import verify_study
from federated.study_log import Remembered, make_bundle, verify_bundle
from federated.study_store import Step
from policies.model import Assurance, Principal
from tests.federated.ledgers import MemoryLog
from tests.federated.studies import NOW, ORIGIN, StudyLog, study
from tests.federated.trails import MEMBER, NORTH, RESEARCHER, SOUTH, Trail, person


@pytest.fixture
def trail(tmp_path: Path) -> Iterator[Trail]:
    made = Trail(tmp_path)
    yield made
    made.database.close()


def said(trail: Trail) -> list[tuple[str, str | None]]:
    assert isinstance(trail.log, MemoryLog)
    return [(e.action, e.outcome) for e in trail.log.entries if e.stage == "outcome"]


def test_a_study_is_published_once_everybody_approved(trail: Trail) -> None:
    one = study()
    assert trail.approvals.propose(one, RESEARCHER).missing == (
        "1 of the ethics board",
        "site north",
        "site south",
    )
    standing = trail.approvals.approve(one.id, MEMBER, capacity="ethics-board", signer=trail.board)
    assert (standing.stage, standing.missing) == ("proposed", ("site north", "site south"))
    trail.approvals.approve(one.id, NORTH, capacity="site", site="north", signer=trail.north)
    standing = trail.approvals.approve(
        one.id, SOUTH, capacity="site", site="south", signer=trail.south
    )
    assert (standing.stage, standing.missing) == ("published", ())
    verify_study(trail.approvals.signed(one.id), trail.trusted)
    assert said(trail) == [
        ("study.propose", "success"),
        *[("study.approve", "success")] * 3,
        ("study.publish", "success"),
    ]
    assert [standing.study.id for standing in trail.approvals.all()] == [one.id]


def test_every_step_is_in_the_log_before_and_after_without_a_name(trail: Trail) -> None:
    one = trail.approve_all()
    assert isinstance(trail.log, MemoryLog)
    entries = trail.log.entries
    assert [e.stage for e in entries] == ["intent", "outcome"] * 5
    assert all(e.details["study"] == one.study_hash for e in entries)
    assert {e.actor.role for e in entries} == {"researcher", "ethics-board", "site", None}
    for name in (b"ruth", b"emil", b"nora", b"sven"):
        assert not any(name in raw for raw in trail.log.raw)
    assert entries[0].rules == ("study.fresh", "study.researcher.propose")
    assert entries[0].assurance is not None
    assert entries[0].assurance.age_s == 60


def test_a_published_study_is_proven_to_a_device(tmp_path: Path) -> None:
    log = StudyLog(tmp_path)
    with log.writer() as writer:
        trail = Trail(tmp_path, log=writer)
        one = trail.approve_all()
        (step,) = trail.approvals.standing(one.id).record.of("publish")
        with log.publisher(writer) as publisher:
            publisher.publish()
        trail.database.close()
    verify_bundle(
        make_bundle(log.directory, step.log_index),
        study_hash=one.study_hash,
        remembered=Remembered.nothing(ORIGIN),
        log_keys=log.keys,
        witness_keys=log.witness_keys,
    )


# Four eyes


def test_nobody_approves_what_he_proposed(trail: Trail) -> None:
    all_roles = person("ruth", "researcher", "ethics-board", "site-officer")
    trail.approvals.propose(study(), all_roles)
    for capacity, site, signer in (
        ("ethics-board", "", trail.board),
        ("site", "north", trail.north),
    ):
        with pytest.raises(ApprovalError, match="You proposed this study"):
            trail.approvals.approve(
                study().id,
                all_roles,
                capacity=capacity,  # type: ignore[arg-type]
                site=site,
                signer=signer,
            )
    assert said(trail)[1:] == [("study.approve", "denied")] * 2


def test_nobody_approves_twice_in_two_roles(trail: Trail) -> None:
    both = person("emil", "ethics-board", "site-officer")
    trail.approvals.propose(study(), RESEARCHER)
    trail.approvals.approve(study().id, both, capacity="ethics-board", signer=trail.board)
    with pytest.raises(ApprovalError, match="somebody else must give the other"):
        trail.approvals.approve(study().id, both, capacity="site", site="south", signer=trail.south)


@pytest.mark.parametrize("proposer", ["ruth", "emil"])
def test_four_eyes_hold_even_where_the_policies_allow_it(tmp_path: Path, proposer: str) -> None:
    from policies.bundle import load
    from policies.engine import Engine

    loose = load().without("study.four-eyes.proposer").without("study.four-eyes.twice")
    trail = Trail(tmp_path)
    trail.approvals._desk = replace(trail.approvals._desk, decide=Engine(loose).decide)
    both = person("emil", "researcher", "ethics-board", "site-officer")
    trail.approvals.propose(study(), replace(both, id=proposer))
    if proposer == "ruth":
        trail.approvals.approve(study().id, both, capacity="ethics-board", signer=trail.board)
    with pytest.raises(ApprovalError, match="somebody else must"):
        trail.approvals.approve(study().id, both, capacity="site", site="south", signer=trail.south)
    trail.database.close()


def test_one_key_does_not_speak_for_two_people(trail: Trail) -> None:
    one = study({"minimum_cohort": "ethics_approvals = 2\nminimum_cohort"})
    trail.approvals.propose(one, RESEARCHER)
    trail.approvals.approve(one.id, MEMBER, capacity="ethics-board", signer=trail.board)
    other = person("erna", "ethics-board")
    with pytest.raises(ApprovalError, match="speaks twice"):
        trail.approvals.approve(one.id, other, capacity="ethics-board", signer=trail.board)


# Who may


@pytest.mark.parametrize(
    ("who", "says"),
    [
        (person("emil", "ethics-board"), "administrator"),
        (person("nora", "site-officer"), "administrator"),
        (person("paul"), "administrator"),
        (person("ruth", "researcher", age_s=901), "too long ago"),
        (person("ruth", "researcher", age_s=-5), "too long ago"),
        (replace(RESEARCHER, assurance=Assurance()), "too long ago"),
        (replace(RESEARCHER, kind="service"), "signed in himself"),
        (replace(RESEARCHER, kind="anonymous"), "signed in himself"),
        (replace(RESEARCHER, scopes=frozenset({"user/*.*"})), "signed in himself"),
    ],
)
def test_refuses_a_proposal_by_anybody_else(trail: Trail, who: object, says: str) -> None:
    with pytest.raises(ApprovalError, match=says):
        trail.approvals.propose(study(), who)  # type: ignore[arg-type]
    assert trail.approvals.all() == []


@pytest.mark.parametrize(
    ("who", "capacity", "site", "key", "says"),
    [
        (RESEARCHER, "site", "north", "north", "proposed"),
        (NORTH, "site", "south", "south", "role should allow"),
        (NORTH, "ethics-board", "", "board", "role should allow"),
        (MEMBER, "site", "south", "south", "role should allow"),
        (MEMBER, "ethics-board", "", "north", "not enrolled for ethics-board"),
        (NORTH, "site", "north", "south", "not enrolled for site north"),
        (NORTH, "site", "north", "board", "not enrolled for site north"),
        (replace(MEMBER, assurance=Assurance()), "ethics-board", "", "board", "too long ago"),
        (MEMBER, "none", "", "board", "Say whether"),
    ],
)
def test_refuses_an_approval_by_anybody_else(
    trail: Trail, who: object, capacity: str, site: str, key: str, says: str
) -> None:
    trail.approvals.propose(study(), RESEARCHER)
    with pytest.raises(ApprovalError, match=says):
        trail.approvals.approve(
            study().id,
            who,  # type: ignore[arg-type]
            capacity=capacity,  # type: ignore[arg-type]
            site=site,
            signer=getattr(trail, key),
        )
    assert trail.approvals.standing(study().id).record.of("approve") == []


def test_a_site_that_is_not_asked_has_no_word(trail: Trail) -> None:
    one = study({'["north", "south"]': '["north"]'})
    trail.approvals.propose(one, RESEARCHER)
    with pytest.raises(ApprovalError, match="does not ask the site south"):
        trail.approvals.approve(one.id, SOUTH, capacity="site", site="south", signer=trail.south)


def test_one_word_against_is_final(trail: Trail) -> None:
    one = study()
    trail.approvals.propose(one, RESEARCHER)
    assert trail.approvals.refuse(one.id, MEMBER, capacity="ethics-board").stage == "refused"
    with pytest.raises(ApprovalError, match="decided already"):
        trail.approvals.approve(one.id, NORTH, capacity="site", site="north", signer=trail.north)
    with pytest.raises(ApprovalError):
        trail.approvals.publish(one.id)
    with pytest.raises(ApprovalError):
        trail.approvals.start_run(one.id, RESEARCHER)
    assert ("study.refuse", "success") in said(trail)


# Running and releasing


def test_an_approved_study_runs_and_is_released(trail: Trail) -> None:
    one = trail.approve_all()
    started = trail.approvals.start_run(one.id, RESEARCHER)
    verify_study(started.signed, trail.trusted)
    trail.approvals.end_run(started, answer_hash="ab" * 32)
    index = trail.approvals.release(one.id, RESEARCHER, answer_hash="ab" * 32)
    assert isinstance(trail.log, MemoryLog)
    (ran,) = [e for e in trail.log.entries if e.action == "study.run" and e.stage == "outcome"]
    assert (ran.outcome, ran.details["answer"]) == ("success", "ab" * 32)
    entry = trail.log.entries[index]
    assert (entry.action, entry.outcome) == ("study.release", "success")
    assert entry.details["answer"] == "ab" * 32
    assert trail.approvals.standing(one.id).released


def test_a_run_that_failed_is_recorded_as_such(trail: Trail) -> None:
    one = trail.approve_all()
    started = trail.approvals.start_run(one.id, RESEARCHER)
    trail.approvals.end_run(started, BudgetExhaustedError("no"))
    assert said(trail)[-1] == ("study.run", "failed")


@pytest.mark.parametrize("approvals", range(3))
def test_nothing_runs_or_is_released_while_an_approval_is_missing(
    trail: Trail, approvals: int
) -> None:
    one = study()
    trail.approvals.propose(one, RESEARCHER)
    given = (
        (MEMBER, "ethics-board", "", trail.board),
        (NORTH, "site", "north", trail.north),
    )
    for who, capacity, site, signer in given[:approvals]:
        trail.approvals.approve(one.id, who, capacity=capacity, site=site, signer=signer)  # type: ignore[arg-type]
    with pytest.raises(ApprovalError, match="waits for approvals"):
        trail.approvals.start_run(one.id, RESEARCHER)
    with pytest.raises(ApprovalError, match="waits for approvals"):
        trail.approvals.release(one.id, RESEARCHER, answer_hash="ab" * 32)
    with pytest.raises(ApprovalError, match="Ask for the missing"):
        trail.approvals.publish(one.id)


def test_nothing_is_released_that_did_not_run(trail: Trail) -> None:
    one = trail.approve_all()
    with pytest.raises(ApprovalError, match="has not run"):
        trail.approvals.release(one.id, RESEARCHER, answer_hash="ab" * 32)


def test_only_an_answer_of_a_run_that_ended_well_is_released(trail: Trail) -> None:
    one, other = trail.approve_all(), trail.approve_all(study({"sleep-and-mood": "other"}))
    for of, given in ((one, "ab" * 32), (one, "cd" * 32), (other, "ef" * 32)):
        trail.approvals.end_run(trail.approvals.start_run(of.id, RESEARCHER), answer_hash=given)
    failed = trail.approvals.start_run(one.id, RESEARCHER)
    trail.approvals.end_run(failed, BudgetExhaustedError("no"), answer_hash="00" * 32)
    for answer in ("11" * 32, "ef" * 32, "00" * 32, ""):
        with pytest.raises(ApprovalError, match="gave this answer"):
            trail.approvals.release(one.id, RESEARCHER, answer_hash=answer)
    assert said(trail)[-1] == ("study.release", "denied")
    trail.approvals.release(one.id, RESEARCHER, answer_hash="ab" * 32)
    trail.approvals.release(one.id, RESEARCHER, answer_hash="cd" * 32)


def test_a_run_that_went_well_says_what_it_gave(trail: Trail) -> None:
    one = trail.approve_all()
    started = trail.approvals.start_run(one.id, RESEARCHER)
    for answer in ("", "ab", "AB" * 32):
        with pytest.raises(ApprovalError, match="says the answer's hash"):
            trail.approvals.end_run(started, answer_hash=answer)


def test_every_entry_says_the_studys_own_purpose(trail: Trail) -> None:
    one = study({'purpose = "HRESCH"': 'purpose = "PUBHLTH"'})
    with pytest.raises(ApprovalError):
        trail.approvals.propose(one, RESEARCHER)
    trail.approvals._store.add(one, Step(kind="propose", at_us=1, log_index=0))
    trail.approvals.approve(one.id, MEMBER, capacity="ethics-board", signer=trail.board)
    trail.approvals.approve(one.id, NORTH, capacity="site", site="north", signer=trail.north)
    trail.approvals.approve(one.id, SOUTH, capacity="site", site="south", signer=trail.south)
    with pytest.raises(ApprovalError, match="No rule allows"):
        trail.approvals.start_run(one.id, RESEARCHER)
    assert isinstance(trail.log, MemoryLog)
    assert {entry.purpose for entry in trail.log.entries} == {"PUBHLTH"}
    assert {entry.action for entry in trail.log.entries} == {
        "study.propose", "study.approve", "study.publish", "study.run",
    }  # fmt: skip


# What is signed is what was shown


def test_signs_nothing_else_than_what_was_shown(trail: Trail) -> None:
    one = study()
    trail.approvals.propose(one, RESEARCHER)
    other = study({"minimum_cohort = 10": "minimum_cohort = 5"})
    assert other.id == one.id
    with pytest.raises(ApprovalError, match="another study now"):
        trail.approvals.approve(
            one.id, MEMBER, capacity="ethics-board", signer=trail.board, shown=other.study_hash
        )
    assert trail.approvals.standing(one.id).record.of("approve") == []
    trail.approvals.approve(
        one.id, MEMBER, capacity="ethics-board", signer=trail.board, shown=one.study_hash
    )


# Whoever is not asked has no word


def test_a_site_that_is_not_asked_refuses_nothing(trail: Trail) -> None:
    one = study({'["north", "south"]': '["north"]'})
    trail.approvals.propose(one, RESEARCHER)
    with pytest.raises(ApprovalError, match="does not ask the site south"):
        trail.approvals.refuse(one.id, SOUTH, capacity="site", site="south")
    assert said(trail)[-1] == ("study.refuse", "denied")
    assert trail.approvals.standing(one.id).stage == "proposed"
    with pytest.raises(ApprovalError, match="officer speaks for the site"):
        trail.approvals.refuse(one.id, MEMBER, capacity="ethics-board", site="south")
    assert trail.approvals.refuse(one.id, NORTH, capacity="site", site="north").stage == "refused"


# Stopping what was published


ADMINISTRATOR = person("adam", "administrator")


@pytest.mark.parametrize(
    ("who", "capacity", "site"),
    [(MEMBER, "ethics-board", ""), (NORTH, "site", "north"), (ADMINISTRATOR, "coordinator", "")],
)
def test_one_person_stops_a_published_study(
    trail: Trail, who: Principal, capacity: Stopping, site: str
) -> None:
    one = trail.approve_all()
    started = trail.approvals.start_run(one.id, RESEARCHER)
    trail.approvals.end_run(started, answer_hash="ab" * 32)
    trail.approvals.verify_runnable(one.id)
    standing = trail.approvals.withdraw(one.id, who, capacity=capacity, site=site)
    assert standing.stage == "withdrawn"
    with pytest.raises(ApprovalError, match="withdrawn"):
        trail.approvals.start_run(one.id, RESEARCHER)
    with pytest.raises(ApprovalError, match="withdrawn"):
        trail.approvals.release(one.id, RESEARCHER, answer_hash="ab" * 32)
    with pytest.raises(ApprovalError, match="withdrawn"):
        trail.approvals.verify_runnable(one.id)
    with pytest.raises(ApprovalError, match="withdrawn"):
        trail.approvals.withdraw(one.id, MEMBER, capacity="ethics-board")
    assert isinstance(trail.log, MemoryLog)
    (entry,) = [
        e for e in trail.log.entries if e.action == "study.withdraw" and e.outcome == "success"
    ]
    assert (entry.details["study"], entry.actor.role) == (one.study_hash, capacity)


def test_a_withdrawn_study_stays_so_whatever_the_policies_say(trail: Trail) -> None:
    from policies.bundle import load
    from policies.engine import Engine

    one = trail.approve_all()
    started = trail.approvals.start_run(one.id, RESEARCHER)
    trail.approvals.end_run(started, answer_hash="ab" * 32)
    trail.approvals.withdraw(one.id, MEMBER, capacity="ethics-board")
    loose = Engine(load().without("study.approved-only"))
    trail.approvals._desk = replace(trail.approvals._desk, decide=loose.decide)
    with pytest.raises(ApprovalError, match="was withdrawn"):
        trail.approvals.start_run(one.id, RESEARCHER)
    with pytest.raises(ApprovalError, match="was withdrawn"):
        trail.approvals.release(one.id, RESEARCHER, answer_hash="ab" * 32)


@pytest.mark.parametrize(
    ("who", "capacity", "site"),
    [
        (RESEARCHER, "coordinator", ""),
        (RESEARCHER, "ethics-board", ""),
        (MEMBER, "coordinator", ""),
        (NORTH, "ethics-board", ""),
        (NORTH, "site", "south"),
        (NORTH, "site", ""),
        (ADMINISTRATOR, "ethics-board", ""),
        (replace(MEMBER, assurance=Assurance()), "ethics-board", ""),
        (person("emil", "ethics-board", age_s=901), "ethics-board", ""),
        (replace(ADMINISTRATOR, kind="service"), "coordinator", ""),
    ],
)
def test_nobody_else_stops_a_study(
    trail: Trail, who: Principal, capacity: Stopping, site: str
) -> None:
    one = trail.approve_all()
    with pytest.raises(ApprovalError):
        trail.approvals.withdraw(one.id, who, capacity=capacity, site=site)
    assert said(trail)[-1] == ("study.withdraw", "denied")
    assert trail.approvals.standing(one.id).stage == "published"


def test_a_site_that_is_not_asked_stops_nothing(trail: Trail) -> None:
    one = study({'["north", "south"]': '["north"]'})
    trail.approvals.propose(one, RESEARCHER)
    trail.approvals.approve(one.id, MEMBER, capacity="ethics-board", signer=trail.board)
    trail.approvals.approve(one.id, NORTH, capacity="site", site="north", signer=trail.north)
    with pytest.raises(ApprovalError, match="does not ask the site south"):
        trail.approvals.withdraw(one.id, SOUTH, capacity="site", site="south")


def test_only_what_was_published_is_withdrawn(trail: Trail) -> None:
    trail.approvals.propose(study(), RESEARCHER)
    with pytest.raises(ApprovalError, match="waits for approvals"):
        trail.approvals.withdraw(study().id, MEMBER, capacity="ethics-board")


def test_a_study_is_approved_and_run_only_in_its_time(trail: Trail) -> None:
    one = trail.approve_all()
    trail.now = one.valid_until + 1.0
    fresh = replace(
        RESEARCHER, assurance=Assurance(second_factor="totp", second_factor_at=trail.now)
    )
    with pytest.raises(ApprovalError):
        trail.approvals.start_run(one.id, fresh)
    assert trail.approvals.standing(one.id).stage == "expired"
    late = study({"sleep-and-mood": "too-late"})
    with pytest.raises(ApprovalError, match="past its time"):
        trail.approvals.propose(late, fresh)


def test_a_study_does_not_run_before_its_time(trail: Trail) -> None:
    one = trail.approve_all(study({"1799990000": str(NOW + 1000)}))
    with pytest.raises(ApprovalError, match="not valid at this time"):
        trail.approvals.start_run(one.id, RESEARCHER)


# Replays and forgeries


def test_a_study_is_proposed_once_and_its_id_names_one_study(trail: Trail) -> None:
    trail.approvals.propose(study(), RESEARCHER)
    for again in (study(), study({"minimum_cohort = 10": "minimum_cohort = 5"})):
        with pytest.raises(ApprovalError, match="proposed before"):
            trail.approvals.propose(again, RESEARCHER)
    with pytest.raises(ApprovalError, match="No study"):
        trail.approvals.standing("other")


def test_an_approval_of_one_study_is_none_of_another(trail: Trail) -> None:
    trail.approve_all()
    other = study({"sleep-and-mood": "other"})
    trail.approvals.propose(other, RESEARCHER)
    with trail.database.writing() as connection:
        connection.execute(
            update(study_steps)
            .where(study_steps.c.kind != "propose")
            .values(study=other.study_hash)
        )
    with pytest.raises(ApprovalError, match="does not fit"):
        trail.approvals.start_run(other.id, RESEARCHER)


def test_a_study_changed_in_the_database_is_not_run(trail: Trail) -> None:
    one = trail.approve_all()
    with trail.database.writing() as connection:
        changed = (
            one.canonical_bytes().decode().replace('"minimum_cohort":10', '"minimum_cohort":2')
        )
        connection.execute(update(studies_table).values(manifest=changed))
    with pytest.raises((ApprovalError, ManifestError)):
        trail.approvals.start_run(one.id, RESEARCHER)


def test_whoever_writes_the_database_cannot_approve(trail: Trail) -> None:
    one = study()
    trail.approvals.propose(one, RESEARCHER)
    trail.approvals.approve(one.id, MEMBER, capacity="ethics-board", signer=trail.board)
    (step,) = trail.approvals.standing(one.id).record.of("approve")
    for number, site in enumerate(("north", "south"), start=10):
        forged = {name: getattr(step, name) for name in type(step).__slots__}
        forged |= {"role": "site", "site": site, "study": one.study_hash, "step": number}
        forged |= {"public_key": getattr(trail, site).public_key.hex()}
        with trail.database.writing() as connection:
            connection.execute(study_steps.insert(), forged)
    with pytest.raises(ApprovalError, match="does not fit"):
        trail.approvals.publish(one.id)


def test_two_who_publish_at_once_leave_one_publication(
    trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = study()
    trail.approvals.propose(one, RESEARCHER)
    trail.approvals.approve(one.id, MEMBER, capacity="ethics-board", signer=trail.board)
    trail.approvals.approve(one.id, NORTH, capacity="site", site="north", signer=trail.north)
    outcome, others = trail.recorder.outcome, iter([trail.approvals.publish])

    def meanwhile(begun: Begun, end: End) -> int:
        if begun.act.action == "study.publish":
            for publish in others:
                publish(one.id)
        return outcome(begun, end)

    monkeypatch.setattr(trail.recorder, "outcome", meanwhile)
    standing = trail.approvals.approve(
        one.id, SOUTH, capacity="site", site="south", signer=trail.south
    )
    assert standing.stage == "published"
    assert len(standing.record.of("publish")) == 1
    signatures = trail.approvals.signed(one.id).signatures
    assert len(signatures) == len(set(signatures))


def test_a_crash_before_publishing_is_made_good(trail: Trail) -> None:
    one = study()
    trail.approvals.propose(one, RESEARCHER)
    trail.approvals.approve(one.id, MEMBER, capacity="ethics-board", signer=trail.board)
    trail.approvals.approve(one.id, NORTH, capacity="site", site="north", signer=trail.north)
    publish = trail.approvals.publish
    trail.approvals.publish = trail.approvals.standing  # type: ignore[method-assign]
    standing = trail.approvals.approve(
        one.id, SOUTH, capacity="site", site="south", signer=trail.south
    )
    assert standing.stage == "approved"
    with pytest.raises(ApprovalError):
        trail.approvals.start_run(one.id, RESEARCHER)
    assert publish(one.id).stage == "published"
    assert publish(one.id).stage == "published"


def test_nothing_happens_that_the_log_does_not_take(tmp_path: Path) -> None:
    class Away(MemoryLog):
        def append(self, entry: bytes) -> MemoryLog.Place:
            raise LogUnavailableError("The log is away, as the test wants it.")

    trail = Trail(tmp_path, log=Away())
    with pytest.raises(LogUnavailableError):
        trail.approvals.propose(study(), RESEARCHER)
    assert trail.approvals.all() == []
    trail.database.close()


# Keys


def test_a_key_file_is_closed_to_others_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "mine"
    made = FileSigner.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert FileSigner.load(path).public_key == made.public_key
    with pytest.raises(ApprovalError, match="there already"):
        FileSigner.create(path)
    path.chmod(0o640)
    with pytest.raises(ApprovalError, match="0600"):
        FileSigner.load(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ApprovalError, match="32 bytes"):
        FileSigner.load(path)
    with pytest.raises(ApprovalError, match="study key"):
        FileSigner.load(tmp_path / "nowhere")
