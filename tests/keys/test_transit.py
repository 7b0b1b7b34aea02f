"""Wrapping, epochs and keyed hashes on a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keys.errors import VaultRejectedError
from keys.ports import WrappedKey, WrapRequest
from keys.transit import MAX_BATCH_ITEMS, TransitKeyWrapper, VaultHMAC, parse_epoch
from keys.vault import VaultClient
from tests.openbao import RunningServer, running_server


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose epochs these tests may roll and trim."""
    with running_server(tmp_path_factory.mktemp("transit")) as server:
        yield server


def requests(count: int) -> list[WrapRequest]:
    return [
        WrapRequest(context=f"clinic/person-{number}".encode(), key=number.to_bytes(32))
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, MAX_BATCH_ITEMS, MAX_BATCH_ITEMS + 1])
def test_what_was_wrapped_unwraps_in_order(vault: Callable[[str], VaultClient], count: int) -> None:
    wrapper = TransitKeyWrapper(vault("gateway"))
    wrapped = wrapper.wrap(requests(count))
    assert wrapper.unwrap(wrapped) == [request.key for request in requests(count)]
    assert [item.context for item in wrapped] == [item.context for item in requests(count)]


def test_a_batch_is_never_larger_than_the_server_takes(
    vault: Callable[[str], VaultClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = vault("gateway")
    sizes: list[int] = []
    call = client.call

    def counting(method: str, path: str, body: dict[str, list[object]]) -> dict[str, object]:
        sizes.append(len(body["batch_input"]))
        return call(method, path, body)

    monkeypatch.setattr(client, "call", counting)
    TransitKeyWrapper(client).wrap(requests(2 * MAX_BATCH_ITEMS + 1))
    assert sizes == [MAX_BATCH_ITEMS, MAX_BATCH_ITEMS, 1]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(own=st.binary(min_size=1, max_size=64), other=st.binary(min_size=1, max_size=64))
def test_a_wrapped_key_does_not_unwrap_for_another_context(
    vault: Callable[[str], VaultClient], own: bytes, other: bytes
) -> None:
    wrapper = TransitKeyWrapper(vault("gateway"))
    wrapped = wrapper.wrap([WrapRequest(context=own, key=b"k" * 32)])[0]
    moved = WrappedKey(context=other, text=wrapped.text, epoch=wrapped.epoch)
    if own == other:
        assert wrapper.unwrap([moved]) == [b"k" * 32]
    else:
        with pytest.raises(VaultRejectedError):
            wrapper.unwrap([moved])


def test_one_bad_item_fails_the_whole_batch(vault: Callable[[str], VaultClient]) -> None:
    wrapper = TransitKeyWrapper(vault("gateway"))
    wrapped = wrapper.wrap(requests(3))
    wrapped[1] = WrappedKey(context=b"someone else", text=wrapped[1].text, epoch=1)
    with pytest.raises(VaultRejectedError, match="1 of 3 items, the first at 1"):
        wrapper.unwrap(wrapped)


def test_rewrap_moves_to_the_new_epoch_and_keeps_key_and_context(
    own_server: RunningServer,
) -> None:
    with own_server.client("gateway") as gateway, own_server.client("operator") as operator:
        wrapper, epochs = TransitKeyWrapper(gateway), TransitKeyWrapper(operator)
        old = wrapper.wrap(requests(3))
        new_epoch = epochs.roll()
        moved = epochs.rewrap(old)
        assert {item.epoch for item in moved} == {new_epoch}
        assert wrapper.unwrap(moved) == wrapper.unwrap(old)
        assert wrapper.wrap(requests(1))[0].epoch == new_epoch
        elsewhere = WrappedKey(context=b"someone else", text=moved[0].text, epoch=new_epoch)
        with pytest.raises(VaultRejectedError):
            wrapper.unwrap([elsewhere])
        with pytest.raises(VaultRejectedError):
            epochs.rewrap([elsewhere])


def test_what_a_trimmed_epoch_wrapped_is_dead_for_everybody(own_server: RunningServer) -> None:
    with own_server.client("gateway") as gateway, own_server.client("operator") as operator:
        wrapper, epochs = TransitKeyWrapper(gateway), TransitKeyWrapper(operator)
        old = wrapper.wrap(requests(1))
        current = epochs.roll()
        kept = epochs.rewrap(old)
        epochs.trim(current)
        assert epochs.epochs() == (current, current)
        with pytest.raises(VaultRejectedError):
            wrapper.unwrap(old)
        with pytest.raises(VaultRejectedError):
            epochs.rewrap(old)
        # An administrator who turns the minimum back down does not bring it back either.
        with own_server.embedded.administer() as admin:
            path = f"{admin.layout.transit}/keys/kek/config"
            with pytest.raises(VaultRejectedError):
                admin.call("POST", path, {"min_decryption_version": 1})
        assert wrapper.unwrap(kept) == [requests(1)[0].key]


def test_trimming_twice_is_the_same_as_once(own_server: RunningServer) -> None:
    with own_server.client("operator") as operator:
        epochs = TransitKeyWrapper(operator)
        current = epochs.roll()
        epochs.trim(current)
        epochs.trim(current)
        epochs.trim(current - 1)
        assert epochs.epochs() == (current, current)


def test_trims_below_an_epoch_that_somebody_else_began(own_server: RunningServer) -> None:
    with own_server.client("operator") as operator:
        epochs = TransitKeyWrapper(operator)
        _, before = epochs.epochs()
        operator.call("POST", f"{operator.layout.transit}/keys/kek/rotate", {}, idempotent=False)
        epochs.trim(before + 1)
        assert epochs.epochs() == (before + 1, before + 1)


def test_the_current_epoch_is_never_trimmed(own_server: RunningServer) -> None:
    with own_server.client("operator") as operator:
        epochs = TransitKeyWrapper(operator)
        _, current = epochs.epochs()
        for oldest in (current + 1, 0, -1):
            with pytest.raises(VaultRejectedError):
                epochs.trim(oldest)
        assert epochs.epochs()[1] == current


@pytest.mark.parametrize("text", ["", "vault:v0:AAAA", "vault:v1:", "v1:AAAA", "vault:v1:A A"])
def test_a_text_of_another_form_is_not_a_wrapped_key(text: str) -> None:
    with pytest.raises(VaultRejectedError):
        parse_epoch(text)


def test_keyed_hashes_are_stable_and_differ(vault: Callable[[str], VaultClient]) -> None:
    hmac = VaultHMAC(vault("gateway"))
    first = hmac.compute([b"one", b"two"])
    assert first == hmac.compute([b"one", b"two"])
    assert first[0] != first[1]
    assert [(version, len(code)) for version, code in first] == [(1, 32), (1, 32)]
    assert hmac.compute([b"one"], version=1) == first[:1]


def test_credentials_of_a_role_lie_in_closed_files(openbao: RunningServer) -> None:
    files = openbao.embedded.credentials("gateway")
    for name in (files.role_id_file, files.secret_id_file):
        assert Path(name).stat().st_mode & 0o777 == 0o600
