"""`havengate study`: run, watch, report, verify, ledger. Mounted by `federated.cli`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from federated.study_program import (
    JSONOption,
    NameArgument,
    RunResult,
    Say,
    StudyCommands,
    StudyProgram,
    read_file,
)
from federated.telling import (
    answer_lines,
    model_file_lines,
    model_file_object,
    progress_line,
    progress_object,
    say,
    step_line,
    step_object,
)

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from federated.approvals import StartedRun
    from federated.node.enrolment import Enrolment
    from federated.training_progress import TrainingProgress

_LOOK_S: Final = 1.0
#: Exit code of a run that left a question without an answer.
_INCOMPLETE: Final = 1


def add_run(app: typer.Typer, commands: StudyCommands) -> None:
    """Mount `run`."""

    @app.command()
    def run(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Ask an approved study's questions. What is reserved for it is spent, whatever comes."""
        tell: Say = _tell_nothing if as_json else typer.echo
        with commands.open_program() as program:
            # An older backup that nobody noticed would let people be asked too often.
            program.ledger.verify(program.entries())
            principal = program.sign_in()
            if program.approvals.standing(name).stage == "approved":
                # The last word was given, and what follows from it was lost with its process.
                program.approvals.publish(name)
            program.publish_log()
            started = program.approvals.start_run(name, principal)
            result = _ran(program, started, name, tell)
        kept = (
            f"What was answered is kept. To give it out: havengate study report {name}"
            if result.answer_hash
            else "Nothing was answered."
        )
        say(
            {
                "study": name,
                "answers": list(result.lines),
                "failures": dict(result.failures),
                "answer_hash": result.answer_hash,
            },
            "\n".join([*result.lines, kept]),
            as_json=as_json,
        )
        if result.failures:
            raise typer.Exit(_INCOMPLETE)


def _ran(program: StudyProgram, started: StartedRun, name: str, tell: Say) -> RunResult:
    """Run, and say in the log how it ended, whatever ends it: Ctrl-C and bugs, too."""
    from federated.errors import CohortError, FederatedError, RunEndedError

    try:
        result = program.run(started.signed, program.approvals.standing(name), tell)
    except FederatedError as error:
        program.approvals.end_run(started, error)
        raise
    except BaseException as error:
        # Never its text: nobody knows what is in it.
        program.approvals.end_run(started, RunEndedError(type(error).__name__))
        raise
    if result.answer_hash:
        program.approvals.end_run(started, answer_hash=result.answer_hash)
    else:
        program.approvals.end_run(started, CohortError("No question was answered."))
    return result


def _tell_nothing(_: str) -> None:
    pass


def add_watch(app: typer.Typer, commands: StudyCommands) -> None:
    """Mount `watch`."""

    @app.command()
    def watch(
        name: NameArgument,
        *,
        timeout_s: Annotated[float, typer.Option(help="How long to look.")] = 3600.0,
        as_json: JSONOption = False,
    ) -> None:
        """Follow a study step by step until it is released, refused or past its time.

        A training that runs is shown round by round, and never its weights.
        """
        told, deadline = 0, time.monotonic() + timeout_s
        seen: dict[str, TrainingProgress] = {}
        with commands.open_reading() as reading:
            while True:
                standing = reading.approvals.standing(name)
                for step in standing.record.steps[told:]:
                    say(step_object(step), step_line(step), as_json=as_json)
                told = len(standing.record.steps)
                for progress in reading.trainings(standing.study):
                    if seen.get(progress.query) != progress:
                        seen[progress.query] = progress
                        say(progress_object(progress), progress_line(progress), as_json=as_json)
                over = standing.released or standing.stage in {"refused", "withdrawn", "expired"}
                if over or time.monotonic() > deadline:
                    return
                time.sleep(_LOOK_S)


def add_report(app: typer.Typer, commands: StudyCommands) -> None:
    """Mount `report`."""

    @app.command()
    def report(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Release a study's answer: as JSON, and as a page for people."""
        from federated.release.document import document_hash, with_charges

        with commands.open_program() as program:
            study = program.approvals.standing(name).study
            kept = program.reports.kept(study)
            # A ledger that lost rows would make the total smaller than it is.
            program.ledger.verify(program.entries())
            principal = program.sign_in()
            # A run that came to nothing since has cost something, too.
            document = with_charges(kept.document, study, program.ledger.charges(study.study_hash))
            given = replace(kept, document=document, answer_hash=document_hash(document))
            entry = program.approvals.release(
                name, principal, answer_hash=given.answer_hash, kept_hash=kept.answer_hash
            )
            written = program.reports.write(given, released=entry)
            proof = program.prove(entry)
            shown = str(program.reports.write_proof(given, proof)) if proof else ""
        found = {
            "report": str(written.page),
            "answer": str(written.answer),
            "answer_hash": given.answer_hash,
            "log_index": entry,
            "proof": shown,
        }
        missing = "none yet: no witness has cosigned the release; report again, later"
        lines = [*answer_lines(given.document), f"Report {written.page}"]
        lines += [f"Answer {written.answer}", f"Proof  {shown or missing}"]
        lines += model_file_lines(written.models)
        told = {name: given.document[name] for name in ("alarms", "answers", "models")}
        files = [model_file_object(one) for one in written.models]
        say({**found, **told, "model_files": files}, "\n".join(lines), as_json=as_json)


def add_verify(app: typer.Typer, commands: StudyCommands) -> None:
    """Mount `verify`."""

    @app.command()
    def verify(
        file: Annotated[Path, typer.Argument(help="answer.json of a release.")],
        *,
        enrolment: Annotated[
            Path | None, typer.Option(help="Whose word counts. Default: this machine's.")
        ] = None,
        proof: Annotated[
            Path | None,
            typer.Option(help="That the log says so. Default: answer.proof beside it, if there."),
        ] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Check a released answer with public keys alone: signatures, publication, what it says."""
        from federated.deployment.places import Places
        from federated.node.enrolment import parse_enrolment
        from federated.release.document import parse_document

        places = Places(directory=Path(commands.settings().directory))
        believed = parse_enrolment(read_file(enrolment or places.federation))
        beside = file.with_name("answer.proof")
        given = proof or (beside if beside.exists() else None)
        found = _verified(
            parse_document(read_file(file)), believed, None if given is None else read_file(given)
        )
        proven = (
            "signed by all it needed, and published. The answer says what was signed; each cost, "
            "and the total of the rounds that it lists, are those that follow from it."
        )
        lines = [f"WARNING: {words}" for words in found["alarms"]]
        lines.append(f"{found['study']}: {proven}")
        if found["released"]:
            lines.append("The log says that this very answer was released.")
        else:
            lines.append("No proof of its release was given: the coordinator's word alone are")
            lines += [f"    {path}" for path in found["word"]]
        lines.append(f"Hash of the answer, as the entry of its release must say: {found['answer']}")
        say(found, "\n".join(lines), as_json=as_json)


def _verified(
    document: Mapping[str, Any], believed: Enrolment, proof: bytes | None
) -> dict[str, Any]:
    from federated.release.alarms import alarm_words
    from federated.release.check import COORDINATORS_WORD
    from federated.release.document import document_hash
    from federated.release.proof import verify_believed

    study = verify_believed(document, believed, proof=proof)
    return {
        "study": study.id,
        "hash": study.study_hash,
        "answer": document_hash(document),
        "alarms": alarm_words(document),
        "released": proof is not None,
        "word": [] if proof is not None else list(COORDINATORS_WORD),
    }


def add_ledger(app: typer.Typer, commands: StudyCommands) -> None:
    """Mount `ledger`."""

    @app.command()
    def ledger(
        *,
        participant: Annotated[
            list[str] | None, typer.Option(help="Whose budget to show: device:NAME, site:NAME.")
        ] = None,
        mend: Annotated[
            bool, typer.Option("--mend", help="Add what the log knows and the ledger lost.")
        ] = False,
        as_json: JSONOption = False,
    ) -> None:
        """Verify the ledger against the audit log, and show what people's data have cost."""
        with commands.open_program() as program:
            added = (
                program.ledger.mend(program.entries(), rosters=program.rosters()) if mend else ()
            )
            rows = program.ledger.verify(program.entries())
            balances = {name: program.ledger.balance(name) for name in participant or ()}
        found = {
            "rows": rows,
            "mended": len(added),
            "balances": {
                name: {"epsilon": one.epsilon, "delta": one.delta, "cap": one.cap}
                for name, one in balances.items()
            },
        }
        lines = [f"{rows} rows, as they were written; {len(added)} added."]
        lines += [
            f"{name}: ε = {one.epsilon:.3g} of {one.cap:.3g} at δ = {one.delta:.1g}"
            for name, one in balances.items()
        ]
        say(found, "\n".join(lines), as_json=as_json)
