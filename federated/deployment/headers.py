"""What goes with each call to a SuperLink: headers on HTTP, signatures on gRPC.

The same as Flower's own interceptors put there. Those live beside the SuperLink's web framework,
whose import alone takes a node and a coordinator seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import grpc
import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import (
    FLWR_COMPONENT_NAME_METADATA_KEY,
    FLWR_PACKAGE_NAME_METADATA_KEY,
    FLWR_PACKAGE_VERSION_METADATA_KEY,
)
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.version import package_name, package_version

if TYPE_CHECKING:
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext


def version_headers(component: str) -> dict[str, str]:
    """Which Flower this is: a SuperLink refuses another minor version."""
    return {
        FLWR_PACKAGE_NAME_METADATA_KEY: package_name,
        FLWR_PACKAGE_VERSION_METADATA_KEY: package_version,
        FLWR_COMPONENT_NAME_METADATA_KEY: component,
    }


class Headers:
    """Adds headers to each HTTP call."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = dict(headers)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add them and go on (Flower's interceptor protocol)."""
        context.request.headers.update(self._headers)
        return call_next(context)


class ExecutorSignature:
    """Signs the HTTP calls that claim a run, with the secret that SuperLink and executor share."""

    def __init__(self, secret: bytes, methods: Collection[str]) -> None:
        self._secret = derive_auth_secret(secret)
        self._methods = frozenset(methods)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Sign and go on."""
        if context.rpc_method in self._methods:
            context.request.headers.update(
                create_superexec_auth_metadata(
                    auth_secret=self._secret, method=context.rpc_method, request=context.message
                )
            )
        return call_next(context)


class NodeSignature(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Signs the time of each gRPC call with the node's key, as the Fleet API asks."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = public_key_to_bytes(key.public_key())

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        """Sign and go on."""
        timestamp = now().isoformat()
        metadata = [
            *(client_call_details.metadata or ()),
            *version_headers("SuperNode").items(),
            (PUBLIC_KEY_HEADER, self._public),
            (TIMESTAMP_HEADER, timestamp),
            (SIGNATURE_HEADER, sign_message(self._key, timestamp.encode("ascii"))),
        ]
        return continuation(client_call_details._replace(metadata=metadata), request)
