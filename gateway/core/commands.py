"""What the core asks of the world, and what it hears in return.

An exchange is a generator: it yields one command at a time and is sent that command's answer, so
the order of things stands in one place and no command can be overtaken. Whoever drives it
(`gateway.frontends.driver`) carries commands out and decides nothing; a test drives it with a
script. Every command that can go wrong has an answer for that: `Failed`. A driver never raises into
the core.

An exchange can have many messages: `Receive` and `Release` may be asked for as often as there are
pieces, in either direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from audit.recorder import Act, Begun, End
from gateway.core.messages import RequestHead, ResponseHead
from gateway.identity.model import Identified, NotIdentified
from gateway.routes import Route
from policies.consent import Consent


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A command could not be carried out. `code` is the stable code of the error behind it.

    `who` must act. `timed_out` distinguishes an app that is slow from one that is broken.
    """

    code: str
    who: Literal["caller", "upstream", "operator"] = "operator"
    message: str = ""
    timed_out: bool = False


class Signal(Enum):
    """Answers that carry nothing else."""

    DONE = "done"
    END = "end"  #: there are no more pieces
    GONE = "gone"  #: the client has gone away


# --- Who, and what is known of the persons concerned ----------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Identify:
    """Find out who asks. Answer: `Identified`, `NotIdentified` or `Failed`."""

    head: RequestHead
    route: Route


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFacts:
    """Learn how the principal stands to patients and what these consented to.

    Answer: `Facts` or `Failed`. Patients are ids without type.
    """

    route: Route
    identified: Identified
    patients: frozenset[str] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """`care_team`: those of the patients asked for whom the principal treats.

    `consents` has an entry, maybe empty, for every patient asked for.
    """

    care_team: frozenset[str] = field(default=frozenset(), repr=False)
    consents: dict[str, tuple[Consent, ...]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assert:
    """Get the signed statement about who asks, for the app behind `route`.

    Answer: the compact JWT as `bytes`, or `Failed`.
    """

    route: Route
    identified: Identified


# --- The log --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordIntent:
    """Make the intent durable. Answer: `Recorded` or `Failed`."""

    act: Act


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The intent is durable."""

    begun: Begun


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOutcome:
    """Make the outcome durable. Answer: `Signal.DONE` or `Failed`: then nothing is released."""

    begun: Begun
    end: End


# --- Keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadKeys:
    """Bring into memory the keys of persons to seal for and of texts to open.

    Answer: `Signal.DONE` or `Failed`. After it `Sealer` needs no I/O.
    """

    persons: frozenset[str] = field(default=frozenset(), repr=False)
    texts: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeReady:
    """Bring into memory what a step lacked (`NotAtHandError.name`), so that it can begin anew.

    Answer: `Signal.DONE` or `Failed`.
    """

    name: tuple[str, str] | None = field(default=None, repr=False)


# --- The client -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveAll:
    """The whole body of the request, of at most `limit` bytes.

    Answer: `bytes`, `Signal.GONE`, or `Failed` with code `gateway.too_large` and who `caller`.
    """

    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receive:
    """The next piece of the body. Answer: `bytes`, `Signal.END` or `Signal.GONE`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Respond:
    """Send a whole answer. Answer: `Signal.DONE` or `Signal.GONE`."""

    head: ResponseHead
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartResponse:
    """Send the head of an answer that comes in pieces. Answer: `Signal.DONE` or `Signal.GONE`."""

    head: ResponseHead


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Send a piece of the answer. Answer: `Signal.DONE` or `Signal.GONE`."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndResponse:
    """The answer is complete; `broken` if it must look cut off. Answer: `Signal.DONE`."""

    broken: bool = False


# --- The app behind -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Send a whole request and read the whole answer, of at most `limit` bytes.

    Answer: `Fetched` or `Failed` with who `upstream`.
    """

    route: Route
    head: RequestHead
    body: bytes = field(default=b"", repr=False)
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A whole answer, content codings undone."""

    head: ResponseHead
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUpstream:
    """Begin a request whose body, if any, follows in pieces. Answer: `Signal.DONE` or `Failed`."""

    route: Route
    head: RequestHead
    has_body: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SendUpstream:
    """The next piece of the request's body; None ends it.

    Answer: `Signal.DONE`, `Signal.END` if the app has answered and wants no more, or `Failed`.
    """

    data: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveHead:
    """The head of the app's answer. Answer: `ResponseHead` or `Failed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveUpstream:
    """The next piece of the app's answer. Answer: `bytes`, `Signal.END` or `Failed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseUpstream:
    """Drop the connection of the streamed request, if one is open. Answer: `Signal.DONE`."""


# --- The gateway's own pages ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOwn:
    """Let the gateway's own pages (sign-in, keys, break-glass) answer. They keep their own log.

    Answer: `Fetched` or `Failed`.
    """

    head: RequestHead
    body: bytes = field(repr=False)


Command = (
    Identify
    | LoadFacts
    | Assert
    | RecordIntent
    | RecordOutcome
    | LoadKeys
    | MakeReady
    | ReceiveAll
    | Receive
    | Respond
    | StartResponse
    | Release
    | EndResponse
    | Fetch
    | OpenUpstream
    | SendUpstream
    | ReceiveHead
    | ReceiveUpstream
    | CloseUpstream
    | AnswerOwn
)

Answer = (
    Identified | NotIdentified | Facts | Recorded | Fetched | ResponseHead | Failed | Signal | bytes
)
