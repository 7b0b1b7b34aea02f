"""Prepares the OpenBao of docker-compose.yml once; every further run finds that it is done.

Initialises it, makes Havengate's mounts, keys, policies and logins with `havengate keys set-up`,
and revokes the root token. The recovery share stays in the volume of credentials: an
administrator's token can be made with it (`bao operator generate-root`).
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ADDRESS = "https://openbao:8200"
CREDENTIALS = Path("/credentials")
DONE = CREDENTIALS / "set-up-done"
PATIENCE_S = 120.0
#: A server that is sealed, or waits for its first leader, answers so.
NOT_YET = frozenset({429, 472, 473, 501, 503})


def main() -> None:
    """Do what is not done yet."""
    if DONE.exists():
        return
    context = ssl.create_default_context(cafile="/tls/ca.pem")
    share = CREDENTIALS / "recovery.json"
    token_file = CREDENTIALS / "root.token"
    if not patiently(lambda: ask(context, "GET", "sys/init"))["initialized"]:
        made = ask(context, "PUT", "sys/init", {"recovery_shares": 1, "recovery_threshold": 1})
        keep(share, json.dumps({"recovery_key": made["recovery_keys_base64"][0]}))
        keep(token_file, made["root_token"])
    patiently(lambda: ask(context, "GET", "sys/health"))
    token = token_file.read_text(encoding="ascii")
    subprocess.run(
        [sys.executable, "-m", "havengate", "keys", "set-up", str(CREDENTIALS)],
        env={**os.environ, "VAULT_TOKEN": token},
        # It says what to write into a configuration; that of the gateway has it.
        stdout=subprocess.DEVNULL,
        check=True,
    )
    ask(context, "POST", "auth/token/revoke-self", {}, token=token)
    token_file.unlink()
    DONE.touch()


def ask(
    context: ssl.SSLContext, method: str, path: str, body: Any = None, *, token: str = ""
) -> Any:
    """One call."""
    request = Request(  # noqa: S310 - the address above
        f"{ADDRESS}/v1/{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"x-vault-token": token} if token else {},
    )
    with urlopen(request, timeout=30, context=context) as answer:  # noqa: S310 - as above
        text = answer.read()
    return json.loads(text) if text else {}


def patiently(call: Any) -> Any:
    """What the call gives, once the server is up."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except (URLError, OSError) as error:
            unready = not isinstance(error, HTTPError) or error.code in NOT_YET
            if not unready or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def keep(path: Path, text: str) -> None:
    """Write a file for its owner alone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
