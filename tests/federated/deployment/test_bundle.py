"""The app's bundle: the same everywhere, thin, and one that Flower takes."""

from __future__ import annotations

import io
import zipfile
from hashlib import sha256

from flwr.common.config import get_fab_config, get_metadata_from_config

from federated.app.bundle import installed_bundle


def test_flower_reads_the_bundle() -> None:
    config = get_fab_config(installed_bundle().content)
    assert get_metadata_from_config(config) == ("havengate/havengate-study", "1.0.0")
    assert config["tool"]["flwr"]["app"]["config"] == {"study-id": "", "study-hash": ""}


def test_the_bundle_is_the_same_each_time_and_not_compressed() -> None:
    first = installed_bundle()
    installed_bundle.cache_clear()
    assert installed_bundle() == first
    with zipfile.ZipFile(io.BytesIO(first.content)) as bundle:
        assert {one.compress_type for one in bundle.infolist()} == {zipfile.ZIP_STORED}


def test_the_bundle_lists_what_is_in_it() -> None:
    with zipfile.ZipFile(io.BytesIO(installed_bundle().content)) as bundle:
        listing = bundle.read(".info/CONTENT").decode().splitlines()
        for line in listing:
            name, digest, bits = line.split(",")
            content = bundle.read(name)
            assert (sha256(content).hexdigest(), len(content) * 8) == (digest, int(bits))


def test_the_bundle_is_thin() -> None:
    assert len(installed_bundle().content) < 10_000
