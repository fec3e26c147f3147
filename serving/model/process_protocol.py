"""What a model process and its parent send each other: messages over a socket, numbers in memory that both have.

A message is JSON, a blob and file descriptors. Arrays of numbers lie in shared memory (serving/model/shared_memory.py);
objects follow in the blob as Arrow IPC: text and bytes, whose size nobody knows before, and integers and booleans with
nulls. Both sides read this file; what a running parent and a new child could disagree about has a version.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.model.shared_memory import is_opaque

# Raised with each change of what is sent: a child started after an update of the package speaks another one.
VERSION = 5
# Libraries read these when they are imported.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
Arrays = Mapping[str, npt.NDArray[Any]]

_HEADER = struct.Struct(">4sIQ")
_MAGIC = b"OvNP"
_DESCRIPTORS_MAX = 4
_PIECE = 1 << 20


@dataclass(slots=True)
class Message:
    """What was received: values, bytes, and file descriptors that the receiver now owns."""

    body: dict[str, Any]
    blob: bytes = b""
    descriptors: list[int] = field(default_factory=list)


def send_message(
    channel: socket.socket, values: Mapping[str, Any], blob: bytes = b"", descriptors: Sequence[int] = ()
) -> None:
    """Send a message; the descriptors stay open here. Raises OSError where nobody is there to receive it."""
    text = json.dumps(values).encode()
    header = _HEADER.pack(_MAGIC, len(text), len(blob))
    if descriptors:
        socket.send_fds(channel, [header], descriptors)
        header = b""
    channel.sendall(header + text)
    if blob:
        channel.sendall(blob)


def receive_message(channel: socket.socket) -> Message | None:
    """Receive a message; None where the other side has ended, or ends within it."""
    try:
        header, descriptors, _, _ = socket.recv_fds(channel, _HEADER.size, _DESCRIPTORS_MAX)
        header += _receive_exactly(channel, _HEADER.size - len(header)) if header else b""
        if len(header) < _HEADER.size:
            return None
        magic, text_bytes, blob_bytes = _HEADER.unpack(header)
        if magic != _MAGIC:
            return None
        text, blob = _receive_exactly(channel, text_bytes), _receive_exactly(channel, blob_bytes)
    except ConnectionError:
        return None
    if len(text) < text_bytes or len(blob) < blob_bytes:
        return None
    return Message(body=json.loads(text), blob=blob, descriptors=list(descriptors))


def _receive_exactly(channel: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = channel.recv(min(size - len(received), _PIECE))
        if not piece:
            break
        received += piece
    return bytes(received)


def pack_opaque(arrays: Arrays) -> tuple[list[dict[str, Any]], bytes]:
    """Return the arrays of objects as Arrow IPC, with their names and shapes."""
    opaque = {name: array for name, array in arrays.items() if is_opaque(array)}
    if not opaque:
        return [], b""
    import pyarrow as pa  # noqa: PLC0415 - a model of numbers needs none of it

    places = [{"name": name, "shape": list(array.shape)} for name, array in opaque.items()]
    sink = pa.BufferOutputStream()
    columns = [pa.array(array.reshape(-1), from_pandas=False) for array in opaque.values()]
    for column in columns:
        batch = pa.record_batch([column], ["values"])
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
    return places, sink.getvalue().to_pybytes()


def unpack_opaque(places: Sequence[Mapping[str, Any]], blob: bytes) -> dict[str, npt.NDArray[Any]]:
    """Return what `pack_opaque` has packed, as objects with None for a null."""
    if not places:
        return {}
    import pyarrow as pa  # noqa: PLC0415 - the same

    source = pa.BufferReader(blob)
    found = {}
    for place in places:
        column = pa.ipc.open_stream(source).read_all().column("values")
        # As an array of numpy's, integers beside nulls would be floats.
        is_rounded = column.null_count and pa.types.is_integer(column.type)
        objects = column.to_numpy() if len(column) and not is_rounded else np.array(column.to_pylist(), dtype=object)
        found[place["name"]] = objects.astype(object, copy=False).reshape(tuple(place["shape"]))
    return found
