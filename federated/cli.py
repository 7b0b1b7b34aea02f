"""`havengate study`: plan, propose, approve, run, watch, report, list; keys and the ledger.

The commands only ask and print. What they work with is opened by the program root for the length
of one command; the deployment stands behind `StudyProgram.run`. Errors pass through: the root
prints them and chooses the exit code. `--json` prints one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from federated.errors import ManifestError

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from audit.model import Entry
    from federated.approvals import Approvals, Standing
    from federated.ledger import Ledger
    from federated.manifest import Study
    from federated.planning import StudyPlan
    from federated.release.files import Reports
    from federated.settings import FederatedSettings
    from federated.signed_study import SignedStudy
    from policies.model import Principal

type Say = Callable[[str], None]

JSONOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FileArgument = Annotated[Path, typer.Argument(help="The study's TOML file.")]
NameArgument = Annotated[str, typer.Argument(help="The study's id, or its hash.")]
KeyOption = Annotated[Path, typer.Option("--key", help="Your own key file, mode 0600.")]
SiteOption = Annotated[str, typer.Option("--site", help="For which site you speak.")]

_LOOK_S = 1.0
#: Stands for the nodes of a study that is only looked at.
_NO_ROSTER = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyProgram:
    """What one command works with.

    `sign_in` asks who it is, for a password and for a code, and returns the person with a fresh
    second factor. `run` has the deployment ask the questions and keeps the answers in `reports`; it
    returns a line for each, without its numbers: these are given out by a release. `entries` reads
    the audit log from its beginning, `rosters` gives every list of participants that is known.
    """

    approvals: Approvals
    ledger: Ledger
    reports: Reports
    sign_in: Callable[[], Principal]
    run: Callable[[SignedStudy, Standing, Say], Sequence[str]]
    entries: Callable[[], Iterable[Entry]]
    rosters: Callable[[], Iterable[Sequence[str]]]
    publish_log: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyCommands:
    """How the commands get what they work with. `roster` is the hash of the nodes enrolled now."""

    settings: Callable[[], FederatedSettings]
    roster: Callable[[], str | None]
    open_program: Callable[[], AbstractContextManager[StudyProgram]]


def build(commands: StudyCommands) -> typer.Typer:
    """Return the sub-commands, ready to be mounted under `study`."""
    app = typer.Typer(
        no_args_is_help=True,
        help="Questions to people's data where it lies: plan, approve, run, report.",
    )
    _add_key(app)
    _add_plan(app, commands)
    _add_propose(app, commands)
    _add_approve(app, commands)
    _add_run(app, commands)
    _add_watch(app, commands)
    _add_report(app, commands)
    _add_verify(app, commands)
    _add_list(app, commands)
    _add_ledger(app, commands)
    return app


def _add_key(app: typer.Typer) -> None:
    @app.command()
    def key(
        file: Annotated[Path, typer.Argument(help="Where to keep it; made with mode 0600.")],
        *,
        as_json: JSONOption = False,
    ) -> None:
        """Make a key to approve with, and print the public half for enrolment."""
        from federated.approvals import FileSigner

        public = FileSigner.create(file).public_key.hex()
        found = {"file": str(file), "public_key": public}
        _say(found, f"Keep {file} to yourself. To enrol: {public}", as_json=as_json)


def _add_plan(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command()
    def plan(
        file: FileArgument,
        *,
        people: Annotated[int, typer.Option(min=1, help="How many are expected to take part.")],
        out: Annotated[Path | None, typer.Option(help="Write the whole study here.")] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Show what a study costs and how sure its answers will be, before anything is asked."""
        from federated.code_hash import installed_code_hash
        from federated.draft import encode_toml, parse_draft
        from federated.planning import plan_study

        draft, roster = parse_draft(_read(file)), commands.roster()
        if roster is None and draft.file.roster is None and out is not None:
            raise ManifestError(
                "No node is enrolled here yet, and a whole study names those that may take part: "
                "havengate federated up, then plan again."
            )
        found = plan_study(
            draft,
            people=people,
            level=commands.settings().run.level,
            roster=roster or _NO_ROSTER,
            code_hash=installed_code_hash(),
        )
        if out is not None:
            out.write_text(encode_toml(found.study), encoding="utf-8")
        if as_json:
            _print_json(_plan_object(found))
            return
        _print_plan(found)
        if out is not None:
            typer.echo(f"The whole study is in {out}: havengate study propose {out}")


def _add_propose(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command()
    def propose(file: FileArgument, *, as_json: JSONOption = False) -> None:
        """Propose a study. From then on it cannot be changed."""
        from federated.draft import parse_study
        from federated.planning import verify_claims

        study = parse_study(_read(file))
        verify_claims(study)
        _verify_floor(study, commands.settings())
        with commands.open_program() as program:
            standing = program.approvals.propose(study, program.sign_in())
        _show(standing, as_json=as_json)


def _add_approve(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command()
    def approve(
        name: NameArgument,
        *,
        capacity: Annotated[
            Literal["ethics-board", "site"], typer.Option("--as", help="In which capacity.")
        ],
        key_file: KeyOption,
        site: SiteOption = "",
        as_json: JSONOption = False,
    ) -> None:
        """Approve a study with your signature. The last approval that is needed publishes it."""
        from federated.approvals import FileSigner

        signer = FileSigner.load(key_file)
        with commands.open_program() as program:
            if not as_json:
                _print_study(program.approvals.standing(name))
            standing = program.approvals.approve(
                name, program.sign_in(), capacity=capacity, site=site, signer=signer
            )
        _show(standing, as_json=as_json)

    @app.command()
    def refuse(
        name: NameArgument,
        *,
        capacity: Annotated[
            Literal["ethics-board", "site"], typer.Option("--as", help="In which capacity.")
        ],
        site: SiteOption = "",
        as_json: JSONOption = False,
    ) -> None:
        """Refuse a study. One word against is enough, and it is final."""
        with commands.open_program() as program:
            standing = program.approvals.refuse(
                name, program.sign_in(), capacity=capacity, site=site
            )
        _show(standing, as_json=as_json)


def _add_run(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command()
    def run(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Ask an approved study's questions. What is reserved for it is spent, whatever comes."""
        say: Say = _nothing if as_json else typer.echo
        with commands.open_program() as program:
            # An older backup that nobody noticed would let people be asked too often.
            program.ledger.verify(program.entries())
            principal = program.sign_in()
            program.publish_log()
            started = program.approvals.start_run(name, principal)
            lines = _ran(program, started, name, say)
        _say(
            {"study": name, "answers": list(lines)},
            "\n".join([*lines, f"To give it out: havengate study report {name}"]),
            as_json=as_json,
        )


def _ran(program: StudyProgram, started: Any, name: str, say: Say) -> Sequence[str]:
    """Run, and say in the log how it ended, whatever ends it: Ctrl-C and bugs, too."""
    from federated.errors import CohortError, FederatedError, RunEndedError

    try:
        lines = program.run(started.signed, program.approvals.standing(name), say)
        answers = program.reports.kept(started.signed.study).document["answers"]
    except FederatedError as error:
        program.approvals.end_run(started, error)
        raise
    except BaseException as error:
        # Never its text: nobody knows what is in it.
        program.approvals.end_run(started, RunEndedError(type(error).__name__))
        raise
    nothing = None if answers else CohortError("No question was answered.")
    program.approvals.end_run(started, nothing)
    return lines


def _add_watch(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command()
    def watch(
        name: NameArgument,
        *,
        timeout_s: Annotated[float, typer.Option(help="How long to look.")] = 3600.0,
        as_json: JSONOption = False,
    ) -> None:
        """Follow a study step by step until it is released, refused or past its time."""
        told, deadline = 0, time.monotonic() + timeout_s
        with commands.open_program() as program:
            while True:
                standing = program.approvals.standing(name)
                for step in standing.record.steps[told:]:
                    _say(_step_object(step), _step_line(step), as_json=as_json)
                told = len(standing.record.steps)
                over = standing.released or standing.stage in {"refused", "expired"}
                if over or time.monotonic() > deadline:
                    return
                time.sleep(_LOOK_S)


def _add_report(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command()
    def report(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Release a study's answer: as JSON, and as a page for people."""
        with commands.open_program() as program:
            kept = program.reports.kept(program.approvals.standing(name).study)
            entry = program.approvals.release(name, program.sign_in(), answer_hash=kept.answer_hash)
            page, answer = program.reports.write(kept, released=entry)
        found = {
            "report": str(page),
            "answer": str(answer),
            "answer_hash": kept.answer_hash,
            "log_index": entry,
        }
        lines = [*_answer_lines(kept.document), f"Report {page}", f"Answer {answer}"]
        _say({**found, "answers": kept.document["answers"]}, "\n".join(lines), as_json=as_json)


def _add_verify(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command()
    def verify(
        file: Annotated[Path, typer.Argument(help="answer.json of a release.")],
        *,
        enrolment: Annotated[
            Path | None, typer.Option(help="Whose word counts. Default: this machine's.")
        ] = None,
        as_json: JSONOption = False,
    ) -> None:
        """Check a released answer with public keys alone: signatures, publication, what it says."""
        from federated.deployment.places import Places
        from federated.node.enrolment import parse_enrolment
        from federated.release.check import verify_document
        from federated.release.document import document_hash, parse_document

        believed = parse_enrolment(
            _read(enrolment or Places(directory=Path(commands.settings().directory)).federation)
        )
        document = parse_document(_read(file))
        study = verify_document(
            document,
            replace(believed.trusted(), own_site=""),
            origin=believed.origin,
            log_keys=believed.log_verifiers(),
            witness_keys=believed.witness_verifiers(),
        )
        found = {"study": study.id, "hash": study.study_hash, "answer": document_hash(document)}
        _say(
            found,
            f"{study.id}: signed by all it needed, published, and the answer says what was signed."
            f"\nHash of the answer, as the entry of its release must say: {found['answer']}",
            as_json=as_json,
        )


def _add_list(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command("list")
    def list_(*, as_json: JSONOption = False) -> None:
        """Show every study and where it stands."""
        with commands.open_program() as program:
            standings = program.approvals.all()
        if as_json:
            _print_json([_standing_object(one) for one in standings])
            return
        for one in standings:
            typer.echo(f"{one.study.id:32}  {_stage(one):12}  {one.study.title}")
        if not standings:
            typer.echo("No study was proposed yet.")

    @app.command()
    def show(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Show one study: what it asks, what it costs, who approved it."""
        with commands.open_program() as program:
            standing = program.approvals.standing(name)
        if as_json:
            _print_json(_standing_object(standing))
            return
        _print_study(standing)
        for step in standing.record.steps:
            typer.echo(_step_line(step))


def _add_ledger(app: typer.Typer, commands: StudyCommands) -> None:
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
        _say(found, "\n".join(lines), as_json=as_json)


def _answer_lines(document: Mapping[str, Any]) -> Iterator[str]:
    for one in document["answers"]:
        yield f"{one['query']}, {one['people']:,} people:"
        for estimate in one["estimates"]:
            low, high, level = estimate["low"], estimate["high"], 100 * estimate["level"]
            yield (
                f"    {estimate['name']}: {estimate['value']:.4g} {estimate['unit']} "
                f"({low:.4g} to {high:.4g} at {level:g} %)"
            )
    for name, why in document["failures"].items():
        yield f"{name}: no answer. {why}"
    privacy = document["privacy"]
    yield f"This cost each person ε = {privacy['epsilon']:.3g} at δ = {privacy['delta']:.1g}."


def _verify_floor(study: Study, settings: FederatedSettings) -> None:
    if study.minimum_cohort < settings.minimum_cohort:
        raise ManifestError(
            f"The study asks from {study.minimum_cohort} people on; here it must be "
            f"{settings.minimum_cohort} at least ([federated] minimum_cohort)."
        )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ManifestError(f"{file} cannot be read: {error.strerror}.") from error


def _nothing(_: str) -> None:
    pass


def _stage(standing: Standing) -> str:
    return "released" if standing.released else standing.stage


def _standing_object(standing: Standing) -> dict[str, Any]:
    study = standing.study
    return {
        "id": study.id,
        "hash": study.study_hash,
        "title": study.title,
        "question": study.question,
        "stage": _stage(standing),
        "missing": list(standing.missing),
        "epsilon": study.epsilon,
        "delta": study.delta,
        "trust_model": study.trust_model,
        "minimum_cohort": study.minimum_cohort,
        "columns": list(study.columns),
        "steps": [_step_object(step) for step in standing.record.steps],
    }


def _step_object(step: Any) -> dict[str, Any]:
    return {
        "step": step.kind,
        "role": step.role,
        "site": step.site,
        "at": step.at_us // 1_000_000,
        "log_index": step.log_index,
    }


def _step_line(step: Any) -> str:
    at = datetime.fromtimestamp(step.at_us / 1_000_000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    who = f"{step.role} {step.site}".strip()
    return f"{at}  {step.kind:8}  {who:24}  log entry {step.log_index}"


def _show(standing: Standing, *, as_json: bool) -> None:
    waits = f", waits for {', '.join(standing.missing)}" if standing.missing else ""
    _say(
        _standing_object(standing),
        f"{standing.study.id}: {_stage(standing)}{waits}",
        as_json=as_json,
    )


def _print_study(standing: Standing) -> None:
    study = standing.study
    typer.echo(f"{study.title}\n{study.question}\n")
    typer.echo(f"Stage        {_stage(standing)}")
    if standing.missing:
        typer.echo(f"Waits for    {', '.join(standing.missing)}")
    typer.echo(f"Reads        {', '.join(study.columns)}")
    typer.echo(f"Costs        ε = {study.epsilon:.3g} at δ = {study.delta:.1g} for each person")
    typer.echo(f"Cohort       {study.minimum_cohort} people at least")
    typer.echo(f"Trust model  {study.trust_model.replace('_', ' ')}")
    typer.echo(f"Hash         {study.study_hash}\n")


def _plan_object(found: StudyPlan) -> dict[str, Any]:
    return {
        "id": found.study.id,
        "hash": found.study.study_hash,
        "epsilon": found.epsilon,
        "delta": found.delta,
        "queries": [
            {
                "query": one.query,
                "columns": sorted(one.columns),
                "epsilon": one.cost.epsilon,
                "delta": one.cost.delta,
                "mechanism": one.noise.mechanism,
                "scale": one.noise.scale,
                "people": one.people,
                "refused": one.refused,
                "expected": [
                    {
                        "name": error.name,
                        "unit": error.unit,
                        "half_width": error.half_width,
                        "half_width_without_noise": error.half_width_without_noise,
                    }
                    for error in one.expected
                ],
            }
            for one in found.queries
        ],
    }


def _print_plan(found: StudyPlan) -> None:
    typer.echo(f"{found.study.title}\n{found.study.question}\n")
    for one in found.queries:
        typer.echo(
            f"{one.query}: ε = {one.cost.epsilon:.3g} at δ = {one.cost.delta:.1g}, "
            f"{one.noise.mechanism.replace('_', ' ')}; reads {', '.join(sorted(one.columns))}"
        )
        if one.refused:
            typer.echo(f"    would be refused: {one.refused}")
        for error in one.expected:
            typer.echo(
                f"    {error.name}: ± {error.half_width:.3g} {error.unit} "
                f"(± {error.half_width_without_noise:.3g} without noise) at {100 * one.level:g} %"
            )
    typer.echo(
        f"\nAll together cost each person ε = {found.epsilon:.3g} at δ = {found.delta:.1g}. "
        f"With {found.queries[0].people:,} people. Nothing was asked yet."
    )


def _say(found: object, text: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(found)
    else:
        typer.echo(text)


def _print_json(found: object) -> None:
    typer.echo(json.dumps(found, ensure_ascii=False))
