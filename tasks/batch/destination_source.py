"""Which source a destination has the predictions of: a run over another one would take their place.

Readers open the newest run. One over a file of corrected rows would leave them these rows alone, where they had a whole
table. A source that differs from the last one by dates in its address is the next edition of the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from serving.errors import DestinationUnusable, PublishRefused
from serving.extras import import_extra
from serving.model.contract import Frozen
from serving.option_words import give_option
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan, manifest_path
from tasks.batch.run_records import SOURCES, list_order_numbers, order_path, parse_order_number, read_record
from tasks.batch.source import ICEBERG_SCHEME
from tasks.storage import Storage, open_storage

_METADATA = re.compile(r"/metadata/[^/]+\.metadata\.json(\.gz)?$")
# A partition by time, or the run of a destination; and a year with its month, its day and its time of day.
_EDITION = re.compile(
    r"(?<=/)(?:year|month|week|day|hour|date|dt|ds|run)=[^/]+"
    r"|(?<!\d)(?:19|20)\d\d([-_/.]?)(?:0[1-9]|1[0-2])(?:\1(?:0[1-9]|[12]\d|3[01]))?"
    r"(?:[T_-]?[0-2]\d(?:[-_:]?[0-5]\d){1,2}Z?)?(?!\d)"
)
_SHOWN = 3


class SourceRecord(Frozen):
    """The source that the rows of a destination come from, and the first run that was published of it."""

    run: str
    addresses: tuple[str, ...]


def list_addresses(source: str | Sequence[str]) -> tuple[str, ...]:
    """Return the addresses of a source in full, sorted; those of a table without its version."""
    given = [source] if isinstance(source, str) else source
    found = set()
    for each in given:
        is_local = not each.startswith(ICEBERG_SCHEME) and ("://" not in each or each.startswith("file://"))
        found.add(_METADATA.sub("", open_storage(each).url if is_local else each.rstrip("/")))
    return tuple(sorted(found))


def is_edition(addresses: Sequence[str], of: Sequence[str]) -> bool:
    """Return whether a source has all that an earlier one has, by their addresses, which may be of other dates."""
    return _omit_dates(of) <= _omit_dates(addresses)


def _omit_dates(addresses: Sequence[str]) -> set[str]:
    return {_EDITION.sub("*", address) for address in addresses}


def check_source(storage: Storage, options: BatchOptions, addresses: Sequence[str]) -> None:
    """Raise DestinationUnusable where a run over a source would take the place of predictions of another one."""
    home = _open_home(storage, options)
    standing = None if home is None else _read_records(home)[1]
    if standing is not None and not _may_follow(options, standing, addresses):
        raise DestinationUnusable(_describe(storage, options, standing, addresses))


def claim_source(storage: Storage, plan: Plan, options: BatchOptions) -> None:
    """Write down that a destination has the predictions of a plan's source from here on, just before it is published.

    Of two runs over different sources that are published at once, the first to create the record is the one. A run that
    is published already, and has lost parts since, claims nothing.

    Args:
        storage: The destination.
        plan: The plan of the run.
        options: Those of this call, which say whether another source may follow.

    Raises PublishRefused where the destination has those of another source by now.
    """
    home = _open_home(storage, plan.options)
    if home is None or not plan.addresses or storage.exists(manifest_path(plan.run)):
        return
    record = SourceRecord(run=plan.run, addresses=plan.addresses).model_dump_json().encode()
    while True:
        number, standing = _read_records(home)
        if standing is not None and not _may_follow(options, standing, plan.addresses):
            message = f"{_describe(storage, options, standing, plan.addresses)} Nothing was published."
            raise PublishRefused(message)
        if standing is not None and _omit_dates(standing.addresses) == _omit_dates(plan.addresses):
            return
        # The next look says whose record stands there, and what storage has lost is written again.
        home.put_new(order_path(number + 1, SOURCES), record)


def _open_home(storage: Storage, options: BatchOptions) -> Storage | None:
    """Open where the record of sources lies; None where a run takes no rows of others out of what readers open."""
    if options.table_mode == "append" or (options.upserts and options.missing_keys == "keep"):
        return None
    if options.output != "iceberg":
        return storage
    # Several destinations may feed the table.
    folder: Storage | None = import_extra("tasks.batch.iceberg_table", "iceberg").find_table_folder(options)
    return folder


def _read_records(home: Storage) -> tuple[int, SourceRecord | None]:
    """Return the number and the content of the newest record; 0 and None where there is none."""
    paths = list_order_numbers(home, SOURCES)
    return (parse_order_number(paths[-1]), read_record(home, paths[-1], SourceRecord)) if paths else (0, None)


def _may_follow(options: BatchOptions, standing: SourceRecord, addresses: Sequence[str]) -> bool:
    return options.other_source == "replace" or is_edition(addresses, standing.addresses)


def _describe(storage: Storage, options: BatchOptions, standing: SourceRecord, addresses: Sequence[str]) -> str:
    def show(each: Sequence[str]) -> str:
        return ", ".join(each[:_SHOWN]) + (f" and {len(each) - _SHOWN} more" if len(each) > _SHOWN else "")

    into = "" if options.output == "iceberg" else "output 'delta' with "
    return (
        f"A run must have the source that {storage.url} has predictions of, {show(standing.addresses)}, got "
        f"{show(addresses)}: readers would have these rows alone, in place of all that they had. For corrected or new "
        f"rows, correct the source itself and call again, or put them into a table by {into}mode 'upsert', which "
        "replaces the rows of the same keys. For rows of another kind choose another destination. If they are to take "
        f"the place of the others, give {give_option('other_source', 'replace')}."
    )
