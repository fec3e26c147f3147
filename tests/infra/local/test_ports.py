import socket
from collections.abc import Callable, Sequence

import pytest

from infra.local.ports import free_ports, start_on_free_ports
from infra.local.process import ServerCommand, ServerFailed

BIND = (
    "import socket, time; s = socket.create_server(('127.0.0.1', {port})); print('ready', flush=True); time.sleep(60)"
)
PythonServer = Callable[..., ServerCommand]


def test_free_ports_are_different_and_can_be_bound() -> None:
    ports = free_ports(20)

    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_server_that_lost_the_race_for_its_port_starts_on_another(python_server: PythonServer) -> None:
    asked: list[int] = []

    def command(ports: Sequence[int]) -> ServerCommand:
        asked.append(ports[0])
        return python_server(BIND.format(port=taken if len(asked) == 1 else ports[0]))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        process, ports = start_on_free_ports(1, command)

    with process:
        assert ports == (asked[1],)
        assert process.running


def test_it_gives_up_after_four_taken_ports(python_server: PythonServer) -> None:
    asked: list[int] = []

    def command(ports: Sequence[int]) -> ServerCommand:
        asked.extend(ports)
        return python_server("import sys; sys.exit('Address already in use')")

    with pytest.raises(ServerFailed, match="Address already in use"):
        start_on_free_ports(1, command)

    assert len(set(asked)) == 4


def test_any_other_failure_is_not_tried_again(python_server: PythonServer) -> None:
    asked: list[int] = []

    def command(ports: Sequence[int]) -> ServerCommand:
        asked.extend(ports)
        return python_server("import sys; sys.exit('no luck')")

    with pytest.raises(ServerFailed, match="no luck"):
        start_on_free_ports(1, command)

    assert len(asked) == 1
