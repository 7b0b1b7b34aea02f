"""Retention: only whole old bundles go, announced first, and never because a clock is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from audit import retention
from audit.checkpoint import verifier_keys
from audit.entry import encode_entry, parse_entry
from audit.errors import LogUnavailableError, RetentionError, VerificationError
from audit.log import LogWriter
from audit.proof import prove, verify_proof
from audit.publish import Publisher
from audit.reader import LogReader
from audit.recorder import log_entry
from audit.retention import (
    SIX_YEARS_DAYS,
    PrunePlan,
    first_kept,
    first_readable,
    plan_prune,
    prune,
    retained_from,
)
from audit.tiles import bundle_path
from audit.verify import examine_log, verify_log
from audit.waiting import Sequenced
from tests.audit.conftest import MemorySigner
from tests.audit.records import make_entry

ORIGIN = "log.example/retention"
DAY_US = 86_400 * 1_000_000
NOW_S = 2_000_000_000.0
NOW_US = int(NOW_S * 1e6)
COUNT = 1500
#: One entry each five days: the last is a day old, 438 of them lie within six years.
OLD = COUNT - 439


class Kept:
    """A log with a writer and a publisher, as a gateway has it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.signer = MemorySigner()
        self.writer = LogWriter.open(directory, origin=ORIGIN)
        self.publisher = Publisher(self.writer, self.signer)
        self.publish = True

    @property
    def reader(self) -> LogReader:
        return LogReader(self.directory)

    def append(self, entry: bytes) -> Sequenced:
        done = self.writer.append(entry)
        if self.publish:
            self.publisher.publish()
        return done

    def fill(self, times: list[int]) -> None:
        entries = [
            encode_entry(make_entry("intent", request=f"r{number}", time=time_us))
            for number, time_us in enumerate(times)
        ]

        async def append() -> None:
            await asyncio.gather(*[self.writer.append_async(entry) for entry in entries])

        asyncio.run(append())
        self.publisher.publish()

    def plan(self, **changes: object) -> PrunePlan:
        values: dict[str, object] = {"retention_days": SIX_YEARS_DAYS, "now_s": NOW_S}
        return plan_prune(self.reader, **values | changes)  # type: ignore[arg-type] # test values

    def verify(self) -> None:
        keys = verifier_keys(ORIGIN, self.signer)
        verify_log(self.directory, keys, retained_from=self.retained_from())

    def first_readable(self) -> int:
        return first_readable(self.reader, now_s=NOW_S, retention_days=SIX_YEARS_DAYS)

    def retained_from(self) -> int:
        return retained_from(self.reader, now_s=NOW_S, retention_days=SIX_YEARS_DAYS)

    def close(self) -> None:
        self.publisher.close()
        self.writer.close()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path / "log")
    yield made
    made.close()


def regular(count: int = COUNT) -> list[int]:
    return [NOW_US - DAY_US - 5 * DAY_US * n for n in reversed(range(count))]


def test_whole_old_bundles_go_and_everything_left_is_provable(kept: Kept) -> None:
    kept.fill(regular())
    keys = verifier_keys(ORIGIN, kept.signer)
    pruned_entry = kept.reader.entry(5)
    plan = kept.plan()
    # 1061 entries are older; the boundary is a whole number of bundles below that.
    assert (plan.first, plan.retained_from, plan.mark) == (0, OLD // 256 * 256, None)
    assert prune(plan, kept.reader, kept, now_s=NOW_S) == 1024
    assert first_kept(kept.directory) == kept.retained_from() == 1024
    kept.verify()
    with pytest.raises(VerificationError):
        kept.reader.entry(5)
    checkpoint = (kept.directory / "checkpoint").read_bytes()
    size = kept.reader.published_size()
    # Even what is gone is provable to whoever holds it, because tiles stay.
    for index, entry in ((5, pruned_entry), (1024, kept.reader.entry(1024))):
        proof = prove(kept.directory, index, checkpoint=checkpoint, size=size, entry=entry)
        verify_proof(proof, entry, keys)


def test_the_log_says_that_it_was_pruned(kept: Kept) -> None:
    kept.fill(regular())
    plan = kept.plan()
    prune(plan, kept.reader, kept, now_s=NOW_S)
    entry = parse_entry(kept.reader.entry(COUNT))
    assert (entry.stage, entry.action) == ("log", "log.prune")
    assert entry.counts == {
        "cutoff_us": NOW_US - SIX_YEARS_DAYS * DAY_US,
        "entries": 1024,
        "retained_from": 1024,
    }


def test_nothing_within_six_years_goes(kept: Kept) -> None:
    kept.fill(regular(600)[-430:])
    assert kept.plan().count == 0
    assert prune(kept.plan(), kept.reader, kept, now_s=NOW_S) == 0
    assert kept.reader.size() == 430
    with pytest.raises(RetentionError, match="six years"):
        kept.plan(retention_days=365)
    assert kept.plan(retention_days=365, shorter=True).retained_from == 256


def test_one_young_entry_keeps_all_that_follow(kept: Kept) -> None:
    times = regular()
    times[300] = NOW_US - DAY_US
    kept.fill(times)
    assert kept.plan(silences={299}).retained_from == 256


def test_nothing_goes_before_its_announcement_is_published(kept: Kept) -> None:
    kept.fill(regular())
    plan = kept.plan()
    kept.publish = False
    with pytest.raises(LogUnavailableError, match="not published"):
        prune(plan, kept.reader, kept, now_s=NOW_S, publish_timeout_s=0.2)
    assert first_kept(kept.directory) == 0
    assert all((kept.directory / bundle_path(n)).exists() for n in range(4))
    kept.publisher.publish()
    again = kept.plan()
    assert again.mark == COUNT
    prune(again, kept.reader, kept, now_s=NOW_S)
    assert kept.reader.size() == COUNT + 1
    kept.verify()


@pytest.mark.parametrize("crash_at", range(4))
def test_a_crash_between_bundles_is_finished_by_the_next_run(
    kept: Kept, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.fill(regular())
    real, calls = retention._remove_bundle, 0

    def crash(path: Path) -> None:
        nonlocal calls
        if calls == crash_at:
            raise KeyboardInterrupt
        calls += 1
        real(path)

    monkeypatch.setattr(retention, "_remove_bundle", crash)
    with pytest.raises(KeyboardInterrupt):
        prune(kept.plan(), kept.reader, kept, now_s=NOW_S)
    kept.verify()
    assert first_kept(kept.directory) == 256 * crash_at
    monkeypatch.setattr(retention, "_remove_bundle", real)
    plan = kept.plan()
    assert plan.mark is not None
    prune(plan, kept.reader, kept, now_s=NOW_S)
    assert first_kept(kept.directory) == 1024
    # The interrupted run had announced it: there is no second announcement.
    assert kept.reader.size() == COUNT + 1
    kept.verify()


def test_a_forged_announcement_prunes_nothing_more(kept: Kept) -> None:
    kept.fill(regular())
    forged = {"cutoff_us": NOW_US, "entries": COUNT, "retained_from": 1280}
    kept.append(log_entry("log.prune", time_s=NOW_S, request="forged", counts=forged))
    plan = kept.plan()
    assert plan.retained_from == 1024
    prune(plan, kept.reader, kept, now_s=NOW_S)
    assert first_kept(kept.directory) == 1024


@pytest.mark.parametrize("published", [True, False])
def test_a_forged_announcement_hides_no_loss(
    kept: Kept,
    published: bool,  # noqa: FBT001 - a parameter of pytest
) -> None:
    """Who may write to the log, or to its journal, can say that young entries were pruned."""
    kept.fill(regular())
    kept.publish = published
    forged = {"cutoff_us": NOW_US, "entries": COUNT, "retained_from": 1280}
    kept.append(log_entry("log.prune", time_s=NOW_S, request="forged", counts=forged))
    for number in range(5):
        (kept.directory / bundle_path(number)).unlink()
    with pytest.raises(VerificationError, match=r"000: it is missing \(4 more"):
        kept.verify()


def test_an_announcement_that_is_not_published_hides_no_loss(kept: Kept) -> None:
    kept.fill(regular())
    kept.publish = False
    forged = {"cutoff_us": NOW_US, "entries": COUNT, "retained_from": 512}
    kept.append(log_entry("log.prune", time_s=NOW_S, request="forged", counts=forged))
    for number in range(2):
        (kept.directory / bundle_path(number)).unlink()
    with pytest.raises(VerificationError, match="000: it is missing"):
        kept.verify()


def test_what_remains_shows_that_nothing_younger_went(kept: Kept) -> None:
    """Also where the first entry to be kept is the first of a bundle."""
    old = [NOW_US - (SIX_YEARS_DAYS + 20) * DAY_US + n for n in range(512)]
    young = [NOW_US - SIX_YEARS_DAYS * DAY_US + n * 5 * DAY_US for n in range(438)]
    kept.fill(old + young)
    plan = kept.plan()
    assert prune(plan, kept.reader, kept, now_s=NOW_S) == 256
    assert parse_entry(kept.reader.entry(plan.retained_from)).time < plan.cutoff_us
    kept.verify()


def test_a_bundle_lost_in_the_middle_does_not_hide_those_before_it(kept: Kept) -> None:
    kept.fill(regular())
    (kept.directory / bundle_path(2)).unlink()
    assert first_kept(kept.directory) == 0


def test_what_is_missing_at_the_beginning_without_being_old_is_never_skipped(kept: Kept) -> None:
    kept.fill(regular())
    assert kept.first_readable() == 0
    prune(kept.plan(), kept.reader, kept, now_s=NOW_S)
    assert kept.first_readable() == 1024
    (kept.directory / bundle_path(4)).unlink()
    with pytest.raises(VerificationError, match="entries before 1280 are missing"):
        kept.first_readable()


def test_lost_bundles_are_no_retention(kept: Kept) -> None:
    kept.fill(regular())
    (kept.directory / bundle_path(0)).unlink()
    with pytest.raises(VerificationError):
        kept.verify()


def test_a_lost_bundle_above_the_boundary_is_a_loss(kept: Kept) -> None:
    kept.fill(regular())
    prune(kept.plan(), kept.reader, kept, now_s=NOW_S)
    (kept.directory / bundle_path(4)).unlink()
    report = examine_log(kept.directory, verifier_keys(ORIGIN, kept.signer), retained_from=1024)
    assert report.problem_count > 0


def test_refuses_when_the_newest_entry_is_in_the_future(kept: Kept) -> None:
    kept.fill(regular())
    with pytest.raises(RetentionError, match="future"):
        kept.plan(now_s=NOW_S - 3 * 86_400)


@pytest.mark.parametrize("years", [1, 3, 7])
def test_refuses_when_the_clock_jumped_ahead(kept: Kept, years: int) -> None:
    kept.fill(regular())
    with pytest.raises(RetentionError, match="clock may have"):
        kept.plan(now_s=NOW_S + years * 365 * 86_400)
    # The same once a writer with that clock has appended entries.
    jumped = [NOW_US + years * 365 * DAY_US + n for n in range(300)]
    for number, time_us in enumerate(jumped):
        kept.writer.append(encode_entry(make_entry("intent", request=f"j{number}", time=time_us)))
    with pytest.raises(RetentionError, match=f"--silence {COUNT - 1}"):
        kept.plan(now_s=NOW_S + years * 365 * 86_400 + 60)


def test_a_silence_that_was_real_can_be_said(kept: Kept) -> None:
    times = regular()
    for n in range(1300, COUNT):
        times[n] = times[1299] + 60 * DAY_US + n
    kept.fill(times)
    now_s = (times[-1] + DAY_US) / 1e6
    with pytest.raises(RetentionError, match="--silence 1299"):
        kept.plan(now_s=now_s)
    assert kept.plan(now_s=now_s, silences={1299}).count > 0


def test_refuses_when_the_cutoff_moves_further_than_time(kept: Kept) -> None:
    kept.fill(regular())
    prune(kept.plan(), kept.reader, kept, now_s=NOW_S)
    longer = kept.plan(retention_days=SIX_YEARS_DAYS + 400)
    assert longer.count == 0
    kept.append(
        log_entry(
            "log.prune",
            time_s=NOW_S,
            request="x",
            counts={"retained_from": 1024, "cutoff_us": longer.cutoff_us},
        )
    )
    with pytest.raises(RetentionError, match="cutoff would move by 400 days"):
        kept.plan()
    assert kept.plan(shorter=True).count == 0


def test_the_newest_bundle_always_stays(kept: Kept) -> None:
    kept.fill(regular(600))
    late = kept.plan(now_s=NOW_S + 20 * 365 * 86_400, silences={599})
    assert late.retained_from == 512


def test_an_empty_log_has_nothing_to_prune(kept: Kept) -> None:
    kept.publisher.publish()
    assert kept.plan().count == 0
    assert kept.retained_from() == 0


def test_a_writer_goes_on_and_opens_again_after_pruning(kept: Kept) -> None:
    kept.fill(regular())
    prune(kept.plan(), kept.reader, kept, now_s=NOW_S)
    kept.append(encode_entry(make_entry("intent", request="after", time=NOW_US)))
    kept.close()
    kept.writer = LogWriter.open(kept.directory, origin=ORIGIN)
    kept.publisher = Publisher(kept.writer, kept.signer)
    assert kept.writer.size == COUNT + 2
    kept.append(encode_entry(make_entry("intent", request="later", time=NOW_US)))
    kept.verify()
