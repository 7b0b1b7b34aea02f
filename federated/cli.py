"""`havengate study`: keys, plan, propose, approve, refuse, withdraw, list; `cli_run` has the rest.

The commands only ask and print. What they work with is opened by the program root for the length
of one command; the deployment stands behind `StudyProgram.run`. Errors pass through: the root
prints them and chooses the exit code. `--json` prints one JSON object.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from federated.cli_run import add_ledger, add_report, add_run, add_verify, add_watch
from federated.errors import ManifestError
from federated.study_program import (
    FileArgument,
    JSONOption,
    KeyOption,
    NameArgument,
    RunResult,
    Say,
    SiteOption,
    StudyCommands,
    StudyProgram,
    StudyReading,
    read_file,
)
from federated.telling import (
    plan_object,
    print_json,
    print_plan,
    print_study,
    say,
    show,
    stage_of,
    standing_object,
    step_line,
)

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from federated.manifest import Study
    from federated.settings import FederatedSettings

__all__ = ["RunResult", "Say", "StudyCommands", "StudyProgram", "StudyReading", "build"]


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
    _add_against(app, commands)
    add_run(app, commands)
    add_watch(app, commands)
    add_report(app, commands)
    add_verify(app, commands)
    _add_list(app, commands)
    add_ledger(app, commands)
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
        say(found, f"Keep {file} to yourself. To enrol: {public}", as_json=as_json)


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
        from federated.planning import NO_ROSTER, plan_study

        draft, roster = parse_draft(read_file(file)), commands.roster()
        if roster is None and draft.file.roster is None and out is not None:
            raise ManifestError(
                "No node is enrolled here yet, and a whole study names those that may take part: "
                "havengate federated up, then plan again."
            )
        found = plan_study(
            draft,
            people=people,
            level=commands.settings().run.level,
            roster=roster or NO_ROSTER,
            code_hash=installed_code_hash(),
            nodes=commands.nodes(),
        )
        if out is not None:
            out.write_text(encode_toml(found.study), encoding="utf-8")
        if as_json:
            print_json(plan_object(found))
            return
        print_plan(found)
        if out is not None:
            typer.echo(f"The whole study is in {out}: havengate study propose {out}")


def _add_propose(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command()
    def propose(file: FileArgument, *, as_json: JSONOption = False) -> None:
        """Propose a study. From then on it cannot be changed."""
        from federated.draft import parse_study
        from federated.planning import verify_claims

        study = parse_study(read_file(file))
        verify_claims(study)
        _verify_floor(study, commands.settings())
        with commands.open_program() as program:
            standing = program.approvals.propose(study, program.sign_in())
        show(standing, as_json=as_json)


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
        shown: Annotated[
            str, typer.Option("--hash", help="The hash that you read; nothing else is signed.")
        ] = "",
        as_json: JSONOption = False,
    ) -> None:
        """Approve a study with your signature. The last approval that is needed publishes it."""
        from federated.approvals import FileSigner

        signer = FileSigner.load(key_file)
        with commands.open_program() as program:
            standing = program.approvals.standing(name)
            if not as_json:
                print_study(standing)
            standing = program.approvals.approve(
                name,
                program.sign_in(),
                capacity=capacity,
                site=site,
                signer=signer,
                # What was read before signing in is what is signed.
                shown=shown or standing.study.study_hash,
            )
        show(standing, as_json=as_json)


def _add_against(app: typer.Typer, commands: StudyCommands) -> None:
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
        show(standing, as_json=as_json)

    @app.command()
    def withdraw(
        name: NameArgument,
        *,
        capacity: Annotated[
            Literal["ethics-board", "site", "coordinator"],
            typer.Option("--as", help="In which capacity."),
        ],
        site: SiteOption = "",
        as_json: JSONOption = False,
    ) -> None:
        """Stop a published study: it neither runs nor is released any more. Final."""
        with commands.open_program() as program:
            standing = program.approvals.withdraw(
                name, program.sign_in(), capacity=capacity, site=site
            )
        show(standing, as_json=as_json)


def _add_list(app: typer.Typer, commands: StudyCommands) -> None:
    @app.command("list")
    def list_(*, as_json: JSONOption = False) -> None:
        """Show every study and where it stands."""
        with commands.open_reading() as reading:
            standings = reading.approvals.all()
        if as_json:
            print_json([standing_object(one) for one in standings])
            return
        for one in standings:
            typer.echo(f"{one.study.id:32}  {stage_of(one):12}  {one.study.title}")
        if not standings:
            typer.echo("No study was proposed yet.")

    @app.command()
    def show(name: NameArgument, *, as_json: JSONOption = False) -> None:
        """Show one study: what it asks, what it costs, who approved it."""
        with commands.open_reading() as reading:
            standing = reading.approvals.standing(name)
        if as_json:
            print_json(standing_object(standing))
            return
        print_study(standing)
        for step in standing.record.steps:
            typer.echo(step_line(step))


def _verify_floor(study: Study, settings: FederatedSettings) -> None:
    if study.minimum_cohort < settings.minimum_cohort:
        raise ManifestError(
            f"The study asks from {study.minimum_cohort} people on; here it must be "
            f"{settings.minimum_cohort} at least ([federated] minimum_cohort)."
        )
