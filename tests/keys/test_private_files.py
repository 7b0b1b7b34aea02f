"""Files that hold secrets: what is read and what is refused."""

from __future__ import annotations

import datetime as dt
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keys import loopback_tls
from keys.errors import KeyConfigurationError
from keys.loopback_tls import LoopbackTLS, ensure_loopback_tls
from keys.private_files import (
    close_to_others,
    private_lock,
    read_private,
    remove_leftovers,
    verify_own_directory,
    write_private,
)

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


class CutError(BaseException):
    """The process ended here."""


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_secret_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "secret"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(KeyConfigurationError, match="regular file"):
        read_private(pipe)


def test_only_what_a_crash_left_of_this_file_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".k.0123456789abcdef"
    names = [".k.0123456789abcde", ".k.0123456789abcdefa", ".k.0123456789abcdeX", "k", "k.bak",
             ".kk.0123456789abcdef", ".other.0123456789abcdef"]  # fmt: skip
    for name in (left.name, *names):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path / "k")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


def test_a_lock_is_held_alone_and_closed_to_others(tmp_path: Path) -> None:
    path, inside = tmp_path / "lock", []

    def count() -> None:
        for _ in range(50):
            with private_lock(path):
                inside.append(1)
                assert len(inside) == 1
                inside.pop()
                # Who holds it may remove it as the last that it does: who comes next makes a new
                # one, and who waited for this one goes there too.
                path.unlink()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(count) for _ in range(4)]:
            done.result(timeout=60)
    with private_lock(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.timeout(60)
def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="lock"), private_lock(tmp_path / "lock"):
        pass
    assert not (tmp_path / "victim").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_secret_that_belongs_to_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, b"x")
    assert read_private(path) == b"x"
    os.chown(path, 12345, 12345)
    with pytest.raises(KeyConfigurationError, match="belongs to user 12345"):
        read_private(path)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_directory_in_which_others_can_replace_files_is_refused(
    tmp_path: Path, mode: int
) -> None:
    verify_own_directory(tmp_path)
    tmp_path.chmod(mode)
    with pytest.raises(KeyConfigurationError, match="go-w"):
        verify_own_directory(tmp_path)
    with pytest.raises(KeyConfigurationError, match="must be a directory"):
        verify_own_directory(tmp_path / "missing")


def test_a_file_is_closed_and_a_link_is_not_followed_to_do_so(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    close_to_others(file)
    file.write_text("x")
    file.chmod(0o664)
    link.symlink_to(file)
    with pytest.raises(KeyConfigurationError, match="regular file"):
        close_to_others(link)
    assert stat.S_IMODE(file.stat().st_mode) == 0o664
    close_to_others(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


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
