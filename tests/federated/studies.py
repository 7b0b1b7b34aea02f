"""Studies, keys and a study log for tests: real ones, small."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.checkpoint import verifier_keys
from audit.log import LogWriter
from audit.note import VerifierKey
from audit.publish import Publisher
from audit.recorder import Act, End, Recorder, Who
from audit.witness import LocalSigner, Witness
from federated.draft import parse_study
from federated.manifest import Study
from federated.signed_study import SignedStudy, TrustedKeys, sign_study
from federated.study_log import HASH_DETAIL, ID_DETAIL
from tests.audit.local_witness import NAME, DirectWitness

ORIGIN = "log.example/studies"
NOW = 1_800_000_000

STUDY_TOML = """
id = "sleep-and-mood"
title = "Sleep and mood"
question = "How does mood differ with hours slept, and how sure are we?"
purpose = "HRESCH"
valid_from = 1799990000
valid_until = 1800990000
epsilon = 1.0
delta = 1e-6
minimum_cohort = 10
sites = ["north", "south"]
roster = "ROSTER"
code_hash = "CODE"

[aggregation]
threshold = 3
colluding = 1

[run_config]
rounds-timeout = 30

[[queries]]
epsilon = 0.5
delta = 5e-7
columns = ["sleep_hours"]
mechanism = "discrete_gaussian"
scale = 12.5
ask = { kind = "mean", name = "sleep", column = "sleep_hours", low = 0.0, high = 12.0 }

[[queries]]
epsilon = 0.5
delta = 5e-7
columns = ["mood", "sleep_hours"]
mechanism = "discrete_gaussian"
scale = 14.0
ask = { kind = "mean", name = "mood", column = "mood", low = 0.0, high = 10.0 }
""".replace("ROSTER", "ab" * 32).replace("CODE", "cd" * 32)


def study(changes: Mapping[str, str] | None = None) -> Study:
    """The study of these tests; `changes` replace texts of its file."""
    text = STUDY_TOML
    for old, new in (changes or {}).items():
        text = text.replace(old, new)
    return parse_study(text.encode())


class MemorySigner:
    """An Ed25519 key in memory, in one version."""

    def __init__(self, seed: bytes | None = None) -> None:
        self.key = (
            Ed25519PrivateKey.generate()
            if seed is None
            else Ed25519PrivateKey.from_private_bytes(seed)
        )

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    def public_keys(self) -> Mapping[int, bytes]:
        return {1: self.public}

    def sign(self, message: bytes) -> tuple[int, bytes]:
        return 1, self.key.sign(message)


class Parties:
    """Everybody who vouches for a study, with their keys."""

    def __init__(self) -> None:
        self.coordinator = MemorySigner()
        self.board = MemorySigner()
        self.sites = {"north": MemorySigner(), "south": MemorySigner()}

    @property
    def trusted(self) -> TrustedKeys:
        return TrustedKeys(
            coordinator=frozenset({self.coordinator.public}),
            ethics_board=frozenset({self.board.public}),
            sites={name: frozenset({key.public}) for name, key in self.sites.items()},
        )

    def sign(self, of: Study) -> SignedStudy:
        """The study with every signature it needs."""
        return SignedStudy(
            study=of,
            signatures=(
                sign_study(of, self.coordinator, role="coordinator"),
                sign_study(of, self.board, role="ethics-board"),
                *(sign_study(of, key, role="site", site=name) for name, key in self.sites.items()),
            ),
        )


class PlainSealer:
    """Seals nothing but has the form of what is sealed; nobody is named in these tests."""

    def seal_for_person(self, *, tenant: str, person: str, field: str, plaintext: bytes) -> str:
        del tenant, person, field, plaintext
        return "hg1.abcdefghijkl." + "A" * 64

    def name_for_person(self, *, tenant: str, person: str, field: str) -> str:
        return self.seal_for_person(tenant=tenant, person=person, field=field, plaintext=b"")

    def open_for_person(self, *, tenant: str, field: str, text: str) -> bytes:
        raise NotImplementedError

    def key_ids(self, *, tenant: str, person: str) -> list[str]:
        raise NotImplementedError


class StudyLog:
    """A log in a directory, published with (or without) a witness."""

    def __init__(self, directory: Path, *, witnessed: bool = True) -> None:
        self.directory = directory / "log"
        self.signer = MemorySigner()
        key = LocalSigner.load_or_create(directory / "witness" / "key")
        witness = Witness(
            directory / "witness" / "seen", name=NAME, signer=key, logs={ORIGIN: self.keys}
        )
        self.witness_keys = witness.verifier_keys()
        self.witnesses = (DirectWitness(witness),) if witnessed else ()
        self._ids = iter(range(10**9))

    @property
    def keys(self) -> tuple[VerifierKey, ...]:
        return verifier_keys(ORIGIN, self.signer)

    def writer(self) -> LogWriter:
        return LogWriter.open(self.directory, origin=ORIGIN)

    def recorder(self, writer: LogWriter) -> Recorder:
        return Recorder(
            writer,
            sealer=PlainSealer(),
            clock=lambda: float(NOW),
            ids=lambda: f"r-{next(self._ids)}",
        )

    def publisher(self, writer: LogWriter) -> Publisher:
        return Publisher(writer, self.signer, witnesses=self.witnesses)

    def append_published(self, of: Study, *, action: str = "study.publish", others: int = 0) -> int:
        """Append `others` entries, then the one that publishes the study; publish a checkpoint."""
        with self.writer() as writer:
            index = self.record(writer, of, action=action, others=others)
            with self.publisher(writer) as publisher:
                publisher.publish()
        return index

    def record(
        self, writer: LogWriter, of: Study, *, action: str = "study.publish", others: int = 0
    ) -> int:
        recorder = self.recorder(writer)
        who = Who(kind="service", name="coordinator")
        for _ in range(others):
            recorder.intent(Act(tenant="clinic", who=who, action="search"))
        act = Act(
            tenant="clinic",
            who=who,
            action=action,  # type: ignore[arg-type]
            details={HASH_DETAIL: of.study_hash, ID_DETAIL: of.id},
        )
        return recorder.outcome(recorder.intent(act), End(outcome="success"))
