"""Keys never make the event loop wait, and nothing that was forgotten is used."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.core.commands import LoadKeys
from gateway.core.enforcement import Enforcement, Steps
from gateway.errors import NotAtHandError
from gateway.frontends.driver import Services, drive
from gateway.protection import KeyLoader, TenantSealer, sealing_ready
from keys.settings import CacheSettings
from tests.keys.workbench import TENANT, Workbench, workbench

PLACE = {"service": "ehr", "field": "Patient.identifier"}
WHO = {"kind": "Patient", "value": "1"}


@dataclass
class Counted:
    """Makes pseudonyms that tell one making from the next."""

    made: list[str] = field(default_factory=list)
    meanwhile: Callable[[], None] = field(default=lambda: None)

    def pseudonym(self, *, tenant: str, purpose: str, person: str) -> str:
        self.made.append(f"{tenant}-{purpose}-{person}-{len(self.made)}")
        self.meanwhile()
        return self.made[-1]


@dataclass
class Bench:
    keys: Workbench
    pseudonyms: Counted
    sealer: TenantSealer
    loader: KeyLoader

    async def run[T](self, steps: Steps[T]) -> T:
        """To its end, as the gateway would."""
        services: Any = cast("Any", Services)(
            **dict.fromkeys(Services.__slots__, None) | {"keys": self.loader}
        )
        client: Any = None
        return cast("T", await drive(cast("Any", steps), services, client))

    def name(self) -> str:
        return self.sealer.pseudonym(purpose="TREAT", **WHO)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    cache = CacheSettings(refresh_s=1.0)
    with workbench(tmp_path / "keys.sqlite3", cache=cache) as keys:
        pseudonyms = Counted()
        sealer = TenantSealer(
            tenant=TENANT, keyring=keys.keyring, index=keys.index, pseudonyms=pseudonyms,
            pseudonyms_kept=3,
        )  # fmt: skip
        loader = KeyLoader(tenant=TENANT, keyring=keys.keyring, sealer=sealer)
        yield Bench(keys, pseudonyms, sealer, loader)


def at_hand[T](step: Callable[[], T]) -> Steps[T]:
    return Enforcement.at_hand(cast("Any", None), step)


def loaded(bench: Bench) -> Steps[bytes]:
    """What the handlers do: load, then seal and open at once."""
    yield LoadKeys(persons=frozenset({"Patient/1"}))
    text = bench.sealer.seal(person="Patient/1", **PLACE, plaintext=b"text")
    yield LoadKeys(texts=(text,))
    return bench.sealer.unseal(person="Patient/1", **PLACE, text=text)


USES: dict[str, Callable[[Bench], Steps[Any]]] = {
    "pseudonym": lambda bench: at_hand(bench.name),
    "token to store": lambda bench: at_hand(
        lambda: bench.sealer.token_for_write(**PLACE, value=b"7")
    ),
    "tokens to search": lambda bench: at_hand(
        lambda: bench.sealer.tokens_for_search(**PLACE, value=b"7")
    ),
    "sealed text": loaded,
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("use", USES)
async def test_a_key_table_that_does_not_answer_delays_no_other_exchange(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    warm: bool,  # noqa: FBT001
) -> None:
    if warm:
        await bench.run(USES[use](bench))
        bench.keys.clock.advance(1.5)
    asked, answer = threading.Event(), threading.Event()
    ended: list[str] = []
    generation = bench.keys.table.generation

    def held() -> int:
        asked.set()
        # On the event loop nobody could let it go on.
        answer.wait(5)
        return generation()

    monkeypatch.setattr(bench.keys.table, "generation", held)

    async def exchange(name: str, steps: Steps[Any]) -> None:
        await bench.run(steps)
        ended.append(name)

    waiting = asyncio.create_task(exchange("waiting", USES[use](bench)))
    assert await asyncio.to_thread(asked.wait, 30)
    await exchange("other", at_hand(lambda: None))
    answer.set()
    await waiting
    assert ended == ["other", "waiting"]


async def test_what_is_not_in_memory_is_refused_until_it_was_made_ready(bench: Bench) -> None:
    for ask in (
        bench.name,
        lambda: bench.sealer.token_for_write(**PLACE, value=b"7"),
        lambda: bench.sealer.tokens_for_search(**PLACE, value=b"7"),
    ):
        bench.keys.store.empty()
        with pytest.raises(NotAtHandError) as refused:
            ask()
        await bench.loader.make_ready(refused.value.name)
        ask()


async def test_a_pseudonym_is_made_once_and_is_gone_with_the_keys(bench: Bench) -> None:
    first = await bench.run(at_hand(bench.name))
    assert await bench.run(at_hand(bench.name)) == first
    bench.keys.store.empty()
    assert await bench.run(at_hand(bench.name)) != first
    assert len(bench.pseudonyms.made) == 2


async def test_an_erasure_elsewhere_ends_pseudonyms_and_names_in_the_log_in_time(
    bench: Bench,
) -> None:
    bench.keys.seal("Patient/1")
    first = await bench.run(at_hand(bench.name))
    path = bench.keys.database.engine.url.database
    assert path is not None
    ready = sealing_ready(bench.keys.keyring)
    assert ready(TENANT, ["Patient/1"])
    with workbench(Path(path), server=bench.keys.server, clock=bench.keys.clock) as other:
        other.eraser.erase(tenant=TENANT, person="Patient/1", actor="officer")
    bench.keys.clock.advance(1.0)
    assert not ready(TENANT, ["Patient/1"])
    assert await bench.run(at_hand(bench.name)) != first


async def test_what_was_begun_before_an_erasure_is_not_kept(bench: Bench) -> None:
    bench.pseudonyms.meanwhile = bench.keys.store.empty
    bench.sealer.make_ready(("TREAT", "Patient/1"))
    with pytest.raises(NotAtHandError):
        bench.name()


async def test_what_never_comes_to_hand_releases_nothing(bench: Bench) -> None:
    bench.pseudonyms.meanwhile = bench.keys.store.empty
    with pytest.raises(NotAtHandError):
        await bench.run(at_hand(bench.name))


async def test_pseudonyms_in_memory_are_bounded(bench: Bench) -> None:
    for number in range(50):
        value = str(number)
        await bench.run(
            at_hand(lambda: bench.sealer.pseudonym(purpose="TREAT", kind="Patient", value=value))  # noqa: B023
        )
        assert len(bench.sealer._names) <= 3
