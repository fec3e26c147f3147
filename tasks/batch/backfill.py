"""A backfill: the pieces of a source that are scored one by one, each as a run at a destination of its own."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, Self
from urllib.parse import unquote

import polars as pl
from pydantic import AwareDatetime, Field, model_validator

from serving.errors import BadInput, NoCompleteRun, SourceFault, SourceNotFound
from serving.model.contract import Contract, Frozen
from serving.model.registry import Resolved
from serving.option_words import give_option, name_option
from tasks.batch.dataset import map_parallel
from tasks.batch.manifest import Manifest, find_newer_run, find_newest_run, open_predictions
from tasks.batch.options import BatchOptions
from tasks.batch.plan import ROOT
from tasks.batch.resolve import find_complete_run
from tasks.batch.run_request import RunRequest, make_request
from tasks.batch.source import find_commit_log, is_table
from tasks.common.artifacts import Logger, make_table, put_artifacts
from tasks.storage import join_location, open_storage, select

_WILD = re.compile(r"[*?\[]")
_PIECES_MAX = 10_000
# The table is sent again with each piece that ends.
_ROWS_MAX = 1000
_SHOWN, _CHARACTERS_SHOWN = 6, 240
_TABLE = "backfill"


class Partitions(Frozen):
    """Partitions of a folder of loose files: those of one column, whose folders lie right in the source."""

    kind: Literal["partitions"] = Field(default="partitions", description="Tells this kind of pieces from others.")
    column: str = Field(min_length=1, description="The column that folders are named after: date of date=2026-11-01.")
    first: str | None = Field(default=None, description="The lowest value, itself included. Without: from the lowest.")
    last: str | None = Field(default=None, description="The highest value, itself included. Without: to the highest.")


class TableVersions(Frozen):
    """Versions of a Delta table by their numbers, or snapshots of an Iceberg table by their ids."""

    kind: Literal["versions"] = Field(default="versions", description="Tells this kind of pieces from others.")
    first: int | None = Field(default=None, ge=0, description="The lowest version of a Delta table, itself included.")
    last: int | None = Field(default=None, ge=0, description="The highest version of a Delta table, itself included.")
    numbers: tuple[int, ...] = Field(
        default=(), description="The versions or snapshot ids themselves, from the oldest; in place of a range."
    )

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        has_range = self.first is not None and self.last is not None
        if has_range == bool(self.numbers) or (self.first is None) != (self.last is None):
            message = "versions must have a first and a last one, or be listed as numbers, and not both"
            raise ValueError(message)
        return self


class TableTimes(Frozen):
    """The versions that a Delta or Iceberg table had at moments of equal distance."""

    kind: Literal["times"] = Field(default="times", description="Tells this kind of pieces from others.")
    first: AwareDatetime = Field(description="The first moment, time zone included.")
    last: AwareDatetime = Field(description="No moment is later than this one.")
    every: timedelta = Field(default=timedelta(days=1), gt=timedelta(0), description="From one moment to the next.")


Pieces = Annotated[Partitions | TableVersions | TableTimes, Field(discriminator="kind")]


class BackfillOptions(Frozen):
    """How a backfill goes through its pieces."""

    order: Literal["newest", "oldest"] = Field(default="newest", description="Which pieces are scored first.")
    runs_at_a_time: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Runs side by side. More than one are flow runs of a deployment; one has this machine to itself.",
    )
    deployment: str | None = Field(
        default=None,
        description="The deployment that the runs go to, as FLOW/NAME: batch-inference/adhoc. Without: they are scored "
        "in the process of the backfill, one after another.",
    )
    interval_seconds: float = Field(default=5.0, gt=0, description="Seconds between two looks at the runs that go on.")
    lost_seconds: float = Field(
        default=120.0, ge=0, description="Seconds that a run of a deployment which has crashed gets to be resumed in."
    )

    @model_validator(mode="after")
    def _has_machines(self) -> Self:
        if self.runs_at_a_time > 1 and self.deployment is None:
            message = (
                f"{name_option('deployment')} must name one where {name_option('runs_at_a_time')} is more than 1, got "
                f"{self.runs_at_a_time} runs at a time: in one process each of them takes every core."
            )
            raise ValueError(message)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One piece of a source: the name of its folder, where it is read and goes to, and the options of its run."""

    name: str
    source: str
    destination: str
    options: BatchOptions


PieceState = Literal["complete before", "scored", "failed", "left"]


class PieceReport(Frozen):
    """What became of one piece."""

    piece: str = Field(description="Its name, which is its folder below the destination.")
    state: PieceState
    destination: str
    run: str | None = None
    rows: int | None = None
    newer: str | None = Field(default=None, description="The run that readers get in place of this one, planned later.")
    error: str | None = Field(default=None, description="Why it failed, on one line.")


class BackfillReport(Frozen):
    """What became of every piece, in the order in which they are scored."""

    model: str
    destination: str
    pieces: tuple[PieceReport, ...]

    def count(self, state: PieceState) -> int:
        """Return how many pieces are in a state."""
        return sum(piece.state == state for piece in self.pieces)

    @property
    def summary(self) -> str:
        """One line for a log."""
        return (
            f"{len(self.pieces):,} pieces below {self.destination}: {self.count('scored'):,} scored now, "
            f"{self.count('complete before'):,} complete before, {self.count('failed'):,} failed, "
            f"{self.count('left'):,} left."
        )


def list_pieces(
    source: str,
    destination: str,
    pieces: Pieces,
    options: BatchOptions,
    used: Collection[str] = (),
    now: datetime | None = None,
) -> list[Piece]:
    """Return the pieces of a source, the oldest first. Nothing is opened.

    Args:
        source: A folder of hive partitions, or a table.
        destination: Below which each piece has a destination of its own.
        pieces: Which there are.
        options: Those of every run.
        used: The columns that the model and the keys use.
        now: The moment after which a table has no versions yet; that of the call where none is given.

    Raises:
        SourceNotFound: There is no such partition.
        BadInput: The source is not of the kind that the pieces are, there are too many, a moment is yet to come, or an
            option names one run.
        SourceFormat: Files of a table can't be read through its log.
    """
    if named := [name for name in ("name", "joins", "source_version", "source_timestamp") if getattr(options, name)]:
        message = f"Each piece must be a run of its own, got {', '.join(named)} for all of them. Leave that out."
        raise BadInput(message)
    if options.promote_if is not None:
        message = (
            "A challenger must be promoted by one run, got promote_if for every piece. Leave it out, and compare the "
            "piece that decides by compare_challengers."
        )
        raise BadInput(message)
    if options.output != "parquet":
        message = (
            "The pieces of a backfill must be parts and manifests, each at a destination of its own, got "
            f"output={options.output!r}. Score into a table by calls of batch_inference, one after another."
        )
        raise BadInput(message)
    if isinstance(pieces, Partitions):
        found = _list_partitions(source, pieces, used)
    else:
        found = _list_versions(source, pieces, now or datetime.now(UTC))
    if len(found) > _PIECES_MAX:
        message = f"A backfill must have at most {_PIECES_MAX:,} pieces, got {len(found):,}. Narrow the range."
        raise BadInput(message)
    return [
        Piece(
            name=name,
            source=where,
            destination=join_location(destination, name),
            options=options.model_copy(update=update),
        )
        for name, where, update in found
    ]


_Found = list[tuple[str, str, dict[str, object]]]


def _list_partitions(source: str, pieces: Partitions, used: Collection[str]) -> _Found:
    selected = select(source)
    is_folder = selected.globs == ("**",) or not (selected.globs or selected.entries)
    log = find_commit_log(selected, source) if is_folder else None
    if log is not None or not is_folder:
        got = f"the {log.kind} table there" if log else "a file or a glob"
        message = (
            f"Partitions must be folders right in a folder of loose files, got {got} at {source}. Name the folder "
            "above them; of a table give versions or times."
        )
        raise BadInput(message)
    folders = sorted({entry.path.partition("/")[0] for entry in selected.entries if "/" in entry.path})
    column = f"{pieces.column}="
    values = {folder: unquote(folder.removeprefix(column)) for folder in folders if folder.startswith(column)}
    chosen = choose_values(list(values.values()), pieces.first, pieces.last)
    if not chosen:
        there = sort_values(list(values.values()))
        got = f"{len(there):,} from {there[0]} to {there[-1]}" if there else f"folders such as {folders[:3]}"
        asked = f"{pieces.column}={pieces.first or ''}..{pieces.last or ''}"
        message = f"{source} must have a partition of {asked}, got {got}. Correct the range or the source."
        raise SourceNotFound(message)
    by_value = {value: folder for folder, value in values.items()}
    return [(by_value[value], _address(source, by_value[value], pieces.column in used), {}) for value in chosen]


def _address(source: str, folder: str, is_used: bool) -> str:  # noqa: FBT001 - private, and a question
    """Return the address of a partition: a glob where its column is used, since a folder alone does not tell it."""
    above = source.rstrip("/")
    if not is_used and not _WILD.search(folder):
        return f"{above}/{folder}"
    # One letter in brackets makes it a glob, which fits this folder alone.
    name = glob.escape(folder) if _WILD.search(folder) else f"[{folder[0]}]{folder[1:]}"
    return f"{above}/{name}/**"


def choose_values(values: Sequence[str], first: str | None, last: str | None) -> list[str]:
    """Return the values of a range, numbers before texts, the lowest first.

    They are compared as numbers where both ends are numbers and any value is: no text is in such a range, and 07 is 7.
    """
    ends = {end for end in (first, last) if end is not None}
    numbers = {each: int(each) for each in (*values, *ends) if re.fullmatch(r"-?\d+", each)}
    are_numbers = bool(ends) and numbers.keys() >= ends and not numbers.keys().isdisjoint(values)

    def rank(value: str) -> tuple[int, str]:
        return (numbers[value], "") if are_numbers else (0, value)

    chosen = [
        value
        for value in values
        if not are_numbers or value in numbers
        if (first is None or rank(first) <= rank(value)) and (last is None or rank(value) <= rank(last))
    ]
    return sorted(chosen, key=lambda value: (value not in numbers, numbers.get(value, 0), value))


def sort_values(values: Sequence[str]) -> list[str]:
    """Return the values of a partition in order."""
    return choose_values(values, None, None)


def _list_versions(source: str, pieces: TableVersions | TableTimes, now: datetime) -> _Found:
    if isinstance(pieces, TableVersions):
        numbers = pieces.numbers or range(pieces.first or 0, (pieces.last or 0) + 1)
        found: _Found = [(f"version={number}", source, {"source_version": number}) for number in numbers]
    else:
        count = (pieces.last - pieces.first) // pieces.every + 1
        times = [pieces.first + pieces.every * at for at in range(max(0, min(count, _PIECES_MAX + 1)))]
        if times and times[-1] > now:
            message = (
                f"Every moment must have passed, got {times[-1].isoformat()} where it is {now:%Y-%m-%dT%H:%M:%SZ} now: "
                "what a table will hold then is not known. End the range earlier."
            )
            raise BadInput(message)
        names = [f"time={time.astimezone(UTC):%Y-%m-%dT%H%M%SZ}" for time in times]
        found = [(name, source, {"source_timestamp": time}) for name, time in zip(names, times, strict=True)]
    if not found:
        message = f"The range must have at least one piece, got from {pieces.first} to {pieces.last}. Turn it round."
        raise BadInput(message)
    if not is_table(source):
        message = (
            f"Versions and times must be those of a Delta or Iceberg table, got {source}, where there is none. Correct "
            "the source, or give partitions of a folder of files."
        )
        raise BadInput(message)
    return found


def look_at_pieces(pieces: Sequence[Piece], resolved: Resolved, contract: Contract) -> list[PieceReport]:
    """Return which pieces are complete by their manifests, and which are left; no model is loaded, no file opened.

    A piece whose source can't be listed is left: its run says why.
    """
    if not pieces:
        return []
    storage = open_storage(pieces[0].destination)

    def look(piece: Piece) -> PieceReport:
        manifest = None
        with suppress(BadInput, SourceFault):
            manifest = find_complete_piece(piece, resolved, contract)
        if manifest is None:
            return report_piece(piece, "left")
        newer = find_newer_run(open_storage(piece.destination), manifest)
        return report_piece(piece, "complete before", manifest).model_copy(update={"newer": newer})

    return map_parallel(storage, look, pieces)


def find_complete_piece(piece: Piece, resolved: Resolved, contract: Contract) -> Manifest | None:
    """Return the manifest of a piece whose run is complete, over what its source holds now."""
    request: RunRequest = make_request(resolved, contract, piece.source, piece.destination, piece.options)
    return find_complete_run(open_storage(piece.destination), request)


def report_piece(
    piece: Piece, state: PieceState, manifest: Manifest | None = None, error: str | None = None
) -> PieceReport:
    """Return the report of a piece in a state."""
    return PieceReport(
        piece=piece.name,
        state=state,
        destination=piece.destination,
        run=manifest.run if manifest else None,
        rows=manifest.rows if manifest else None,
        error=error[:_CHARACTERS_SHOWN] if error else None,
    )


def publish_pieces(report: BackfillReport, logger: Logger) -> None:
    """Show the pieces and their states as a table artifact of the flow run, the first thousand: what is left first."""
    ranks = {"failed": 0, "left": 1, "scored": 2, "complete before": 3}
    rows = [
        {
            "piece": piece.piece,
            "state": piece.state,
            "rows": "" if piece.rows is None else f"{piece.rows:,}",
            "run": piece.run or "",
            "error": piece.error or "",
        }
        for piece in sorted(report.pieces, key=lambda piece: ranks[piece.state])[:_ROWS_MAX]
    ]
    put_artifacts([make_table(_TABLE, rows, report.summary)], logger)


def describe_replaced(report: BackfillReport) -> str | None:
    """Return what to know of complete pieces of which readers get a newer run, None where there is none."""
    replaced = [piece for piece in report.pieces if piece.newer]
    if not replaced:
        return None
    first = replaced[0]
    return (
        f"Of {len(replaced):,} pieces that are complete, readers get a run that was planned later, such as "
        f"{first.newer} of {first.piece}. If they are to get this model and source again, call with "
        f"{give_option('rescore', 'a text of your own')}."
    )


def describe_failures(report: BackfillReport) -> str:
    """Return the message of a backfill some of whose pieces failed: each with its reason, or the first of them."""
    failed = [piece for piece in report.pieces if piece.state == "failed"]
    listed = [f"  {piece.piece}: {piece.error}" for piece in failed[:_SHOWN]]
    more = [f"  and {len(failed) - _SHOWN:,} more, in the table of the flow run"] if len(failed) > _SHOWN else []
    first = (
        f"Every piece must be scored, but {len(failed):,} of {len(report.pieces):,} failed; the others are complete. "
        "Correct the cause and call again: what is complete is passed over."
    )
    return "\n".join([first, *listed, *more])


def open_backfill(destination: str, column: str | None = None) -> pl.LazyFrame:
    """Open the newest complete run of every piece of a backfill as one LazyFrame, the pieces in order.

    Args:
        destination: That of the backfill.
        column: The partition column, or "version" or "time"; it is added as text where the rows do not have it. None
            where all pieces there are of one column.

    Raises:
        NoCompleteRun: No piece is complete.
        BadInput: There are pieces of several columns.
    """
    storage = open_storage(destination)
    paths = (entry.path for entry in storage.entries() if entry.path.count("/") > 1)
    folders = {path.split("/")[0] for path in paths if path.split("/")[1] == ROOT and "=" in path.split("/")[0]}
    columns = {folder.partition("=")[0] for folder in folders}
    if column is None and len(columns) > 1:
        message = f"{destination} must have pieces of one column, got {sorted(columns)}. Say which by column=."
        raise BadInput(message)
    frames = []
    chosen = [folder for folder in folders if column in (None, folder.partition("=")[0])]
    values = {unquote(folder.partition("=")[2]): folder for folder in chosen}
    for value in sort_values(list(values)):
        place = join_location(destination, values[value])
        if find_newest_run(open_storage(place)) is not None:
            frame = open_predictions(place)
            name = values[value].partition("=")[0]
            has_column = name in frame.collect_schema().names()
            frames.append(frame if has_column else frame.with_columns(pl.lit(value).alias(name)))
    if not frames:
        message = f"{destination} must have a complete piece of a backfill, got none. Call backfill first."
        raise NoCompleteRun(message)
    return pl.concat(frames)


def order_pieces(pieces: Sequence[Piece], options: BackfillOptions) -> list[Piece]:
    """Return pieces, the oldest first, in the order in which they are scored."""
    return list(pieces) if options.order == "oldest" else list(reversed(pieces))


def replace_piece(report: BackfillReport, piece: PieceReport) -> BackfillReport:
    """Return a report in which a piece has another state."""
    pieces = tuple(piece if each.piece == piece.piece else each for each in report.pieces)
    return report.model_copy(update={"pieces": pieces})
