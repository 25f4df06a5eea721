"""Where the server listens, and who may use it."""

import ipaddress
import socket
from dataclasses import dataclass

from fiddler_run.errors import FiddlerError

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]


@dataclass(frozen=True)
class Address:
    """`port` 0 is a free port. `api_key` None lets everyone use the server."""

    host: str
    port: int
    api_key: str | None

    @property
    def names(self) -> list[str]:
        """What a browser may call the server.

        The page of another site must not reach a server on this machine by a name of its own.
        """
        if not is_loopback(self.host):
            return ["*"]
        return [*LOOPBACK_NAMES, self.host_in_url]

    @property
    def host_in_url(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def listen(self) -> socket.socket:
        """Opens the port.

        Raises:
            FiddlerError: it is in use, or the host is no address of this machine.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(found[4], family=found[0])
        except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
            reason = getattr(error, "strerror", None) or error
            raise FiddlerError(
                f"cannot listen on {self.host}:{self.port}: {reason}; choose"
                " another --port or --host"
            ) from None


def is_loopback(host: str) -> bool:
    """True if only this machine can reach this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
