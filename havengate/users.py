"""What `havengate users` works with: the directory of accounts, beside keys and log.

Apart from `havengate.wiring`: no other command needs the directory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gateway.cli_users import UsersProgram
from gateway.identity.directory import Directory
from gateway.protection import PersonSeals
from havengate.configuration import Configuration
from havengate.wiring import open_program
from keys.kv import KVStore
from policies.model import ROLES


@contextmanager
def open_users(settings: Configuration, environ: Mapping[str, str]) -> Iterator[UsersProgram]:
    """Open what `havengate users` works with, the log included. Raises a `DirectoryError`, too."""
    identity = settings.gateway.identity
    with open_program(settings, environ) as program:
        directory = Directory.open(
            identity.database_url, settings=identity.sessions, clock=time.time
        )
        try:
            yield UsersProgram(
                directory=directory,
                kv=KVStore(program.keys.client, "gateway"),
                sealer=PersonSeals(tenant=settings.tenant, keyring=program.keys.keyring),
                recorder=program.recorder,
                tenant=settings.tenant,
                actor=program.commands.actor,
                roles=(*ROLES, *settings.policies.roles),
                clock=time.time,
                providers=identity.providers,
            )
        finally:
            directory.close()
