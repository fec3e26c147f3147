"""The rows that a run has rejected, as its source has them: for a person to correct, and to score once more."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import BadInput, RunDamaged, shorten_error
from serving.model.contract import Frozen
from tasks.batch.chunk_reader import open_reader
from tasks.batch.dataset import list_entries_at, map_parallel, name_corrupt_file
from tasks.batch.manifest import RejectCount, find_run_manifest, locate_run_parts
from tasks.batch.part_footer import PartFooter, read_footer
from tasks.batch.parts import REJECT_COLUMN, REJECT_REASON, ChunkId, key_names, part_path
from tasks.batch.plan import Plan
from tasks.batch.publish import sum_rejects
from tasks.batch.run_records import load_plan
from tasks.batch.staging import group_tables, stage_again
from tasks.storage import Entry, LocalStorage, Storage, local_errors, open_storage

_SUFFIXES = (".parquet", ".csv")


class RunRejects(Frozen):
    """How many rows a run has rejected, by column and reason, and of how many; of an incomplete run so far."""

    run: str
    rows: int
    rejects: tuple[RejectCount, ...]

    @property
    def rows_rejected(self) -> int:
        """How many rows have no prediction."""
        return sum(count.rows for count in self.rejects)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part of a plan, where it is now, and what its footer says."""

    chunk: ChunkId
    entry: Entry
    footer: PartFooter


def list_rejects(destination: str, run: str | None = None) -> RunRejects:
    """Count the rejects of the newest complete run, or of a named run that need not be complete.

    Raises NoCompleteRun where there is no such run.
    """
    storage = open_storage(destination)
    manifest = find_run_manifest(storage, run)
    if manifest is not None:
        return RunRejects(run=manifest.run, rows=manifest.rows, rejects=manifest.rejects)
    plan, parts = _find_parts(storage, run)
    footers = [part.footer for part in parts]
    return RunRejects(run=plan.run, rows=sum(footer.rows for footer in footers), rejects=sum_rejects(footers))


def write_rejects(destination: str, path: str | Path, run: str | None = None) -> int:
    """Write the rows that a run has rejected to a new file, as the source has them, and return how many.

    Each has the columns of the source that the run reads, keys first, then reject_column and reject_reason. Without key
    columns source_file and source_row name a row. Nothing is written where there are no rejects, and no file is there
    before it is whole. Only chunks with rejects are read again, one at a time.

    Args:
        destination: The folder or address of the predictions.
        path: A file that ends in .parquet, which keeps the types of the source, or in .csv.
        run: The run, which need not be complete. Without: the newest complete one.

    Raises:
        NoCompleteRun: There is no such run, or its table does not have its parts any more as they were written.
        BadInput: The file is there already, has another suffix, or can't hold a column; or the run has no plan.
        SourceChanged: A file of the source was changed since, or is gone.
        RunDamaged: A part of the run is gone, or another by now.
    """
    output = Path(path)
    _check_output(output)
    storage = open_storage(destination)
    plan, parts = _find_parts(storage, run)
    parts = [part for part in parts if part.footer.rejects]
    if not parts:
        return 0
    with tempfile.TemporaryDirectory(prefix="overnight-") as scratch:
        plan, lost = stage_again(plan, [part.chunk for part in parts], LocalStorage(Path(scratch)))
        for error in lost.values():
            raise error
        with _create_file(output) as stream:
            return _write(group_tables(_read_rejects(storage, plan, parts)), stream, output)


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in _SUFFIXES:
        message = f"The file of rejects must end in {' or '.join(_SUFFIXES)}, got {output}. Choose another name."
        raise BadInput(message)
    if os.path.lexists(output):
        message = f"The file of rejects must be a new one, but {output} is there already. Choose another name."
        raise BadInput(message)
    if not output.parent.is_dir():
        message = f"The file of rejects must lie in a folder that is there, got {output}. Make the folder."
        raise BadInput(message)


def _find_parts(storage: Storage, run: str | None) -> tuple[Plan, list[_Part]]:
    """Return the plan of a run, and its parts in the order of the source."""
    name, located = locate_run_parts(storage, run)
    places = dict(located)
    plan = load_plan(storage, name)
    if plan is None or not plan.shards:
        message = (
            f"The run must have a plan at {storage.url} that says where its rows are from, but {name} has none: "
            "it is of a stream, or the plan was deleted. Name a batch run that `overnight runs` lists as complete."
        )
        raise BadInput(message)
    chunks = {at: path for at in plan.chunks if (path := part_path(plan, at)) in places}
    entries = list_entries_at(storage, places.values())
    found = {at: entry for at, path in chunks.items() if (entry := entries.get(places[path])) is not None}
    footers = map_parallel(storage, lambda at: read_footer(storage, plan, plan.chunk(at), found[at]), list(found))
    parts = [
        _Part(chunk=at, entry=found[at], footer=footer)
        for at, footer in zip(found, footers, strict=True)
        if footer is not None
    ]
    if lost := places.keys() - {chunks[part.chunk] for part in parts}:
        message = (
            f"The parts of run {name} must be as they were written, but {len(lost):,} are gone or others by now, the "
            f"first {storage.address(min(lost))}. `overnight verify` says what is damaged, and how to repair it."
        )
        raise RunDamaged(message)
    return plan, parts


def _read_rejects(storage: Storage, plan: Plan, parts: Sequence[_Part]) -> Generator[pa.Table]:
    """Yield the rejects of parts with their columns of the source: rows of a part are those of its chunk, in order."""
    names = list(dict.fromkeys([*key_names(plan.options), *plan.columns, *plan.columns_beside]))
    if taken := {REJECT_COLUMN, REJECT_REASON} & set(names):
        message = f"{sorted(taken)} must be no columns that the run reads, since the file of rejects has its own."
        raise BadInput(message)
    reader = open_reader(plan)
    for part in parts:
        chunk, first = plan.chunk(part.chunk), 0
        with name_corrupt_file(storage, part.entry), storage.open_pinned(part.entry) as stream:
            parquet = pq.ParquetFile(stream, page_checksum_verification=True)
            reasons = parquet.read([REJECT_COLUMN, REJECT_REASON], use_threads=False)
        for block in reader.blocks(chunk, plan.block_rows(chunk)):
            beside = reasons.slice(first, block.num_rows)
            first += block.num_rows
            columns = {name: block.column(name) for name in names}
            columns |= {name: beside.column(name) for name in beside.column_names}
            yield pa.table(columns).filter(beside.column(REJECT_REASON).is_valid())


def _write(tables: Iterable[pa.Table], stream: BinaryIO, output: Path) -> int:
    """Write tables to a stream, one after the other, and return how many rows they have."""
    rows, writer = 0, None
    with ExitStack() as stack:
        for table in tables:
            if output.suffix.lower() == ".parquet":
                writer = writer or stack.enter_context(pq.ParquetWriter(stream, table.schema, compression="zstd"))
                writer.write_table(table)
            else:
                _write_csv(table, stream, output, header=not rows)
            rows += table.num_rows
    return rows


def _write_csv(table: pa.Table, stream: BinaryIO, output: Path, *, header: bool) -> None:
    try:
        pl.DataFrame(table).write_csv(stream, include_header=header)
    except pl.exceptions.ComputeError as error:
        message = (
            f"A CSV file must hold plain values, got columns that {output} can't hold: {shorten_error(error)}. Write a "
            "file that ends in .parquet."
        )
        raise BadInput(message) from None


@contextmanager
def _create_file(target: Path) -> Generator[BinaryIO]:
    """Yield a stream whose bytes stand under a new name once the block has come to its end, and nowhere otherwise."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with local_errors(target):
            with temporary.open("xb") as stream:
                yield stream
            # A file that was made under that name meanwhile is not replaced.
            os.link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
