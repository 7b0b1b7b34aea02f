"""The ClientApp: hands the bytes of a message to the device's own service, and its answer back.

No data, no keys, no decision here. Havengate's agent makes it with `client_app` around the service
in its own warm process; a stock SuperNode loads `app`, which reaches the service of this machine
through its socket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

#: The record, and the two keys in it, that carry a stage's bytes either way.
RECORD, PAYLOAD, STAGE = "havengate", "payload", "stage"

type Configuration = Mapping[str, bool | int | float | str]
type Respond = Callable[[int, Configuration, str, bytes], bytes]


def payload_of(content: RecordDict) -> tuple[str, bytes]:
    """Return stage and bytes of a message. Raises `ValueError` for anything else."""
    record = content.get(RECORD)
    if len(content) != 1 or not isinstance(record, ConfigRecord) or set(record) != {PAYLOAD, STAGE}:
        raise ValueError("expected one record with a stage and its bytes")
    stage, payload = record[STAGE], record[PAYLOAD]
    if not isinstance(stage, str) or not isinstance(payload, bytes):
        raise TypeError("expected a stage's name and its bytes")
    return stage, payload


def content_of(stage: str, payload: bytes) -> RecordDict:
    """Return the content of a message that carries `payload` for `stage`."""
    return RecordDict({RECORD: ConfigRecord({STAGE: stage, PAYLOAD: payload})})


def client_app(respond: Respond) -> ClientApp:
    """Return the app around `respond`: run id, run configuration, stage, bytes in; bytes out."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        stage, payload = payload_of(message.content)
        answer = respond(message.metadata.run_id, context.run_config, stage, payload)
        return Message(content_of(stage, answer), reply_to=message)

    return app


def _ask_service(run_id: int, configuration: Configuration, stage: str, payload: bytes) -> bytes:
    from federated.node.socket import Asked, ask

    return ask(Asked(run_id=run_id, configuration=configuration, stage=stage, payload=payload))


app = client_app(_ask_service)
