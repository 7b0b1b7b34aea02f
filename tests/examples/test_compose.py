"""The containers of docker-compose.yml: what they run is there, and the gateway's file is good."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from gateway.routes import compile_routes
from havengate.configuration import load

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "examples" / "compose"


def _routes(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(path.read_text("utf-8"))["gateway"]["routes"]
    return found


def test_the_gateway_in_a_container_has_the_routes_of_the_example() -> None:
    compile_routes(load(COMPOSE / "havengate.toml", {}).gateway.routes)
    ours = _routes(COMPOSE / "havengate.toml")
    for route in ours:
        assert route.pop("insecure_upstream") is True
        route["upstream"] = route["upstream"].replace("clinic:", "127.0.0.1:")
    assert ours == _routes(ROOT / "examples" / "clinic" / "havengate.toml")


def test_what_the_containers_are_told_to_run_is_in_the_image() -> None:
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    named = re.findall(r"examples/compose/[\w.]+", text)
    assert len(named) >= 4
    for name in named:
        assert (ROOT / name).is_file(), name
    copied = re.findall(r"^COPY (\w+) ", (COMPOSE / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    kept = (ROOT / ".dockerignore").read_text("utf-8")
    for folder in copied:
        assert f"!{folder}\n" in kept, folder


def test_only_the_gateway_has_a_port_and_no_secret_stands_in_the_files() -> None:
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    assert re.findall(r"ports: (.*)", text) == ['["127.0.0.1:8443:8443"]']
    for file in COMPOSE.iterdir():
        if file.is_file():
            assert not re.search(r"password\s*=\s*[\"']\w", file.read_text("utf-8")), file
