"""Masks: the same for both of a pair, another for every other purpose, uniform, and they cancel."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats

from federated.aggregation.bits import chacha_stream
from federated.aggregation.masks import (
    expand,
    pair_mask_key,
    public_key,
    sealing_key,
    self_mask_key,
)
from federated.errors import ProtocolError

A, B, PLAN = b"a" * 32, b"b" * 32, b"p" * 32


def test_both_of_a_pair_get_one_mask_key() -> None:
    one = pair_mask_key(A, public_key(B), plan=PLAN, own="x", peer="y")
    other = pair_mask_key(B, public_key(A), plan=PLAN, own="y", peer="x")
    assert one == other


def test_keys_of_other_rounds_pairs_and_purposes_are_apart() -> None:
    keys = [
        pair_mask_key(A, public_key(B), plan=PLAN, own="x", peer="y"),
        pair_mask_key(A, public_key(B), plan=b"q" * 32, own="x", peer="y"),
        pair_mask_key(A, public_key(B), plan=PLAN, own="x", peer="z"),
        pair_mask_key(A, public_key(b"c" * 32), plan=PLAN, own="x", peer="y"),
        sealing_key(A, public_key(B), plan=PLAN, sender="x", receiver="y"),
        sealing_key(A, public_key(B), plan=PLAN, sender="y", receiver="x"),
        self_mask_key(A, plan=PLAN, node="x"),
        self_mask_key(A, plan=PLAN, node="y"),
    ]
    assert len(set(keys)) == len(keys)


def test_who_seals_and_who_opens_get_one_key() -> None:
    sealed = sealing_key(A, public_key(B), plan=PLAN, sender="x", receiver="y")
    assert sealed == sealing_key(B, public_key(A), plan=PLAN, sender="x", receiver="y")


@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little"), b"short"])
def test_refuses_a_key_that_gives_a_known_secret(point: bytes) -> None:
    with pytest.raises(ProtocolError):
        pair_mask_key(A, point, plan=PLAN, own="x", peer="y")


@pytest.mark.parametrize("bits", [1, 7, 16, 31, 32, 33, 48, 63, 64])
def test_a_mask_is_uniform_within_the_modulus(bits: int) -> None:
    mask = expand(A, dimension=40_000, modulus_bits=bits)
    assert mask.dtype == np.uint64
    assert int(mask.max()) < 1 << bits
    for at in {0, bits - 1}:
        ones = int((mask >> np.uint64(at) & np.uint64(1)).sum())
        assert abs(ones - 20_000) < 600
    if bits >= 8:
        top = np.bincount((mask >> np.uint64(bits - 8)).astype(np.int64), minlength=256)
        assert stats.chisquare(top).pvalue > 1e-6


def test_a_mask_is_a_prefix_of_a_longer_one() -> None:
    short, long = (expand(A, dimension=size, modulus_bits=40) for size in (10, 1000))
    assert np.array_equal(short, long[:10])


def test_the_stream_is_chacha20s_from_block_zero() -> None:
    nonce = bytes(8) + (7).to_bytes(8, "little")
    expected = Cipher(ChaCha20(A, nonce), mode=None).encryptor().update(bytes(100))
    assert chacha_stream(A, 7).update(bytes(100)) == expected
    # RFC 8439, appendix A.1, test vector 1: key, nonce and block counter zero.
    first = chacha_stream(bytes(32), 0).update(bytes(64))
    assert first.hex().startswith(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    )
