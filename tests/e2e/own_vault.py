"""A key server of the operator's own: a real OpenBao that does not unseal itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from keys.openbao_process import find_binary
from tests.havengate.command import run
from tests.interop.processes import free_port, get
from tests.openbao import wait_until

TOKEN = "administrator"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnVault:
    """The server; `configuration` names it and the logins that `keys set-up` left."""

    address: str
    configuration: str

    def seal(self) -> None:
        """Seal it. It stays so."""
        answer = get(f"{self.address}/v1/sys/seal", method="POST", headers={"x-vault-token": TOKEN})
        assert answer.status == 204
        assert json.loads(get(f"{self.address}/v1/sys/seal-status").body)["sealed"] is True


@contextmanager
def own_vault(directory: Path) -> Iterator[OwnVault]:
    """Start one and prepare it as docs/operating.md says."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    words = ("server", "-dev", "-dev-no-store-token", f"-dev-root-token-id={TOKEN}")
    with (
        TemporaryFile() as said,
        subprocess.Popen(
            [find_binary(), *words, f"-dev-listen-address=127.0.0.1:{port}"],
            stdout=said,
            stderr=said,
            cwd=directory,
        ) as process,
    ):
        try:
            wait_until(lambda: _is_up(address))
            yield OwnVault(address=address, configuration=_prepared(directory, address))
        finally:
            process.kill()


def _prepared(directory: Path, address: str) -> str:
    text = f"[keys.vault]\naddress = '{address}'\nattempts = 1\n"
    (directory / "havengate.toml").write_text(text, encoding="utf-8")
    credentials = directory / "credentials"
    code, _, err = run(directory, "keys", "set-up", str(credentials), env={"VAULT_TOKEN": TOKEN})
    assert code == 0, err
    for role in ("gateway", "operator", "audit"):
        text += (
            f"[keys.vault.roles.{role}]\n"
            f"role_id_file = '{credentials / role}.role-id'\n"
            f"secret_id_file = '{credentials / role}.secret-id'\n"
        )
    return text


def _is_up(address: str) -> bool:
    try:
        return get(f"{address}/v1/sys/health").status == 200
    except OSError:
        return False
