"""The log for other programs: FHIR AuditEvents (BALP), OCSF events, CSV.

Lives here: what the formats share, reading through the log, and the rule that an export is recorded
before its first byte leaves. Each format is a module of its own. Exports read the log itself, not
the index, one exchange at a time; sealed names stay sealed unless `names` opens them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from audit.export.balp import BALP
from audit.export.csv import CSV
from audit.export.ocsf import OCSF
from audit.recorder import Act, End
from audit.search import Exchange, Names, read_exchanges, reveal

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from audit.criteria import Criteria
    from audit.index import EntrySource
    from audit.ports import PersonSealer
    from audit.recorder import Begun, Recorder, Who


class Format(Protocol):
    """One way to write exchanges down."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        ...

    def head(self) -> bytes:
        """What comes before all rows."""
        ...

    def rows(self, exchange: Exchange, names: Names | None, origin: str) -> Iterator[bytes]:
        """Lines for one exchange. Without `names` whoever is sealed stays sealed."""
        ...


FORMATS: Final[Mapping[str, Format]] = {one.name: one for one in (BALP(), OCSF(), CSV())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is to be exported, for whom. `sealer` opens names; without it they stay sealed."""

    format: Format
    criteria: Criteria
    tenant: str
    who: Who
    first: int = 0
    sealer: PersonSealer | None = None


def run_export(
    wanted: Export,
    log: EntrySource,
    recorder: Recorder,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[bytes]:
    """Yield the export's bytes, line by line, with memory that does not grow with the log.

    Before the first byte an entry of action `export` is durable; the outcome, with the number of
    lines, follows when the last was taken, or says that the export broke off. Covers the log as it
    stands at the call: the export's own entries are not in it. Raises what reading, opening or
    recording raises; then no further byte is given.
    """
    end = log.size()
    begun = recorder.intent(
        Act(
            tenant=wanted.tenant,
            who=wanted.who,
            action="export",
            service="audit",
            details={
                "format": wanted.format.name,
                "names": "revealed" if wanted.sealer else "sealed",
            },
            counts={"first": wanted.first, "end": end},
        )
    )
    lines = 0
    try:
        yield wanted.format.head()
        for exchange in _chosen(wanted, log, end, progress):
            names = reveal(exchange.newest, wanted.sealer) if wanted.sealer else None
            for line in wanted.format.rows(exchange, names, log.origin):
                lines += 1
                yield line
    except GeneratorExit:
        _end(recorder, begun, "aborted", lines)
        raise
    except BaseException:
        _end(recorder, begun, "failed", lines)
        raise
    recorder.outcome(begun, End(outcome="success", counts={"lines": lines}))


def _end(recorder: Recorder, begun: Begun, outcome: str, lines: int) -> None:
    result = End(outcome="aborted" if outcome == "aborted" else "failed", counts={"lines": lines})
    recorder.outcome(begun, result)


def _chosen(
    wanted: Export, log: EntrySource, end: int, progress: Callable[[int, int], None] | None
) -> Iterator[Exchange]:
    """Exchanges of which an entry fits, in the order in which they ended."""

    def counted() -> Iterator[tuple[int, bytes]]:
        for index, raw in log.read(wanted.first, end):
            if progress is not None and index % 4096 == 0:
                progress(index, end)
            yield index, raw

    for exchange in read_exchanges(counted()):
        if any(wanted.criteria.matches(entry) for _, entry in exchange.entries):
            yield exchange
