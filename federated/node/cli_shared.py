"""What the commands of `havengate device` share: options, opening the store, printing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from federated.errors import LedgerError, StoreError

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from federated.node.keeper import SecretKeeper
    from federated.node.store import Person, Store

DEFAULT_STORE: Final = Path(typer.get_app_dir("havengate")) / "device.store"
_EPOCH: Final = date(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class Place:
    """Which store a command works on."""

    store: Path
    key_file: Path | None

    def keeper(self) -> SecretKeeper:
        """Where its keys lie."""
        from federated.node.keeper import keeper_for

        return keeper_for(self.store, self.key_file)


StoreOption = Annotated[
    Path,
    typer.Option(
        "--store", envvar="HAVENGATE_DEVICE_STORE", help="The store's file.",
    ),
]  # fmt: skip
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        envvar="HAVENGATE_DEVICE_KEY_FILE",
        help="File of mode 0600 for the store's keys. Without it: the system's key ring.",
    ),
]
PersonOption = Annotated[
    str | None, typer.Option("--person", help="Whose, where the store holds several people.")
]
JSONOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


type Older = Literal["refuse", "say", "take"]


@contextmanager
def opened_store(context: typer.Context, *, older: Older = "refuse") -> Iterator[Store]:
    """The store, for the length of one command.

    What an older copy says is no longer so, and nothing can be changed in it: it is refused
    (`LedgerError`), unless the command only shows what was (`say` so), or erases (`take`).
    """
    from federated.node.store import Store

    place: Place = context.obj
    store = Store.open(place.store, place.keeper())
    try:
        if older != "take":
            _verify_newest(store, say_only=older == "say")
        yield store
    finally:
        store.close()


def _verify_newest(store: Store, *, say_only: bool) -> None:
    try:
        store.generations.verify()
    except LedgerError as error:
        if not say_only:
            raise
        say(str(error), err=True)


def person_of(store: Store, name: str | None) -> Person:
    """Whom a command is about. Raises `StoreError` if that is not clear."""
    if name is not None:
        return store.person(name)
    people = store.people()
    if len(people) != 1:
        raise StoreError(
            f"There are {len(people)} people in the store: say whose this is with --person."
            if people
            else "There is nobody in the store yet: import something first."
        )
    return people[0]


def now() -> int:
    """Unix seconds."""
    return int(time.time())


def plain(text: str) -> str:
    """A text that steers no terminal: what cannot be printed is a question mark."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def say(text: str, *, err: bool = False) -> None:
    """Print a text, parts of which may have come from elsewhere."""
    typer.echo(plain(text), err=err)


def print_json(found: object) -> None:
    """What a script reads; what cannot be printed is escaped."""
    text = json.dumps(found, indent=2, ensure_ascii=False)
    typer.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def time_text(at: int | None) -> str | None:
    """A time for people."""
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def day_text(number: int) -> str:
    """A day of the daily table for people."""
    return (_EPOCH + timedelta(days=number)).isoformat()
