"""The digest that a part bears of its own bytes: of all of them but the digest itself, which stands in its footer.

The digest is written with the part, so a run that another worker began, or that has parts of earlier runs, finds it in
their footers. The manifest has it too.
"""

from __future__ import annotations

import hashlib

PART_DIGEST = "overnight.part_digest"
NO_DIGEST = "0" * 64
# As a footer has the name, and the length of what follows it.
_BEFORE = PART_DIGEST.encode() + b"\x18\x40"


def write_digest(data: memoryview) -> None:
    """Write the digest of a part where its footer has NO_DIGEST. Raises ValueError where it has no place for one."""
    at = _find_place(data)
    if at is None:
        message = f"The footer of a part must have {PART_DIGEST}, got none as pyarrow writes it."
        raise ValueError(message)
    data[at : at + len(NO_DIGEST)] = _digest(data, at).encode()


def read_digests(data: bytes) -> tuple[str, str]:
    """Return the digest that a part bears, and that which its bytes have; two empty texts where it bears none."""
    at = _find_place(memoryview(data))
    if at is None:
        return "", ""
    return data[at : at + len(NO_DIGEST)].decode(errors="replace"), _digest(memoryview(data), at)


def _find_place(data: memoryview) -> int | None:
    # The end of a Parquet file says how long its footer is.
    start = max(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), 0)
    at = bytes(data[start:]).rfind(_BEFORE)
    place = start + at + len(_BEFORE)
    return place if at >= 0 and place + len(NO_DIGEST) <= len(data) else None


def _digest(data: memoryview, at: int) -> str:
    digest = hashlib.sha256(data[:at])
    digest.update(data[at + len(NO_DIGEST) :])
    return digest.hexdigest()
