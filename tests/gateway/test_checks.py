"""What `havengate check` says of routes as a whole."""

from __future__ import annotations

import pytest

from gateway.checks import shared_host
from gateway.settings import RouteSettings


def _route(name: str, host: str = "", upstream: str = "") -> RouteSettings:
    return RouteSettings(
        name=name, kind="generic", host=host, path=f"/{name}", upstream=upstream or f"http://{name}"
    )


@pytest.mark.parametrize(
    "hosts", [("", ""), ("a.example", "A.example"), ("a.example", ""), ("", "a.example")]
)
def test_two_apps_that_a_browser_takes_for_one_site_are_named(hosts: tuple[str, str]) -> None:
    said = shared_host([_route("records", hosts[0]), _route("forum", hosts[1])])
    assert said is not None
    assert "records and forum share a host" in said
    assert "\n" not in said


def test_apps_with_hosts_of_their_own_and_two_routes_of_one_app_are_not() -> None:
    apart = [_route("records", "a.example"), _route("forum", "b.example")]
    one_app = [_route("records", upstream="http://app"), _route("files", upstream="http://app")]
    assert shared_host(apart) is None
    assert shared_host(one_app) is None
    assert shared_host([_route("records")]) is None
