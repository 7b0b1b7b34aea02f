"""What the guides tell people to write works as they wrote it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.havengate.command import run, run_json

GUIDE = Path(__file__).parents[2] / "docs" / "rules.md"


def test_the_rule_the_case_and_the_request_of_the_guide_work(tmp_path: Path) -> None:
    blocks = re.findall(
        r"```(?:toml|cedar)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL
    )
    names = ("havengate.toml", "rules/own.cedar", "cases/own.toml", "request.toml")
    for name, block in zip(names, blocks, strict=True):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(block, encoding="utf-8")
    checked = {rule["id"] for rule in run_json(tmp_path, "policy", "check")["rules"]}
    assert "clinic.desk-and-messages" in checked
    assert run_json(tmp_path, "policy", "test")["failed"] == []
    code, out, _ = run(tmp_path, "policy", "explain", str(tmp_path / "request.toml"))
    assert (code, out.splitlines()[0]) == (0, "Allowed.")
