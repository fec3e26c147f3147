"""What a run has put out, held against an undisturbed run and against its source."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tasks.batch.manifest import find_manifest
from tasks.storage import LocalStorage, Storage

Keys = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What lies in the folder of one run: the digest of every object by name, and the keys of every row."""

    digests: Mapping[str, str]
    keys: Keys
    published: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How an output differs from what it must be."""

    rows_missing: int
    rows_doubled: int
    parts_differing: tuple[str, ...]
    leftovers: tuple[str, ...]

    @property
    def bytes_equal(self) -> bool:
        """Whether each part is there with the same bytes, and no other."""
        return not self.parts_differing

    @property
    def kept(self) -> bool:
        """Whether what is promised holds: each row once, in the same bytes."""
        return self.bytes_equal and not self.rows_missing and not self.rows_doubled


def read_output(storage: Storage, run: str, key: str) -> Output:
    """Read every object in the folder of a run, torn writes too; the rows are those that readers see."""
    names = _names(storage, run)
    manifest = find_manifest(storage, run)
    digests, keys = {}, [np.empty(0, np.int64)]
    for name in names:
        data = storage.read(name) or b""
        digests[name] = hashlib.sha256(data).hexdigest()
        if not _hidden(name):
            keys.append(pq.read_table(io.BytesIO(data), columns=[key], partitioning=None).column(key).to_numpy())
    return Output(
        digests=digests,
        keys=np.concatenate(keys),
        published=() if manifest is None else tuple(sorted(part.path for part in manifest.parts)),
    )


def _names(storage: Storage, run: str) -> list[str]:
    if isinstance(storage, LocalStorage):
        # Its own listing leaves unfinished writes out.
        return sorted(path.relative_to(storage.root).as_posix() for path in (storage.root / f"run={run}").iterdir())
    return [entry.path for entry in storage.entries(f"run={run}")]


def read_keys(storage: Storage, names: Sequence[str], key: str) -> Keys:
    """Read the key of every row of a source."""
    tables = [pq.read_table(io.BytesIO(storage.read(name) or b""), columns=[key]) for name in names]
    return np.concatenate([table.column(key).to_numpy() for table in tables])


def compare(source: Keys, undisturbed: Output, disturbed: Output) -> Difference:
    """Count rows of the source that are missing and rows that are there too often, and name parts that differ.

    A part differs where its bytes do, where only one of the runs has it, or where it is not published.
    Names that begin with a dot, which no reader looks at, are leftovers.
    """
    keys, index_K = np.unique(np.concatenate([source, disturbed.keys]), return_inverse=True)
    wanted_K = np.bincount(index_K[: len(source)], minlength=len(keys))
    found_K = np.bincount(index_K[len(source) :], minlength=len(keys))
    ours = {name: digest for name, digest in disturbed.digests.items() if not _hidden(name)}
    theirs = {name: digest for name, digest in undisturbed.digests.items() if not _hidden(name)}
    differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    return Difference(
        rows_missing=int(np.maximum(wanted_K - found_K, 0).sum()),
        rows_doubled=int(np.maximum(found_K - wanted_K, 0).sum()),
        parts_differing=tuple(sorted(differing | (ours.keys() ^ set(disturbed.published)))),
        leftovers=tuple(sorted(name for name in disturbed.digests if _hidden(name))),
    )


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")
