"""What every `keys.ports.KeyWrapper` must do: the fake and the real one pass the same tests."""

from __future__ import annotations

import os

import pytest

from keys.errors import VaultRejectedError
from keys.ports import KeyWrapper, WrappedKey, WrapRequest


def requests_of(count: int) -> list[WrapRequest]:
    return [
        WrapRequest(context=f"context {number}".encode(), key=os.urandom(32))
        for number in range(count)
    ]


class KeyWrapperContract:
    """Give `gateway` (wraps, unwraps) and `operator` (rolls, rewraps, trims) as fixtures."""

    def test_unwraps_what_it_wrapped_in_order(self, gateway: KeyWrapper) -> None:
        requests = requests_of(450)
        wrapped = gateway.wrap(requests)
        assert [item.context for item in wrapped] == [item.context for item in requests]
        assert gateway.unwrap(wrapped) == [item.key for item in requests]
        assert gateway.unwrap(wrapped[::-1]) == [item.key for item in requests][::-1]

    def test_nothing_in_gives_nothing_out(self, gateway: KeyWrapper, operator: KeyWrapper) -> None:
        assert gateway.wrap([]) == []
        assert gateway.unwrap([]) == []
        assert operator.rewrap([]) == []

    def test_wraps_under_the_current_epoch(self, gateway: KeyWrapper) -> None:
        [wrapped] = gateway.wrap(requests_of(1))
        oldest, current = gateway.epochs()
        assert oldest <= current == wrapped.epoch

    def test_the_same_key_is_never_wrapped_alike(self, gateway: KeyWrapper) -> None:
        [request] = requests_of(1)
        assert len({item.text for item in gateway.wrap([request] * 10)}) == 10

    def test_another_context_does_not_open(self, gateway: KeyWrapper) -> None:
        first, second = gateway.wrap(requests_of(2))
        moved = WrappedKey(context=second.context, text=first.text, epoch=first.epoch)
        with pytest.raises(VaultRejectedError):
            gateway.unwrap([moved])

    @pytest.mark.parametrize("text", ["", "plain", "vault:v1:AAAA", "vault:v999:" + "A" * 88])
    def test_what_was_never_wrapped_does_not_open(self, gateway: KeyWrapper, text: str) -> None:
        with pytest.raises(VaultRejectedError):
            gateway.unwrap([WrappedKey(context=b"context", text=text, epoch=1)])

    def test_one_that_does_not_open_fails_the_call(self, gateway: KeyWrapper) -> None:
        good = gateway.wrap(requests_of(3))
        bad = WrappedKey(context=b"elsewhere", text=good[1].text, epoch=good[1].epoch)
        with pytest.raises(VaultRejectedError):
            gateway.unwrap([good[0], bad, good[2]])

    def test_rewrapping_moves_to_the_new_epoch_and_keeps_the_key(
        self, gateway: KeyWrapper, operator: KeyWrapper
    ) -> None:
        requests = requests_of(3)
        wrapped = gateway.wrap(requests)
        rolled = operator.roll()
        assert rolled == operator.epochs()[1] == wrapped[0].epoch + 1
        assert gateway.unwrap(wrapped) == [item.key for item in requests]
        moved = operator.rewrap(wrapped)
        assert {item.epoch for item in moved} == {rolled}
        assert gateway.unwrap(moved) == [item.key for item in requests]

    def test_trimming_destroys_what_older_epochs_wrapped(
        self, gateway: KeyWrapper, operator: KeyWrapper
    ) -> None:
        requests = requests_of(2)
        old = gateway.wrap(requests)
        current = operator.roll()
        moved = operator.rewrap(old)
        operator.trim(current)
        assert operator.epochs() == (current, current)
        assert gateway.unwrap(moved) == [item.key for item in requests]
        with pytest.raises(VaultRejectedError):
            gateway.unwrap(old)
        with pytest.raises(VaultRejectedError):
            operator.rewrap(old)

    def test_trimming_twice_changes_nothing_and_the_future_cannot_be_trimmed(
        self, operator: KeyWrapper
    ) -> None:
        current = operator.roll()
        operator.trim(current)
        operator.trim(current)
        operator.trim(1)
        assert operator.epochs() == (current, current)
        with pytest.raises(VaultRejectedError):
            operator.trim(current + 1)
