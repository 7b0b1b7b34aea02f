"""Protected elements of FHIR resources: sealed on the way in, opened on the way out."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.core.enforcement import Sealer
from gateway.fhir.resources import Json
from gateway.settings import FieldSettings


class FieldPlan:
    """What is protected in the resources of one service. Made by `compile_fields`."""

    def needs(self, resource: Json) -> bool:
        """Whether `protect` would seal anything: then the person's key must be in memory."""
        raise NotImplementedError

    def protect(self, resource: Json, *, person: str, sealer: Sealer) -> Json:
        """Replace every configured element by ciphertext. `person` is `Patient/<id>`.

        Raises `UnsupportedError` for content that already looks sealed, and a `KeysError`.
        """
        raise NotImplementedError

    def sealed_texts(self, resource: Json) -> list[str]:
        """All sealed texts in it, whose keys `unprotect` needs in memory."""
        raise NotImplementedError

    def unprotect(self, resource: Json, *, person: str, sealer: Sealer) -> Json:
        """Open what was sealed. Raises `UpstreamContentError` for what is not authentic."""
        raise NotImplementedError

    def search_tokens(
        self, resource_type: str, parameter: str, value: str, *, sealer: Sealer
    ) -> list[str] | None:
        """The tokens to search for instead of a value; None if the parameter is not indexed."""
        raise NotImplementedError

    def sealed_parameters(self, resource_type: str) -> frozenset[str]:
        """Search parameters that would look into a sealed element."""
        raise NotImplementedError

    def masks(self, resource_type: str) -> frozenset[str]:
        """Paths of the elements of this type that nobody sees."""
        raise NotImplementedError


def compile_fields(settings: Sequence[FieldSettings], *, service: str) -> FieldPlan:
    """Check and compile. Raises `GatewayConfigurationError`."""
    raise NotImplementedError


def index_system(parameter: str) -> str:
    """The system of the tags under which the tokens of a search parameter are stored."""
    raise NotImplementedError
