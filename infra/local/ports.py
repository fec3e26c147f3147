"""Free loopback ports, and a second chance for a server that lost the race for one."""

import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from infra.local.process import ServerCommand, ServerFailed, ServerProcess

_ATTEMPTS_MAX = 4
_TAKEN = ("already in use", "is not available on 127.0.0.1")


def start_on_free_ports(
    count: int, command: Callable[[Sequence[int]], ServerCommand]
) -> tuple[ServerProcess, tuple[int, ...]]:
    """Start `command(ports)`, again on new ports if its log says that somebody took one meanwhile.

    Returns the running server and its ports. Raises ServerFailed: at once for any other reason, else after
    four attempts.
    """
    attempts = 0
    while True:
        attempts += 1
        ports = free_ports(count)
        try:
            return ServerProcess(command(ports)), ports
        except ServerFailed as failure:
            lost_the_race = any(phrase in failure.log.lower() for phrase in _TAKEN)
            if not lost_the_race or attempts == _ATTEMPTS_MAX:
                raise


def free_ports(count: int) -> tuple[int, ...]:
    """Return `count` different TCP ports that were free on 127.0.0.1 a moment ago."""
    with ExitStack() as held:
        # All are held until the last is known, else the system may hand out one of them twice.
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return tuple(each.getsockname()[1] for each in sockets)
