"""Where answers are kept between run and release, and where releases are written.

```
DIRECTORY/<study id>/answer-kept.json     from the run, closed to others; nothing is given out yet
DIRECTORY/<study id>/answer.json          released: the same bytes
DIRECTORY/<study id>/report.html          released: the page for people
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
from keys.private_files import make_private_directory, write_private

_KEPT: Final = "answer-kept.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAnswer:
    """An answer that is not given out yet."""

    directory: Path
    document: Mapping[str, Any]
    answer_hash: str


class Reports:
    """The directory of all reports."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, study: Study, document: Mapping[str, Any]) -> str:
        """Keep a run's answer, whole or not at all; return its hash. Replaces an earlier run's."""
        directory = self._directory / study.id
        try:
            if not self._directory.exists():
                make_private_directory(self._directory)
            make_private_directory(directory)
            write_private(directory / _KEPT, encode_document(document))
        except (OSError, KeysError) as error:
            raise ManifestError(f"The answer cannot be kept in {directory}: {error}") from error
        return document_hash(document)

    def kept(self, study: Study) -> KeptAnswer:
        """The answer of the newest run. Raises `ManifestError` if there is none, or another's."""
        directory = self._directory / study.id
        try:
            with (directory / _KEPT).open("rb") as file:
                data = file.read(MAX_DOCUMENT_BYTES + 1)
        except OSError as error:
            raise ManifestError(
                f"There is no answer of {study.id} yet: havengate study run {study.id}"
            ) from error
        document = parse_document(data)
        if document.get("study", {}).get("hash") != study.study_hash:
            raise ManifestError(f"The answer kept for {study.id} is another study's.")
        return KeptAnswer(
            directory=directory, document=document, answer_hash=document_hash(document)
        )

    def write(self, kept: KeptAnswer, *, released: int) -> tuple[Path, Path]:
        """Write page and answer; return their paths. `released` is the entry that says so."""
        from federated.release.report import make_report

        page, answer = kept.directory / "report.html", kept.directory / "answer.json"
        text = make_report(kept.document, answer_hash=kept.answer_hash, released=released)
        try:
            write_private(answer, encode_document(kept.document))
            write_private(page, text.encode())
        except OSError as error:
            raise ManifestError(f"The report cannot be written: {error.strerror}.") from error
        return page, answer
