from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from havengate.configuration import Configuration, load
from havengate.errors import ConfigurationError


def write(directory: Path, text: str) -> Path:
    path = directory / "havengate.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_defaults_stand_under_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load(None, {})
    assert settings.tenant == Configuration().tenant
    assert settings.keys.embedded.directory == str(tmp_path / "var/openbao")
    assert settings.keys.table_url == f"sqlite:///{tmp_path}/var/keys.sqlite3"


def test_what_opens_keys_and_log_is_refused_in_a_folder_without_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"There is no havengate\.toml in") as told:
        load(None, {"VAULT_ADDR": "https://vault:8200"}, needed=True)
    assert str(tmp_path) in str(told.value)
    # Whoever sets something means this folder.
    assert load(None, {"HAVENGATE_TENANT": "north"}, needed=True).tenant == "north"
    write(tmp_path, "")
    assert load(None, {}, needed=True) == load(None, {})


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///var/keys.sqlite3",
        "sqlite:////srv/keys.sqlite3",
        "sqlite:///a b/ü.sqlite3",
        "sqlite:///keys.sqlite3?mode=rw",
        "sqlite:///50%25.sqlite3",
        "sqlite://",
    ],
)
def test_a_database_stands_where_the_database_library_reads_the_url(
    tmp_path: Path, url: str
) -> None:
    path = write(tmp_path, f'[keys]\ntable_url = "{url}"\n')
    read = make_url(url)
    found = make_url(load(path, {}).keys.table_url)
    assert found.database == (str(tmp_path / read.database) if read.database else read.database)
    assert (found.drivername, found.query) == (read.drivername, read.query)


def test_relative_paths_are_relative_to_the_file_not_to_the_working_directory(
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path,
        """
        [audit]
        directory = "log"
        index_url = "postgresql+psycopg://db/audit"
        [keys]
        table_url = "sqlite:////srv/keys.sqlite3"
        [keys.vault.roles.gateway]
        role_id_file = "role"
        secret_id_file = "/etc/secret"
        """,
    )
    settings = load(path, {})
    assert settings.audit.directory == str(tmp_path / "log")
    assert settings.audit.index_url == "postgresql+psycopg://db/audit"
    assert settings.keys.table_url == "sqlite:////srv/keys.sqlite3"
    assert settings.keys.vault.roles["gateway"].role_id_file == str(tmp_path / "role")
    assert settings.keys.vault.roles["gateway"].secret_id_file == "/etc/secret"


def test_the_environment_stands_above_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[keys.vault]\naddress = 'https://one:8200'\n[audit]\nmax_batch = 3\n")
    settings = load(
        path,
        {"HAVENGATE_KEYS__VAULT__ADDRESS": "https://two:8200", "HAVENGATE_AUDIT__MAX_BATCH": "7"},
    )
    assert settings.keys.vault.address == "https://two:8200"
    assert settings.audit.max_batch == 7


def test_the_file_is_found_through_its_variable(tmp_path: Path) -> None:
    path = write(tmp_path, "tenant = 'north'")
    assert load(None, {"HAVENGATE_CONFIG": str(path)}).tenant == "north"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[keys.cache]\nmax_agee_s = 3", "“keys.cache.max_agee_s”. Did you mean “max_age_s”?"),
        ("[audti]\n", "“audti”. Did you mean “audit”?"),
        ("zzz = 1", "Known here: audit, federated, gateway, keys, policies, tenant."),
        ("[keys.cache]\nmax_age_s = 'soon'", "keys.cache.max_age_s"),
        ("[keys.cache]\nmax_age_s = -1", "keys.cache.max_age_s"),
        ("[keys.cache]\nmax_age_s = inf", "keys.cache.max_age_s"),
        ("[keys.cache]\nrefresh_s = inf", "keys.cache.refresh_s"),
        ("[keys.vault]\nattempts = 0", "keys.vault.attempts"),
        ("[keys\n", "is not valid TOML"),
        ("[keys]\ntable_url = 'mysql://x/y'", "must be an SQLite or PostgreSQL URL"),
        ("[keys.vault.roles.gatewy]\nrole_id_file='a'\nsecret_id_file='b'", "gatewy"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load(path, {})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_database_url_is_not_repeated_for_it_may_hold_a_password(tmp_path: Path) -> None:
    path = write(tmp_path, "[keys]\ntable_url = 'hunter2://:hunter2'")
    with pytest.raises(ConfigurationError) as caught:
        load(path, {})
    assert "hunter2" not in str(caught.value)


def test_a_database_password_survives_and_is_not_masked(tmp_path: Path) -> None:
    path = write(tmp_path, "[keys]\ntable_url = 'postgresql+psycopg://u:pa%40ss@db/keys'")
    assert load(path, {}).keys.table_url == "postgresql+psycopg://u:pa%40ss@db/keys"


def test_an_unknown_variable_fails_rather_than_being_ignored(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="HAVENGATE_KEYS__VALT__ADDRESS names no setting"):
        load(write(tmp_path, ""), {"HAVENGATE_KEYS__VALT__ADDRESS": "x"})


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Cannot read"):
        load(tmp_path / "none.toml", {})
