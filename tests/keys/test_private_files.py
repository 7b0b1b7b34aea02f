"""Files that hold secrets: what is read and what is refused."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keys import loopback_tls
from keys.errors import KeyConfigurationError
from keys.loopback_tls import LoopbackTLS, ensure_loopback_tls
from keys.private_files import read_private, write_private

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


class CutError(BaseException):
    """The process ended here."""


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_secret_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "secret"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(KeyConfigurationError, match="regular file"):
        read_private(pipe)


# --- The loopback certificate ---------------------------------------------------------------------


def fits(paths: LoopbackTLS) -> bool:
    certificate = x509.load_pem_x509_certificate(paths.certificate_file.read_bytes())
    certificate.verify_directly_issued_by(
        x509.load_pem_x509_certificate(paths.ca_file.read_bytes())
    )
    key = load_pem_private_key(paths.key_file.read_bytes(), None)
    return key.public_key() == certificate.public_key()


@pytest.mark.parametrize("write", [1, 2, 3])
def test_a_renewal_cut_short_after_any_write_leaves_a_key_that_fits_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    ensure_loopback_tls(tmp_path / "tls", NOW)
    later = NOW + dt.timedelta(days=4.5 * 365)
    seen = 0

    def cut(path: Path, content: bytes) -> None:
        nonlocal seen
        write_private(path, content)
        seen += 1
        if seen == write:
            raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(loopback_tls, "write_private", cut)
        with pytest.raises(CutError):
            ensure_loopback_tls(tmp_path / "tls", later)
    # The clock may have been set right in between.
    for now in (NOW, later):
        assert fits(ensure_loopback_tls(tmp_path / "tls", now))


def test_a_certificate_made_while_the_clock_was_ahead_is_replaced(tmp_path: Path) -> None:
    ensure_loopback_tls(tmp_path / "tls", NOW)
    before = NOW - dt.timedelta(days=30)
    paths = ensure_loopback_tls(tmp_path / "tls", before)
    certificate = x509.load_pem_x509_certificate(paths.certificate_file.read_bytes())
    assert certificate.not_valid_before_utc <= before
