"""Plain HTTP to a server on this machine: no proxy, and no TLS context to build at every poll."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

HOST = "127.0.0.1"
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answered; status 0 if it did not, and then the text says why."""

    status: int
    text: str

    @property
    def ok(self) -> bool:
        """Whether the server did as asked."""
        return self.status in range(HTTPStatus.OK, HTTPStatus.MULTIPLE_CHOICES)


def ask(method: str, port: int, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Send one request without a body. Raises nothing: a server that is still starting is an answer too."""
    connection = HTTPConnection(HOST, port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return Answer(status=response.status, text=response.read().decode(errors="replace"))
    except (OSError, HTTPException) as error:
        return Answer(status=0, text=f"{type(error).__name__}: {error}")
    finally:
        connection.close()
