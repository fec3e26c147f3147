"""Small contracts, datasets, plans and parts, made by the real functions."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.model.contract import Column, Contract, Input, Output
from serving.model.encoding import Flags
from serving.model.interface import Predictions
from serving.model.pin import ModelPin
from tasks.batch.chunk_layout import Piece, Sizes
from tasks.batch.chunk_reader import Reader, open_reader
from tasks.batch.dataset import Snapshot, open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.part_check import write_undigested
from tasks.batch.parts import ChunkId, encode_part, key_names, part_path
from tasks.batch.plan import Plan, make_plan, run_key
from tasks.batch.source import pin_source
from tasks.storage import Storage, open_storage

PIN = ModelPin(name="churn", version="3", model_id="m-1", source="models:/m-1", digest="d" * 64)
SCORE = (Output(name="score", dtype="float32"),)


def a_contract(*names: str, outputs: tuple[Output, ...] = SCORE, **shapes: tuple[int, ...]) -> Contract:
    """Return a contract over scalar float columns, and tensor columns by their shapes."""
    scalars = tuple(Column(name=name, dtype="float32") for name in names)
    inputs = (Input(name="x", dtype="float32", shape=(len(scalars),), columns=scalars),) if scalars else ()
    inputs += tuple(
        Input(name=name, dtype="float32", shape=shape, columns=(Column(name=name, dtype="float32", shape=shape),))
        for name, shape in shapes.items()
    )
    return Contract(inputs=inputs, outputs=outputs)


def parquet(table: pa.Table | Mapping[str, object], **options: object) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(dict(table)), sink, **options)
    return sink.getvalue()


def forget_digests(place: Path) -> None:
    """Leave a destination as releases have left it whose parts bore no digest of their bytes."""
    for path in place.rglob("part-*.parquet"):
        parquet = pq.ParquetFile(path)
        path.write_bytes(write_undigested(parquet.metadata, parquet.read()))
    for path in place.rglob("manifest.json"):
        record = json.loads(path.read_bytes())
        for part in record["parts"]:
            del part["digest"]
            part["bytes"] = (place / part["path"]).stat().st_size
        path.write_text(json.dumps(record))


def put(address: str, files: Mapping[str, bytes | pa.Table | Mapping[str, object]]) -> str:
    """Write files, tables as Parquet, and return the address that they lie below."""
    storage = open_storage(address)
    for path, data in files.items():
        storage.put_new(path, data if isinstance(data, bytes) else parquet(data))
    return address


def numbers(start: int, stop: int) -> pa.Table:
    """Return rows whose columns all hold the row's number."""
    rows = np.arange(start, stop)
    return pa.table({"id": rows, "a": rows.astype(np.float32), "b": rows.astype(np.float32)})


def a_plan(
    source: str,
    destination: str,
    options: BatchOptions | None = None,
    *,
    contract: Contract | None = None,
    batch_size: int = 4,
    slots: int = 1,
    pin: ModelPin = PIN,
    sizes: Sizes | None = None,
) -> Plan:
    """Plan a run over Parquet files, ten rows a chunk unless the options say otherwise; `sizes` overrule the others."""
    options = options or BatchOptions(rows_per_chunk=10)
    contract = contract or a_contract("a", "b")
    snapshot = pin_source(source, destination)
    dataset = open_dataset(snapshot, [column.name for column in contract.columns], options.key_columns)
    return make_plan(
        key=run_key(pin, snapshot, contract, options),
        model=pin,
        contract=contract,
        options=options,
        source=snapshot,
        dataset=dataset,
        sizes=sizes or Sizes(batch_size=batch_size, slots=slots, row_bytes=8.0, rows_per_second=None),
    )


def read_keys(plan: Plan, chunk: ChunkId) -> pa.Table:
    """Read the key columns of a chunk."""
    tables = [table.select(key_names(plan.options)) for table in open_reader(plan).blocks(plan.chunks[chunk])]
    return pa.concat_tables(tables)


def read_rows(snapshot: Snapshot, *columns: str) -> pa.Table:
    """Read columns of all rows of a snapshot, as a run reads them."""
    dataset = open_dataset(snapshot, columns, ())
    reader = Reader(dataset.snapshot, columns, dataset.partitions, 100, places=False)
    pieces = [
        Piece(file=at, row_group=group, row_start=0, row_stop=rows)
        for at, file in enumerate(dataset.snapshot.files)
        for group, rows in enumerate(file.row_groups)
    ]
    return pa.concat_tables([table for piece in pieces for table in reader.read(piece)])


def predict(plan: Plan, keys: pa.Table) -> Predictions:
    """Return a prediction for each row: its place in the chunk."""
    return {output.name: _places(output, keys.num_rows) for output in plan.contract.outputs}


def _places(output: Output, rows: int) -> np.ndarray:
    places = np.repeat(np.arange(rows), output.width).reshape(rows, *output.shape)
    return places.astype(str).astype(object) if output.dtype == "str" else places.astype(output.dtype)


def a_part(plan: Plan, chunk: ChunkId, rejects: Sequence[int] = ()) -> memoryview:
    """Return the bytes of a chunk's part; rows at the places given are rejects."""
    keys = read_keys(plan, chunk)
    flags = Flags.all_good(keys.num_rows)
    for row in rejects:
        flags.mark_row(row, "a", "null")
    return encode_part(plan, plan.chunks[chunk], keys, predict(plan, keys), flags, plan.batch_size)


def put_parts(
    plan: Plan, destination: Storage, chunks: Sequence[ChunkId] | None = None, rejects: Sequence[int] = (0,)
) -> None:
    """Write the parts of a plan, of every chunk unless told; the first row of each is a reject, unless told."""
    for chunk in plan.chunks if chunks is None else chunks:
        destination.put_new(part_path(plan, chunk), a_part(plan, chunk, rejects))
