"""Metering: the access log of a gateway as a table, which the scheduler reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from serving.gateway.access_log import ACCESS_LOG, GRPC_STATUSES, METERING_FOLDER

if TYPE_CHECKING:
    # Only readers need polars, which takes long to import.
    import polars as pl


def read_metering(folder: Path) -> pl.LazyFrame:
    """Return the metered requests of the gateway with this folder, one row each, in the order they ended.

    It may be called while the gateway writes: an incomplete line is left out.

    Returns:
        A frame with the columns at (datetime in microseconds, UTC: when the request came), endpoint, version, rows
        (null where the request does not say), bytes, status and latency_ms.
    """
    import polars as pl  # noqa: PLC0415 - see above

    paths = [*sorted((folder / METERING_FOLDER).glob("*.jsonl")), folder / ACCESS_LOG]
    frames = [_scan(content) for path in paths if (content := _read_lines(path))]
    if frames:
        return pl.concat(frames)
    columns = {"endpoint": pl.String, "version": pl.String, "rows": pl.Int64, "bytes": pl.Int64, "status": pl.Int64}
    return pl.LazyFrame(schema={"at": pl.Datetime("us", "UTC"), **columns, "latency_ms": pl.Float64})


def _scan(content: bytes) -> pl.LazyFrame:
    import polars as pl  # noqa: PLC0415 - see above

    # What gateways before Envoy wrote.
    is_old = b'"latency_ms"' in content[: content.find(b"\n")]
    schema = {
        "at_us": pl.Int64 if is_old else pl.String,
        "endpoint": pl.String,
        "version": pl.String,
        "rows": pl.Float64,
        "size": pl.Int64,
        "status": pl.Int64,
        **({"latency_ms": pl.Float64} if is_old else {"latency_us": pl.Int64, "grpc_status": pl.Int64}),
    }
    log = pl.scan_ndjson(io.BytesIO(content), schema=schema)
    status = pl.col("status")
    if not is_old:
        grpc = pl.col("grpc_status")
        as_http = grpc.replace_strict(GRPC_STATUSES, default=500, return_dtype=pl.Int64)
        status = pl.when(grpc.fill_null(0) != 0).then(as_http).otherwise(status).alias("status")
        log = log.with_columns(latency_ms=pl.col("latency_us") / 1000)
    return log.select(
        pl.col("at_us").cast(pl.Int64).cast(pl.Datetime("us", "UTC")).alias("at"),
        "endpoint",
        "version",
        pl.col("rows").cast(pl.Int64),
        pl.col("size").alias("bytes"),
        status,
        "latency_ms",
    )


def _read_lines(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        # It was the oldest and is deleted, or it was put aside and is read by its other name.
        return b""
    return content[: content.rfind(b"\n") + 1]
