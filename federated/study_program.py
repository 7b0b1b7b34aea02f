"""What the commands of `havengate study` work with, and the options that several of them take.

The program root opens it for the length of one command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federated.errors import ManifestError

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from audit.model import Entry
    from federated.approvals import Approvals
    from federated.ledger import Ledger
    from federated.manifest import Study
    from federated.release.files import Reports
    from federated.settings import FederatedSettings
    from federated.signed_study import SignedStudy
    from federated.standing import Standing, Standings
    from federated.training_progress import TrainingProgress
    from policies.model import Principal

type Say = Callable[[str], None]

JSONOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FileArgument = Annotated[Path, typer.Argument(help="The study's TOML file.")]
NameArgument = Annotated[str, typer.Argument(help="The study's id, or its hash.")]
KeyOption = Annotated[Path, typer.Option("--key", help="Your own key file, mode 0600.")]
SiteOption = Annotated[str, typer.Option("--site", help="For which site you speak.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run gave and kept: a line for each question, without numbers.

    `answer_hash` is that of the kept answer, empty if nothing was answered; `failures` says of each
    question without an answer why it has none.
    """

    lines: Sequence[str]
    answer_hash: str
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyProgram:
    """What one command works with.

    `sign_in` asks who it is, for a password and for a code, and returns the person with a fresh
    second factor. `run` has the deployment ask the questions and keeps the answers in `reports`,
    whose numbers are given out by a release. `entries` reads the audit log from its beginning,
    `rosters` gives every list of participants that is known. `prove` makes the proof that the entry
    at an index is in the log as witnesses saw it; empty while none did.
    """

    approvals: Approvals
    ledger: Ledger
    reports: Reports
    sign_in: Callable[[], Principal]
    run: Callable[[SignedStudy, Standing, Say], RunResult]
    entries: Callable[[], Iterable[Entry]]
    rosters: Callable[[], Iterable[Sequence[str]]]
    publish_log: Callable[[], None]
    prove: Callable[[int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReading:
    """What a command works with that only looks: no log, no key server, also while a run is on.

    `trainings` says how far each training of a study has come that was begun.
    """

    approvals: Standings
    trainings: Callable[[Study], Iterable[TrainingProgress]] = lambda _: ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyCommands:
    """How the commands get what they work with.

    `roster` is the hash of the nodes enrolled now, `nodes` how many there are if that is known.
    """

    settings: Callable[[], FederatedSettings]
    roster: Callable[[], str | None]
    open_program: Callable[[], AbstractContextManager[StudyProgram]]
    open_reading: Callable[[], AbstractContextManager[StudyReading]]
    nodes: Callable[[], int | None] = lambda: None


def read_file(file: Path) -> bytes:
    """The bytes of a file that somebody named. Raises `ManifestError`."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ManifestError(f"{file} cannot be read: {error.strerror}.") from error
