"""The `[policies]` section of the configuration file."""

from __future__ import annotations

import msgspec

from keys.settings import Count, FilePath, Seconds


class PoliciesSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole section."""

    #: Folder with the clinic's own rules (`*.cedar`), loaded beside the built-in packs.
    directory: FilePath = ""
    #: Folder with the clinic's own code tables (`*.toml`), which add to the built-in ones.
    tables_directory: FilePath = ""
    #: Folder with the clinic's own test cases (`*.toml`) for `havengate policy test`.
    cases_directory: FilePath = ""
    #: Roles of the clinic beside the built-in ones; a rule may name no other role.
    roles: tuple[str, ...] = ()
    #: Every record about substance use is taken as one of a 42 CFR Part 2 programme. Only a clinic
    #: that holds itself out for no such treatment (42 CFR 2.11) may say no.
    substance_use_is_part_2: bool = True
    #: An answer that took more CPU time than this is thrown away and the request denied.
    deadline_s: Seconds = 1.0
    #: Largest JSON content that is labelled, in values; anything larger is refused.
    max_values: Count = 200_000
