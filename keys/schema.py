"""The tables of the key table's database, as SQLAlchemy Core sees them today.

`keys.migrations` makes them; a test compares the two. Nothing here runs.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, MetaData, Table, Text

metadata = MetaData()

#: Every data key, wrapped. A row outlives its key: after erasure it only says that this key id is
#: dead.
data_keys = Table(
    "data_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("owner_name", Text),
    Column("version", BigInteger, nullable=False),
    Column("epoch", BigInteger),
    Column("wrapped", Text),
    Column("reserved", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("retired_at", Double),
    Column("erased_at", Double),
)

#: One row. `generation` rises whenever other processes must empty their caches; no live key may be
#: wrapped by an epoch before `oldest_epoch`.
key_state = Table(
    "key_state",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
    Column("oldest_epoch", BigInteger, nullable=False),
)

#: When each epoch began, and when every key had been moved to it.
key_epochs = Table(
    "key_epochs",
    metadata,
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("began_at", Double, nullable=False),
    Column("rewrapped_at", Double),
)

#: Erasures. `subject` is a keyed tag of its own kind: it matches no `owner_name` in any backup.
key_erasures = Table(
    "key_erasures",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("key_ids", Text, nullable=False),
    Column("pseudonyms_deleted", BigInteger, nullable=False),
    Column("destroyed_at", Double, nullable=False),
    Column("backups_dead_by", Text, nullable=False),
    Column("probe", Text),
    Column("proof", Text),
    Column("log_index", BigInteger),
)

#: Who is behind a pseudonym: sealed under the person's key around two layers that two officers
#: open.
pseudonyms = Table(
    "pseudonyms",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("pseudonym", Text, primary_key=True),
    Column("owner_name", Text, nullable=False),
    Column("sealed", Text, nullable=False),
)

#: Requests to learn who is behind a pseudonym.
reidentifications = Table(
    "reidentifications",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("pseudonym", Text, nullable=False),
    Column("requested_by", Text, nullable=False),
    Column("approved_by", Text),
    Column("half_opened", Text),
    Column("expires_at", Double, nullable=False),
    Column("revealed_at", Double),
)
