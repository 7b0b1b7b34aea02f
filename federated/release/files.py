"""Where answers are kept between run and release, and where releases are written.

```
DIRECTORY/<study id>/answer-kept.json     from the run, closed to others; nothing is given out yet
DIRECTORY/<study id>/answer.json          released: the same, with what the study has cost since
DIRECTORY/<study id>/report.html          released: the page for people
DIRECTORY/<study id>/answer.proof         released: that the log says so
DIRECTORY/<study id>/model-<name>.*       released: each model, as safetensors and ONNX
DIRECTORY/<study id>/answer-kept-<run>.json   of an earlier run
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from federated.errors import ManifestError
from federated.manifest import Study
from federated.release.document import (
    MAX_DOCUMENT_BYTES,
    document_hash,
    encode_document,
    parse_document,
)
from keys.errors import KeysError
from keys.private_files import make_private_directory, read_private, write_private

PROOF: Final = "answer.proof"
_KEPT: Final = "answer-kept.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAnswer:
    """An answer that is not given out yet."""

    directory: Path
    document: Mapping[str, Any]
    answer_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenModel:
    """A model's file: its path and SHA-256 (hex), or why there is none."""

    query: str
    path: Path
    digest: str
    missing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRelease:
    """Where a release lies."""

    page: Path
    answer: Path
    models: tuple[WrittenModel, ...]


class Reports:
    """The directory of all reports."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, study: Study, document: Mapping[str, Any]) -> str:
        """Keep a run's answer, whole or not at all; return its hash. An earlier run's is moved."""
        directory = self._directory / study.id
        data = encode_document(document)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise ManifestError(f"The answer has more than {MAX_DOCUMENT_BYTES} bytes.")
        try:
            if not self._directory.exists():
                make_private_directory(self._directory)
            make_private_directory(directory)
            _set_aside(directory, study)
            write_private(directory / _KEPT, data)
        except (OSError, KeysError) as error:
            raise ManifestError(f"The answer cannot be kept in {directory}: {error}") from error
        return document_hash(document)

    def kept(self, study: Study) -> KeptAnswer:
        """The answer of the newest run. Raises `ManifestError` if there is none, or another's."""
        directory = self._directory / study.id
        if not (directory / _KEPT).exists():
            raise ManifestError(
                f"There is no answer of {study.id} yet: havengate study run {study.id}"
            )
        document = _read_kept(directory, study)
        return KeptAnswer(
            directory=directory, document=document, answer_hash=document_hash(document)
        )

    def write_proof(self, kept: KeptAnswer, proof: bytes) -> Path:
        """Write the proof that the answer was released beside it; return its path."""
        path = kept.directory / PROOF
        try:
            write_private(path, proof)
        except OSError as error:
            raise ManifestError(f"The proof cannot be written: {error.strerror}.") from error
        return path

    def write(self, kept: KeptAnswer, *, released: int) -> WrittenRelease:
        """Write answer, models and page. `released` is the log's entry that says so.

        A model's file that cannot be made here is said, and nothing of the release is held up.
        """
        from federated.release.model_files import PATTERNS, model_files
        from federated.release.report import make_report

        directory, files = kept.directory, model_files(kept.document)
        page, answer = directory / "report.html", directory / "answer.json"
        text = make_report(
            kept.document, answer_hash=kept.answer_hash, released=released, files=files
        )
        try:
            # They would be an earlier answer's: a proof that calls this one changed, another model.
            (directory / PROOF).unlink(missing_ok=True)
            for pattern in PATTERNS:
                for earlier in directory.glob(pattern):
                    earlier.unlink()
            write_private(answer, encode_document(kept.document))
            for file in files:
                if file.data is not None:
                    write_private(directory / file.name, file.data)
            write_private(page, text.encode())
        except OSError as error:
            raise ManifestError(f"The report cannot be written: {error.strerror}.") from error
        models = tuple(
            WrittenModel(
                query=file.query,
                path=directory / file.name,
                digest=file.digest,
                missing=file.missing,
            )
            for file in files
        )
        return WrittenRelease(page=page, answer=answer, models=models)


def _read_kept(directory: Path, study: Study) -> dict[str, Any]:
    try:
        data = read_private(directory / _KEPT, largest_bytes=MAX_DOCUMENT_BYTES)
    except KeysError as error:
        raise ManifestError(f"The kept answer is not to be believed: {error}") from error
    document = parse_document(data)
    said = document.get("study")
    if not isinstance(said, dict) or said.get("hash") != study.study_hash:
        raise ManifestError(f"The answer kept for {study.id} is another study's.")
    return document


def _set_aside(directory: Path, study: Study) -> None:
    """An earlier run's answer has cost something: it is not written over."""
    if (directory / _KEPT).exists():
        try:
            run = _read_kept(directory, study)["run"]["id"]
        except (ManifestError, KeyError, TypeError):
            # What cannot be read must not keep the new answer from being kept.
            run = ""
        name = run if isinstance(run, str) and run.isdecimal() else "unknown"
        (directory / _KEPT).replace(directory / f"answer-kept-{name}.json")
