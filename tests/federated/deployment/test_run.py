"""A study's run over real processes: it answers, whatever a node or the SuperLink does."""

from __future__ import annotations

from tests.federated.deployment.federation import Running


def test_a_study_is_answered_by_all_nodes(federation: Running) -> None:
    outcome = federation.run(federation.approved())
    assert not outcome.failures
    (round_,) = outcome.answers
    assert round_.nodes == 5
    assert round_.people == 25
