"""The opener: turns the source and the sink that a user names into open connections, and checks them before scoring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from nats.js.api import StreamInfo

from serving.errors import BadInput, StreamReplaced, StreamUnfit
from serving.model.contract import Contract
from serving.model.pin import ModelPin
from tasks.batch.parts import REJECT_COLUMN, REJECT_REASON
from tasks.batch.run_records import load_plan, read_record
from tasks.storage import Storage, open_storage
from tasks.stream.connections import Connections, DeadLetters, EmitPolicy, Sink
from tasks.stream.decode import Decoder
from tasks.stream.kafka.client import KafkaErrorHandler, KafkaTopic
from tasks.stream.kafka.sink import KafkaDeadLetters, KafkaSink, MessageProducer, check_topics
from tasks.stream.kafka.source import KafkaSource
from tasks.stream.nats.connection import NatsConnection, find_stream
from tasks.stream.nats.consumer import check_identity, check_position, find_identity
from tasks.stream.nats.deduplication import EmittedIds
from tasks.stream.nats.sink import NatsDeadLetters, NatsSink, ensure_dead_letter_stream, ensure_sink_stream
from tasks.stream.nats.source import NatsSource
from tasks.stream.options import FromKafka, FromNats, StreamOptions, ToKafka, ToNats, ToParts
from tasks.stream.parts_sink import NUMBER, PARTITION, ROW, PartsSink, TableLog, build_table_plan, log_path


@dataclass(slots=True, kw_only=True)
class ConnectionOpener:
    """Opens the connections of one stream for one model version.

    `warn` is called with warnings while a broker is waited for. `give_up` ends every wait. NATS is asked for the lag
    every `lag_seconds`.
    """

    decoder: Decoder
    model: ModelPin
    options: StreamOptions
    warn: Callable[[str], None]
    give_up: threading.Event
    lag_seconds: float = 2.0

    @property
    def contract(self) -> Contract:
        """The inputs and outputs of the model."""
        return self.decoder.contract

    @contextmanager
    def open(self, source: FromNats | FromKafka, sink: ToNats | ToKafka | ToParts) -> Generator[Connections]:
        """Open source, sink and dead letters, and close them after the block.

        Raises:
            BadInput: Its kinds say what does not fit, before any message is read.
        """
        with ExitStack() as stack:
            if isinstance(source, FromNats):
                yield self._open_nats_source(source, sink, stack)
            else:
                yield self._open_kafka_source(source, sink, stack)

    def _open_nats_source(self, source: FromNats, sink: ToNats | ToKafka | ToParts, stack: ExitStack) -> Connections:
        connection = self._connect_nats(source.url, stack)
        identity = connection.run(find_identity(connection, source))
        origin = f"{source.consumer}.{identity}"
        dead_letter_stream = connection.run(ensure_dead_letter_stream(connection, source))
        dead_ids = _build_emitted_ids(source, connection, f"dead.{origin}", connection, dead_letter_stream)
        emitted_ids: EmittedIds | None = None
        start: int | None = None
        opened: Sink
        if isinstance(sink, ToParts):
            opened, start = self._open_table_of_nats(sink, source, identity, connection)
        elif isinstance(sink, ToNats):
            opened, emitted_ids = self._open_nats_sink(sink, source, origin, stack, connection)
        else:
            opened = self._open_kafka_sink(sink, source, origin)
        reader = NatsSource(
            connection,
            source,
            in_flight=self.options.in_flight,
            bytes_max=self.options.in_flight_bytes // 2,
            start=start,
            limit=self.options.limit,
            identity=None if start is None else identity,
            lag_seconds=self.lag_seconds,
        )
        stack.callback(reader.close)
        dead_letters = NatsDeadLetters(
            connection, source, origin, find_known=dead_ids.find_known, find_emitted=dead_ids.find_emitted
        )
        connections = self._build_connections(reader, opened, dead_letters, sink)
        # The source of a table counts no deliveries.
        max_deliver = source.max_deliver if start is None else None
        connections = replace(connections, max_deliver=max_deliver, give_back=reader.give_back)
        return connections if emitted_ids is None else replace(connections, find_emitted=emitted_ids.find_emitted)

    def _open_kafka_source(self, source: FromKafka, sink: ToNats | ToKafka | ToParts, stack: ExitStack) -> Connections:
        check_topics(source, sink)
        errors = KafkaErrorHandler(source.servers, self.warn, self.give_up)
        reader = KafkaSource(source, errors, bytes_max=self.options.in_flight_bytes // 2)
        stack.callback(reader.close)
        dead_letters = KafkaDeadLetters(MessageProducer(source.servers, errors), source)
        start = None
        opened: Sink
        if isinstance(sink, ToParts):
            opened, start = self._open_table_of_kafka(sink, source, reader.topic)
        elif isinstance(sink, ToNats):
            opened, _ = self._open_nats_sink(sink, source, reader.origin, stack, None)
        else:
            opened = self._open_kafka_sink(sink, source, reader.origin)
        reader.start(start)
        return self._build_connections(reader, opened, dead_letters, sink)

    def _build_connections(
        self,
        reader: NatsSource | KafkaSource,
        opened: Sink,
        dead_letters: DeadLetters,
        sink: ToNats | ToKafka | ToParts,
    ) -> Connections:
        connections = Connections(
            source=reader, acknowledger=reader, sink=opened, dead_letters=dead_letters, lag=reader.lag
        )
        if not isinstance(sink, ToParts):
            return connections
        emit_policy = EmitPolicy(rows=sink.rows_per_part, seconds=sink.seconds_per_part)
        return replace(
            connections, emit_policy=emit_policy, compact=lambda scored: scored.compact(self.options.key_columns)
        )

    def _open_nats_sink(
        self,
        sink: ToNats,
        source: FromNats | FromKafka,
        origin: str,
        stack: ExitStack,
        source_connection: NatsConnection | None,
    ) -> tuple[NatsSink, EmittedIds | None]:
        connection = source_connection
        if connection is None or sink.url not in (None, connection.url):
            connection = self._connect_nats(sink.url or FromNats.model_fields["url"].default, stack)
        stream = connection.run(ensure_sink_stream(connection, sink, source))
        emitted_ids = None
        if source_connection is not None and isinstance(source, FromNats):
            emitted_ids = _build_emitted_ids(source, source_connection, origin, connection, stream)
            emitted_ids.read_after_pause()
        opened = NatsSink(
            connection,
            sink,
            origin,
            contract=self.contract,
            keys=self.options.key_columns,
            model=self._model_name,
            find_known=emitted_ids.find_known if emitted_ids else set,
        )
        return opened, emitted_ids

    def _open_kafka_sink(self, sink: ToKafka, source: FromNats | FromKafka, origin: str) -> KafkaSink:
        servers = sink.servers or (
            source.servers if isinstance(source, FromKafka) else FromKafka.model_fields["servers"].default
        )
        producer = MessageProducer(servers, KafkaErrorHandler(servers, self.warn, self.give_up))
        keys = self.options.key_columns
        return KafkaSink(producer, sink, origin, contract=self.contract, keys=keys, model=self._model_name)

    @property
    def _model_name(self) -> str:
        return f"{self.model.name}/{self.model.version}"

    def _connect_nats(self, url: str, stack: ExitStack) -> NatsConnection:
        connection = NatsConnection(url, self.warn, self.give_up)
        stack.callback(connection.close)
        return connection

    def _open_table_of_nats(
        self, sink: ToParts, source: FromNats, identity: str, connection: NatsConnection
    ) -> tuple[PartsSink, int]:
        """Return a table and the number to read its stream from; raises where the table is of another stream."""
        plan = load_plan(open_storage(sink.destination), sink.name)
        root = plan.source.root.split(" ") if plan is not None else []
        if len(root) > 1 and root[1] != identity and root[1].partition("@")[0] == source.stream:
            message = (
                f"The table {sink.name!r} must go on in the stream {source.stream!r} that it is made of ({root[1]}), "
                f"but that was deleted and made again ({identity}). Read the new one with another name of the table."
            )
            raise StreamReplaced(message)
        table = self._open_table(sink, f"nats {identity} {source.subject or ''}")
        table.check_source = lambda: connection.run(check_identity(connection, source, identity))
        start = table.find_start(
            identity, lambda: {0: connection.run(find_stream(connection, source.stream)).state.first_seq}
        )[0]
        connection.run(check_position(connection, source, f"table {sink.name!r}", start))
        return table, start

    def _open_table_of_kafka(
        self, sink: ToParts, source: FromKafka, topic: KafkaTopic
    ) -> tuple[PartsSink, dict[int, int]]:
        """Return a table and the offsets to read its topic from; raises where the table is of another topic."""
        topic.reader, topic.alternative = f"table {sink.name!r}", "another name of the table"
        storage = open_storage(sink.destination)
        plan, identity = load_plan(storage, sink.name), topic.identity
        if plan is not None and plan.source.root == topic.name:
            self._check_table_without_id(storage, sink, source, topic)
            identity = topic.name
        elif plan is not None and plan.source.root.startswith(f"{topic.name} ") and plan.source.root != identity:
            message = (
                f"The table {sink.name!r} must go on in the topic {source.topic!r} that it is made of (id "
                f"{plan.source.root.rpartition(' ')[2]}), but that was deleted and made again (id {topic.id}). Read "
                "the new one with another name of the table."
            )
            raise StreamReplaced(message)
        table = self._open_table(sink, identity)
        table.check_source = topic.check_identity
        start = table.find_start(
            topic.identity,
            lambda: {partition: low for partition, (low, _) in topic.read_bounds(topic.partitions).items()},
        )
        return table, start

    def _open_table(self, sink: ToParts, identity: str) -> PartsSink:
        keys = self.options.key_columns
        plan = build_table_plan(sink, identity, model=self.model, contract=self.contract, keys=keys)
        return PartsSink(open_storage(sink.destination), plan, self.model, self.decoder.key_types)

    def _check_table_without_id(self, storage: Storage, sink: ToParts, source: FromKafka, topic: KafkaTopic) -> None:
        """Raise where a table of an earlier version, whose plan has no id of its topic, may be of another topic."""
        log = read_record(storage, log_path(sink.name), TableLog)
        if log is not None and log.identity != topic.identity:
            message = (
                f"The table {sink.name!r} must go on in the topic {source.topic!r} that it is made of "
                f"({log.identity}), but that was deleted and made again ({topic.identity}). Read the new one with "
                "another name of the table."
            )
            raise StreamReplaced(message)
        if log is None and source.topic_id is None:
            message = (
                f"The table {sink.name!r} must be made of this topic {source.topic!r}, not of an earlier one of its "
                "name, but the version of Overnight that began it did not keep the id of the topic. Where the topic "
                f"was never deleted, set topic_id={topic.id!r} of the source once; else read it with another name of "
                "the table."
            )
            raise StreamUnfit(message)


def _build_emitted_ids(
    source: FromNats, connection: NatsConnection, origin: str, sink_connection: NatsConnection, stream: StreamInfo
) -> EmittedIds:
    return EmittedIds(
        connection=connection,
        source=source,
        sink_connection=sink_connection,
        sink_stream=stream.config.name or "",
        origin=origin,
        window_seconds=stream.config.duplicate_window or 0.0,
    )


def check_column_names(contract: Contract, key_columns: tuple[str, ...], *, parts: bool) -> None:
    """Raise BadInput where two columns of the output would have one name; `parts` says that it is a table of parts."""
    own = (PARTITION, NUMBER, ROW) if parts else ()
    names = [*own, *key_columns, *(output.name for output in contract.outputs), REJECT_COLUMN, REJECT_REASON]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        message = (
            f"The columns of the output must have different names, got {twice} twice. Choose other keys, or rename the "
            "output."
        )
        raise BadInput(message)
