"""The commits of a stream's table: each is a manifest, which goes on from the one before by the parts since then.

A manifest lists the last parts itself. Where those are many, they go into a list of parts, which is never written
again, and where such lists are many, they go into one. So a commit costs the same, however many were before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from tasks.batch.manifest import (
    Manifest,
    ManifestPart,
    PartitionEnd,
    PartList,
    digest_part_list,
    list_commits,
    list_rejects,
    name_commit,
    part_list_path,
)
from tasks.batch.part_footer import PartFooter, Reasons
from tasks.batch.parts import ChunkId
from tasks.batch.plan import Plan, manifest_path
from tasks.batch.run_records import read_record
from tasks.storage import Entry, Storage

# So many parts, or lists, go into a list. A manifest holds fewer than twice as many, which each commit writes.
PARTS_PER_LIST = 128
# A reader that has listed an older manifest still finds it while newer ones are written.
_MANIFESTS_KEPT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePart:
    """A part of a table: its footer, its keys, and the number that the next part of its partition begins at."""

    entry: Entry
    footer: PartFooter
    next_number: int
    keys: pa.Schema


class TableCommits:
    """The manifests of one table."""

    def __init__(self, storage: Storage, plan: Plan) -> None:
        self._storage, self._plan = storage, plan
        self._numbers: list[int] = []
        self._made: Manifest | None = None

    def read_newest(self) -> Manifest | None:
        """Return the newest manifest as it was written, None where there is none."""
        while numbers := list_commits(self._storage, self._plan.run):
            self._numbers = numbers
            made, self._made = self._made, None
            if made is not None and made.commit == numbers[-1]:
                return made
            # One that is gone since it was listed was deleted because there are newer ones.
            if newest := read_record(self._storage, manifest_path(name_commit(self._plan.run, numbers[-1])), Manifest):
                return newest
        return None

    def put(self, newest: Manifest | None, base: Manifest | None, parts: Mapping[ChunkId, TablePart]) -> None:
        """Write the manifest after the newest one; nothing where another scorer was first.

        Args:
            newest: The newest manifest.
            base: What the parts are added to: the newest manifest, or None where they are all that the table has.
            parts: The parts, in order.
        """
        footers = [part.footer for part in parts.values()]
        rejects: Reasons = Counter({(each.column, each.reason): each.rows for each in base.rejects} if base else {})
        rejects = sum((footer.rejects for footer in footers), rejects)
        added = tuple(ManifestPart(path=f.path, rows=f.rows, bytes=f.bytes, digest=f.digest) for f in footers)
        ends = {partition: PartitionEnd(last=at, next=part.next_number) for (partition, at), part in parts.items()}
        lists, listed = self._shorten(base.lists if base else (), (*(base.parts if base else ()), *added))
        number = int(newest.run.rpartition("-")[2]) + 1 if newest else 1
        now = datetime.now(UTC)
        manifest = Manifest(
            key=self._plan.key,
            run=name_commit(self._plan.run, number),
            # A plan that was deleted and made again has another number: the order of a table never decreases.
            order=max(self._plan.order, newest.order if newest else 0),
            commit=number,
            # Readers take the latest manifest: it is this one, even if an earlier machine had a clock ahead of ours.
            planned_at=max(now, newest.planned_at + timedelta(microseconds=1)) if newest else now,
            model=self._plan.model,
            source=self._plan.source.root,
            output="parquet",
            rows=sum((footer.rows for footer in footers), base.rows if base else 0),
            rejects=list_rejects(rejects),
            rows_key_null=sum((footer.rows_key_null for footer in footers), base.rows_key_null if base else 0),
            ends=(base.ends if base else {}) | ends,
            lists=lists,
            parts=listed,
        )
        if self._storage.put_new(manifest_path(manifest.run), manifest.model_dump_json().encode()):
            self._made = manifest

    def delete_old(self) -> None:
        """Delete the manifests that were there when the newest was read, but for the newest few."""
        old = self._numbers[:-_MANIFESTS_KEPT]
        self._storage.delete([manifest_path(name_commit(self._plan.run, number)) for number in old])

    def _shorten(
        self, lists: tuple[str, ...], parts: tuple[ManifestPart, ...]
    ) -> tuple[tuple[str, ...], tuple[ManifestPart, ...]]:
        """Return lists and parts of a manifest; parts that are many are a list by then, and so are lists."""
        if len(parts) >= PARTS_PER_LIST and (digest := self._put_list(PartList(parts=parts))):
            lists, parts = (*lists, digest), ()
        if len(lists) >= PARTS_PER_LIST and (digest := self._put_list(PartList(lists=lists))):
            lists = (digest,)
        return lists, parts

    def _put_list(self, content: PartList) -> str | None:
        """Write a list, and return its digest; None where it can't be read as it was written, and is not to be used.

        A later commit has another list, under another digest.
        """
        data = content.model_dump_json().encode()
        digest = digest_part_list(data)
        path = part_list_path(self._plan.run, digest)
        self._storage.put_new(path, data)
        return digest if self._storage.read(path) == data else None
