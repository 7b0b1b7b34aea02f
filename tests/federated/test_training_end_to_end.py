"""A model, end to end, over real processes: trained, stopped, resumed, judged, released."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from federated.approvals import Approvals
from federated.database import StudyDatabase
from federated.learning.examples import examples_of
from federated.learning.models import predict
from federated.learning.round_query import TrainQuery
from federated.manifest import Study
from federated.questions import declared_question
from federated.release.check import verify_document
from federated.release.document import document_hash, make_document, model_weights
from federated.release.files import Reports, WrittenRelease
from federated.study_run import Deadlines
from tests.federated.deployment.federation import Running, entries_of, running
from tests.federated.studies import ORIGIN
from tests.federated.test_end_to_end import approvals_of, person
from tests.federated.test_training_at_sites import AT_SITES
from tests.federated.test_training_by_turns import BY_TURNS, ROUNDS
from tests.federated.trainings import people_of, study
from tests.openbao import RunningServer

FAULTY = "node-1"


def approved(
    federation: Running, database: StudyDatabase, changes: Mapping[str, str]
) -> tuple[Approvals, Study]:
    """A study that trains and judges, signed by everybody and in the log."""
    approvals, parties = approvals_of(federation, database), federation.parties
    declared = study(federation.roster.hash, changes)
    approvals.propose(declared, person("ruth", "researcher"))
    approvals.approve(
        declared.id, person("emil", "ethics-board"), capacity="ethics-board", signer=parties.board
    )
    for site, officer in (("north", "nora"), ("south", "sven")):
        approvals.approve(
            declared.id, person(officer, "site-officer"), capacity="site", site=site,
            signer=parties.sites[site],
        )  # fmt: skip
    with federation.log.writer() as writer, federation.log.publisher(writer) as publisher:
        publisher.publish()
    return approvals, declared


SITES = {**AT_SITES, "rounds = 6": AT_SITES["rounds = 6"].replace("rounds = 3", "rounds = 6")}


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [({}, 6), (BY_TURNS, ROUNDS), (SITES, 6)],
    ids=["everybody", "by turns", "at sites"],
)
def test_a_model_from_the_proposal_to_a_release_that_anybody_can_check(
    openbao: RunningServer, tmp_path: Path, changes: Mapping[str, str], rounds: int
) -> None:
    with running(openbao, tmp_path, nodes=5, people=people_of) as federation:
        database = StudyDatabase(f"sqlite:///{tmp_path / 'studies.sqlite3'}")
        try:
            approvals, declared = approved(federation, database, changes)
            ruth = person("ruth", "researcher")
            run = approvals.start_run(declared.id, ruth)
            signed = approvals.signed(declared.id)
            coordinator = federation.coordinator(
                Deadlines(greet_s=30.0, stage_s=60.0, stragglers_s=4.0)
            )
            looks = itertools.count()

            def still() -> None:
                """A node dies in the second round, Ctrl-C comes before the fourth."""
                look = next(looks)
                if look == 2:
                    (federation.places.node(FAULTY) / "fault").write_text("die mask")
                if look == 4:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                coordinator.run(signed, say=print, still=still)
            federation.wait_whole()
            outcome = coordinator.run(signed, say=print)
            assert not outcome.failures
            (model,), (judged,) = outcome.models, outcome.answers
            assert (model.asked, model.summed, model.nodes) == (rounds, rounds, 4)
            if changes is SITES:
                # Sums carry no noise of their own, so there is none to audit.
                assert model.audit is None
            else:
                assert model.audit is not None
                assert model.audit.passed
            auc = next(one for one in judged.answer.estimates if one.name == "AUC")
            assert auc.interval.low > 0.5

            standing = approvals.standing(declared.id)
            document = make_document(
                standing, signed, outcome.answers,
                models=outcome.models, failures=outcome.failures, bundle=outcome.bundle,
                origin=ORIGIN, charged=federation.ledger.charges(declared.study_hash),
                run_id=outcome.run_id, at=time.time(),
            )  # fmt: skip
            reports = Reports(tmp_path / "reports")
            reports.keep(declared, document)
            approvals.end_run(run, answer_hash=document_hash(document))
            entry = approvals.release(declared.id, ruth, answer_hash=document_hash(document))
            written = reports.write(reports.kept(declared), released=entry)
            federation.ledger.verify(entries_of(federation.log))
            checked = verify_document(
                json.loads(written.answer.read_bytes()),
                federation.parties.trusted,
                origin=ORIGIN,
                log_keys=federation.log.keys,
                witness_keys=federation.log.witness_keys,
            )
            assert checked == declared
        finally:
            database.close()
        verify_graph(federation, declared, document, written)


def verify_graph(
    federation: Running, declared: Study, document: Mapping[str, Any], written: WrittenRelease
) -> None:
    """The released file predicts what the weights in the document do."""
    onnxruntime = pytest.importorskip("onnxruntime")
    query = declared_question(declared.query("mood").ask)
    assert isinstance(query, TrainQuery)
    store = federation.open_store("node-2")
    try:
        x = examples_of(query.spec, store.rows(store.people()[0], query.columns)).x
    finally:
        store.close()
    weights = model_weights(document["models"][0])
    graph = next(one.path for one in written.models if one.path.suffix == ".onnx")
    (found,) = onnxruntime.InferenceSession(str(graph)).run(None, {"features": x.astype("f4")})
    assert found == pytest.approx(predict(query.spec, weights, x), abs=1e-5)
