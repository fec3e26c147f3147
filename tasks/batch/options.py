"""What a person may say about a batch run; what changes its output is part of the run key."""

from __future__ import annotations

import codecs
from typing import Literal, Self
from uuid import UUID

from pydantic import AwareDatetime, Field, JsonValue, field_validator, model_validator

from serving.model.contract import ColumnNames, ColumnPolicy, Contract, Frozen
from serving.model.environment_choice import EnvironmentOption, PackagesOption
from serving.option_words import give_option, name_option
from tasks.batch.challenger_rules import CHALLENGERS_MAX, Labels, PromoteIf
from tasks.batch.feature_table import FEATURE_TABLES_MAX, FeatureTable
from tasks.batch.gate_rules import Gate
from tasks.batch.hive_partitions import PartitionType

# These decide how a run is carried out: a later call may change them and still resume. Of what it puts out they decide
# nothing but last digits, where a model's depend on what else is in a batch: without sizes given, a plan takes those of
# its batches and chunks by the slots, and keeps them.
_NOT_IN_KEY = {
    *("name", "slots", "memory_mb", "max_reject_fraction", "allow_pickle", "experiment"),
    *("pass_seconds_max", "pass_memory_mb", "packages"),
    *("check_keys", "reuse", "other_source", "on_empty", "missing_columns", "gate"),
    *("runner", "workers", "joins", "notices", "notice_seconds", "sample_rows", "disclose"),
    # The version that they name is part of the source.
    *("source_version", "source_timestamp"),
    # The versions of challengers and the columns kept beside their predictions are in the key apart from these: a part
    # of the champion is the same without them.
    *("challengers", "segment_columns", "labels", "promote_if"),
}


Reuse = Literal["same", "any", "none"]
OtherSource = Literal["refuse", "replace"]
OnEmpty = Literal["refuse", "publish"]
MissingColumns = Literal["refuse", "null"]
Disclose = Literal["values", "nothing"]
TableMode = Literal["append", "replace", "upsert"]


class Threads(Frozen):
    """Score in threads of the process that runs the flow."""

    kind: Literal["threads"] = Field(default="threads", description="Tells this runner from others.")


class Ray(Frozen):
    """Score on a Ray cluster: each slot is a separate process, on any node with free CPUs for it."""

    kind: Literal["ray"] = Field(default="ray", description="Tells this runner from others.")
    address: str | None = Field(
        default=None,
        min_length=1,
        description="Address of a running cluster, as ray.init takes it. Without: one on this machine, for the run.",
    )
    cpus_per_slot: int | None = Field(
        default=None,
        ge=1,
        description="CPUs of each slot, and threads of its libraries. Without: one; on this machine, its share.",
    )


class CsvOptions(Frozen):
    """How CSV files are written, where not with commas, in UTF-8 and with a line of names."""

    delimiter: str | None = Field(
        default=None,
        min_length=1,
        max_length=1,
        description="The character between two values. Without: a comma, and a tab in files named .tsv.",
    )
    quote: str | None = Field(
        default='"',
        min_length=1,
        max_length=1,
        description="The character around values that hold delimiters or line ends; null where there is none.",
    )
    decimal: Literal[".", ","] = Field(
        default=".",
        exclude_if=lambda mark: mark == ".",
        description="The mark before the fraction of a number. With a comma, a text with a point is no number.",
    )
    encoding: str = Field(
        default="utf-8", description="The encoding of the text as Python names it, such as cp1252, latin-1 or utf-16."
    )
    null_values: ColumnNames = Field(
        default=(), description="Texts without quotes that stand for null, such as NA or NULL, beside the empty one."
    )
    column_names: ColumnNames = Field(
        default=(), description="The names of the columns, where files have no first line that says them."
    )

    @field_validator("delimiter", "quote")
    @classmethod
    def _is_one_byte(cls, value: str | None) -> str | None:
        if value is not None and (not value.isascii() or value in "\r\n"):
            message = f"must be one ASCII character and no line end, got {value!r}"
            raise ValueError(message)
        return value

    @field_validator("encoding")
    @classmethod
    def _is_encoding_of_text(cls, value: str) -> str:
        try:
            found = codecs.lookup(value)
            "".encode(value)
        except LookupError:
            message = f"must be an encoding of text that Python knows, such as utf-8, cp1252 or utf-16, got {value!r}"
            raise ValueError(message) from None
        return found.name

    @model_validator(mode="after")
    def _marks_differ(self) -> Self:
        if self.quote is not None and self.quote == (self.delimiter or ","):
            message = f"delimiter and quote must be different characters, got {self.quote!r} for both"
            raise ValueError(message)
        return self


class BatchOptions(Frozen):
    """Everything about a batch run that has a default."""

    key_columns: ColumnNames = Field(
        default=(),
        description="Columns of the dataset that name a row in the output. Without any: source_file and source_row.",
    )
    input_columns: dict[str, ColumnNames] = Field(
        default_factory=dict,
        description="Which columns feed a tensor input of the model, by input name, where the model does not say it.",
    )
    policies: dict[str, ColumnPolicy] = Field(
        default_factory=dict,
        description="How columns are cast and what becomes of nulls, by column name; '*' stands for every other.",
    )
    params: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Values of params in the model's signature, by name. One that is not given has its default there.",
    )
    source_version: int | None = Field(
        default=None,
        ge=0,
        description="The version of a Delta table, or the id of a snapshot of an Iceberg table, that is read. Without: "
        "the current one.",
    )
    source_timestamp: AwareDatetime | None = Field(
        default=None, description="Reads the version of a table that was the current one then, time zone included."
    )
    partition_types: dict[str, PartitionType] = Field(
        default_factory=dict,
        description="Types of columns that are in the paths of the source's files, such as `day=2024-02-29`, by name. "
        "Without: text, as it is written, and in a Delta table what its schema says.",
    )
    missing_columns: MissingColumns = Field(
        default="refuse",
        description="What becomes of a column that other files of the source have and a file lacks. refuse: the run is "
        "refused, unless the column's policy gives nulls a value. null: its rows hold nulls there, keys too. Columns "
        "that the schema of a table has are null in older files in any case.",
    )
    features: tuple[FeatureTable, ...] = Field(
        default=(),
        max_length=FEATURE_TABLES_MAX,
        description="Tables of features over time that are joined to the source: each of its rows gets the latest row "
        "of each table that is not later than its own time.",
    )
    spine_time: str | None = Field(
        default=None,
        min_length=1,
        description="The column of the source that says as of when a row is scored: a date or a timestamp. With "
        "features, and only with them.",
    )
    output: Literal["parquet", "delta", "iceberg"] = Field(
        default="parquet",
        description="parquet: parts and a manifest. delta, iceberg: the same parts added to a Delta or Iceberg table.",
    )
    delta_mode: TableMode = Field(
        default="append",
        description="Whether the run's rows are added to the Delta table, replace what it holds, or (upsert) replace "
        "the rows that have the same keys and are added beside the others.",
    )
    iceberg_table: str | None = Field(
        default=None,
        description="The Iceberg table that the rows go into, as CATALOG.NAMESPACE.TABLE: the catalog is one of "
        "pyiceberg's configuration. It is made at the destination where there is none.",
    )
    iceberg_mode: TableMode = Field(default="append", description="As delta_mode, of the Iceberg table.")
    missing_keys: Literal["keep", "delete", "mark"] = Field(
        default="keep",
        description="What an upsert does with rows of the table whose keys the run does not have. keep: nothing. "
        "delete: they are taken out. mark: they stay without predictions, with the reason 'not in source'.",
    )
    rescore: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Asks for another scoring of the same model and files, such as 'after-the-outage': a run of its "
        "own that scores every row again, rejects too, and leaves the earlier run as it is. The same text is the same "
        "run.",
    )
    reuse: Reuse = Field(
        default="same",
        description="Whether a run has the parts that an earlier run of the destination has made of the same model, "
        "options and rows. same: where versions and processor are the same too, and so is every byte. any: also where "
        "they are not, and last digits may differ. none: every row is scored.",
    )
    other_source: OtherSource = Field(
        default="refuse",
        description="What becomes of a run over another source than the one that the destination has predictions of, "
        "whose rows would take the place of all of these. Dates in an address may differ. refuse: it is refused. "
        "replace: it takes their place.",
    )
    on_empty: OnEmpty = Field(
        default="refuse",
        description="What becomes of a run over a source without rows. refuse: it is refused. publish: a table without "
        "rows is published, in one part that has the columns.",
    )
    check_keys: bool = Field(
        default=True,
        description="Whether the key columns of a run are read again before it is published, to count keys that "
        "several rows have. Only a run that needs unique keys, an upsert, is refused for doubled ones.",
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="An explicit name for the run's folder instead of its key.",
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=1 << 24,
        description="Rows of one forward pass; for text models tokens, padding included (512).",
    )
    rows_per_chunk: int | None = Field(default=None, ge=1, le=1 << 32, description="Rows that one checkpoint covers.")
    slots: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Streams of forward passes side by side. "
        "They have a part in the sizes of batches and chunks that are chosen, and so in last digits of text models.",
    )
    bfloat16_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="Let passes run in bfloat16 where that is faster and no prediction of a sample differs from "
        "float32's by more than this.",
    )
    torch_compile: bool = Field(
        default=False, description="Let passes run through torch.compile where that is faster; needs a C++ compiler."
    )
    memory_mb: int | None = Field(
        default=None, ge=1, description="Memory that the run may take, in MiB. Without: what this machine has free."
    )
    environment: EnvironmentOption = None
    packages: PackagesOption = None
    pass_seconds_max: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="Seconds that one pass of a model of Python may take, a batch or a row. A row that takes longer is "
        "a reject. Torch modules have no such limit.",
    )
    pass_memory_mb: int | None = Field(
        default=None,
        ge=16,
        description="Memory that the passes of a model of Python may take in each of its processes, in MiB, over what "
        "it has once it is loaded. A row that takes more is a reject. Without: what the machine has.",
    )
    runner: Threads | Ray = Field(
        default=Threads(), discriminator="kind", description="Where shards are scored: in threads, or on a Ray cluster."
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Flow runs that score this run together, where it is one of a deployment: it starts the others.",
    )
    joins: UUID | None = Field(
        default=None,
        description="The id of a flow run whose run this one is to join, as one more worker. It takes the model and "
        "the files that the other resolved, whatever they are by now.",
    )
    max_reject_fraction: float = Field(
        default=0.1, ge=0, le=1, description="The run stops, unpublished, when more of its rows than this are rejects."
    )
    gate: Gate | None = Field(
        default=None,
        description="What the statistics of the run's columns are held against before it is published. Without: "
        "nothing, and no statistics are kept.",
    )
    challengers: ColumnNames = Field(
        default=(),
        max_length=CHALLENGERS_MAX,
        description="Other models that score the same rows in the same read, as addresses like that of the model. "
        "Their predictions lie apart, and are compared with the model's.",
    )
    segment_columns: ColumnNames = Field(
        default=(),
        max_length=8,
        description="Columns of the source by whose values challengers are compared once more.",
    )
    labels: Labels | None = Field(
        default=None, description="What the rows turned out to be, by which model and challengers are measured."
    )
    promote_if: PromoteIf | None = Field(
        default=None, description="When a challenger takes the alias of the model, once the run is published."
    )
    allow_pickle: bool = Field(
        default=False, description="Load a pickled model. Unpickling runs any code in it: only for models you trust."
    )
    experiment: str | None = Field(
        default="overnight", description="The MLflow experiment that gets the run's lineage; null for none."
    )
    csv: CsvOptions | None = Field(
        default=None,
        description="How the CSV files of the source are written. With it, files of any other name are taken as CSV.",
    )
    sample_rows: int = Field(
        default=10,
        ge=0,
        le=100,
        description="Rows with their predictions that Prefect shows, beside a picture of how the predictions are "
        "distributed; 0 sends nothing of the predictions to Prefect.",
    )

    disclose: Disclose = Field(
        default="values",
        description="What reports, messages, Prefect, MLflow and OpenLineage are told of rows. values: what errors and "
        "rejects quote, and sample_rows. nothing: kinds of errors, columns and counts; no value of any row.",
    )
    notices: Literal["none", "interruption", "rebalance"] = Field(
        default="interruption",
        description="Which notices of the machine's cloud (AWS, GCP, Azure) end the run early, to be resumed: "
        "interruptions, none, or AWS's rebalance recommendation too, where workers leave such a machine as well.",
    )
    notice_seconds: float = Field(
        default=30.0,
        ge=1,
        le=86_400,
        description="Seconds from SIGTERM until the process is killed, by the rule of who sends it: "
        "terminationGracePeriodSeconds on Kubernetes, TimeoutStopSec under systemd, 30 for Prefect's workers.",
    )

    @property
    def rows_shown(self) -> int:
        """How many rows with their predictions Prefect shows."""
        return self.sample_rows if self.disclose == "values" else 0

    @model_validator(mode="after")
    def _discloses_no_comparison(self) -> Self:
        if self.disclose == "nothing" and self.challengers:
            message = (
                "challengers must be left out where nothing of the rows is disclosed, since they are compared by "
                f"values of rows; got disclose='nothing' and {len(self.challengers)} challengers"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _cluster_has_slots(self) -> Self:
        if isinstance(self.runner, Ray) and self.runner.address is not None and self.slots is None:
            message = (
                f"{name_option('slots')} must say how many forward passes the Ray cluster runs side by side, got none."
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _modes_are_of_the_output(self) -> Self:
        for table in ("delta", "iceberg"):
            mode = getattr(self, f"{table}_mode")
            if mode != "append" and self.output != table:
                message = (
                    f"{name_option(f'{table}_mode')} must go with {give_option('output', table)}, got {mode!r} where "
                    f"output is {self.output!r}."
                )
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _rows_once(self) -> Self:
        if self.rescore is not None and self.table_mode == "append":
            message = (
                f"{name_option(f'{self.output}_mode')} must be 'replace' or 'upsert' where rescore is given, got "
                "'append': the rows of the earlier run would be in the table twice."
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _rows_have_keys(self) -> Self:
        if self.upserts and not self.key_columns:
            message = (
                f"{name_option('key_columns')} must name the columns by which rows of the table are replaced where "
                f"{name_option(f'{self.output}_mode')} is 'upsert', got none."
            )
            raise ValueError(message)
        if self.upserts and not self.check_keys:
            message = (
                f"{name_option('check_keys')} must be true where rows are put into a table by their keys, got false: "
                "a key that two rows have would put both there."
            )
            raise ValueError(message)
        if self.missing_keys != "keep" and not self.upserts:
            message = (
                f"{name_option('missing_keys')} must be 'keep' unless rows are put into a table by their keys, "
                f"got {self.missing_keys!r}. Give {give_option('delta_mode', 'upsert')}."
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _features_have_time(self) -> Self:
        if bool(self.features) != (self.spine_time is not None):
            message = (
                f"{name_option('spine_time')} must name the source's column of time where {name_option('features')} "
                f"are given, and only there; got spine_time={self.spine_time!r} and {len(self.features)} tables."
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _one_version(self) -> Self:
        if self.source_version is not None and self.source_timestamp is not None:
            message = (
                f"{name_option('source_version')} or {name_option('source_timestamp')} must say which version of the "
                "source is read, got both."
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _table_has_name(self) -> Self:
        if (self.output == "iceberg") != (self.iceberg_table is not None):
            message = (
                f"{name_option('iceberg_table')} must name the table, as CATALOG.NAMESPACE.TABLE, where output is "
                f"'iceberg', and only there; got output={self.output!r} and iceberg_table={self.iceberg_table!r}."
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _challengers_can_be_compared(self) -> Self:
        beside = [name for name in ("segment_columns", "labels", "promote_if") if getattr(self, name)]
        if beside and not self.challengers:
            message = f"{name_option('challengers')} must name a model where {beside[0]} is given, got none."
            raise ValueError(message)
        if self.challengers and self.bfloat16_tolerance is not None:
            message = (
                "bfloat16_tolerance must be unset where there are challengers, got "
                f"{self.bfloat16_tolerance:g}: differences would be those of the precision too."
            )
            raise ValueError(message)
        if self.promote_if is not None and self.labels is None:
            message = f"labels must be given where promote_if is, got none: they measure {self.promote_if.metric}."
            raise ValueError(message)
        if self.labels is not None and self.labels.source is not None and not self.key_columns:
            message = (
                f"{name_option('key_columns')} must name the columns by which labels of another table are found, got "
                "none."
            )
            raise ValueError(message)
        return self

    @property
    def columns_kept(self) -> tuple[str, ...]:
        """The columns of the source that challengers' parts hold beside the predictions, to be compared by."""
        labels = (self.labels.column,) if self.labels is not None and self.labels.source is None else ()
        return tuple(dict.fromkeys([*self.segment_columns, *labels]))

    @model_validator(mode="after")
    def _one_way_to_spread(self) -> Self:
        if isinstance(self.runner, Ray) and self.workers > 1:
            message = (
                f"{name_option('workers')} must be 1 where Ray spreads the work, got {self.workers}; raise "
                f"{name_option('slots')} instead."
            )
            raise ValueError(message)
        return self

    @property
    def column_policies(self) -> dict[str, ColumnPolicy]:
        """How columns are cast, by column name: the policies, with the mark of decimals that the CSV files have."""
        if self.csv is None or self.csv.decimal == ".":
            return self.policies
        policies = {"*": ColumnPolicy(), **self.policies}
        return {name: each.model_copy(update={"decimal": self.csv.decimal}) for name, each in policies.items()}

    @property
    def table_mode(self) -> TableMode | None:
        """How rows go into the table that is the output, None where it is no table."""
        return {"delta": self.delta_mode, "iceberg": self.iceberg_mode}.get(self.output)

    @property
    def upserts(self) -> bool:
        """Whether rows replace those of a table that have the same keys."""
        return self.table_mode == "upsert"

    @property
    def join_columns(self) -> tuple[str, ...]:
        """The columns of the source by which features are joined to it: the keys of their tables, then the time."""
        names = [key for table in self.features for key in table.join_keys]
        return tuple(dict.fromkeys([*names, *([self.spine_time] if self.spine_time else [])]))

    @property
    def copied_columns(self) -> tuple[str, ...]:
        """The columns of the source that are read as they are, whatever the model takes: keys, and what joins."""
        return tuple(dict.fromkeys([*self.key_columns, *self.join_columns]))

    def list_nullable(self, contract: Contract) -> frozenset[str]:
        """Return the columns of the source that are null in files that lack them, where others have them."""
        others = {*self.copied_columns, *self.columns_kept}
        if self.missing_columns == "null":
            return frozenset(column.name for column in contract.columns) | others
        return contract.nullable - others

    def key_fields(self) -> dict[str, object]:
        """Return what the run key is made of: the options that change the output."""
        # Without them a call keeps the key that it has had before there were such options.
        unset = {
            name for name in ("rescore", "params", "csv", "environment", "partition_types") if not getattr(self, name)
        }
        unset |= {"missing_keys"} if self.missing_keys == "keep" else set()
        unset |= set() if self.features else {"features", "spine_time"}
        unset |= {"iceberg_table", "iceberg_mode"} if self.output != "iceberg" else {"delta_mode"}
        fields = self.model_dump(mode="json", exclude=_NOT_IN_KEY | unset)
        if self.features:
            # Where features come from is in the snapshots of their tables.
            fields["features"] = [table.model_dump(mode="json", exclude={"source"}) for table in self.features]
        return fields
