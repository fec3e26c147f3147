"""Opening the ends of a stream: what a person named becomes connections, checked before anything is scored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from nats.js.api import StreamInfo

from serving.errors import BadInput, StreamReplaced, StreamUnfit
from serving.model.contract import Contract
from serving.model.registry import ModelPin
from tasks.batch.parts import REJECT_COLUMN, REJECT_REASON
from tasks.batch.plan import load_plan, read_record
from tasks.storage import Storage, open_storage
from tasks.stream.connections import Cadence, DeadLetters, Ends, Sink
from tasks.stream.decode import Decoder
from tasks.stream.kafka.client import KafkaVoice, TopicLog
from tasks.stream.kafka.sink import KafkaDeadLetters, KafkaSink, KafkaWriter
from tasks.stream.kafka.source import KafkaSource
from tasks.stream.nats.connection import NatsLink, find_stream
from tasks.stream.nats.consumer import check_identity, check_reach, find_identity
from tasks.stream.nats.deduplication import Recall
from tasks.stream.nats.sink import NatsDeadLetters, NatsSink, open_dead_letters, open_sink
from tasks.stream.nats.source import NatsSource
from tasks.stream.options import FromKafka, FromNats, StreamOptions, ToKafka, ToNats, ToParts
from tasks.stream.parts_sink import NUMBER, PARTITION, ROW, PartsSink, TableLog, log_path, table_plan


@dataclass(slots=True, kw_only=True)
class Opener:
    """Opens the ends of one stream for one model version."""

    decoder: Decoder
    model: ModelPin
    options: StreamOptions
    say: Callable[[str], None]
    give_up: threading.Event

    @property
    def contract(self) -> Contract:
        """What the model takes and gives."""
        return self.decoder.contract

    @contextmanager
    def opened(self, source: FromNats | FromKafka, sink: ToNats | ToKafka | ToParts) -> Generator[Ends]:
        """Open both ends, and close them behind the block. Raises BadInput's kinds before anything is read."""
        with ExitStack() as stack:
            opened = self._from_nats if isinstance(source, FromNats) else self._from_kafka
            yield opened(source, sink, stack)  # type: ignore[arg-type]  # told apart in the line above

    def _from_nats(self, source: FromNats, sink: ToNats | ToKafka | ToParts, stack: ExitStack) -> Ends:
        link = self._link(source.url, stack)
        identity = link.run(find_identity(link, source))
        origin = f"{source.consumer}.{identity}"
        buried = _recall(source, link, f"dead.{origin}", link, link.run(open_dead_letters(link, source)))
        table, start = self._nats_table(sink, source, identity, link) if isinstance(sink, ToParts) else (None, None)
        recall = None
        if table is not None:
            to: Sink = table
        elif isinstance(sink, ToNats):
            to, recall = self._nats_sink(sink, source, origin, stack, link)
        else:
            to = self._kafka_sink(sink, source, origin)  # type: ignore[arg-type]  # a table is no other sink
        reader = NatsSource(
            link,
            source,
            in_flight=self.options.in_flight,
            bytes_max=self.options.in_flight_bytes // 2,
            start=start,
            limit=self.options.limit,
            identity=identity if table else None,
        )
        stack.callback(reader.close)
        # A table's source counts no deliveries.
        most = None if table else source.max_deliver
        # What a table's source gives again does not count as one that comes again.
        dead = NatsDeadLetters(link, source, origin, known=buried.known, already=buried.already)
        ends = self._ends(reader, to, dead, sink)
        ends = replace(ends, max_deliver=most, give_back=reader.give_back)
        return ends if recall is None else replace(ends, already=recall.already)

    def _from_kafka(self, source: FromKafka, sink: ToNats | ToKafka | ToParts, stack: ExitStack) -> Ends:
        voice = KafkaVoice(source.servers, self.say, self.give_up)
        reader = KafkaSource(source, voice, bytes_max=self.options.in_flight_bytes // 2)
        stack.callback(reader.close)
        dead = KafkaDeadLetters(KafkaWriter(source.servers, voice), source)
        start = None
        if isinstance(sink, ToParts):
            to: Sink
            to, start = self._kafka_table(sink, source, reader.log)
        elif isinstance(sink, ToNats):
            to, _ = self._nats_sink(sink, source, reader.origin, stack, None)
        else:
            to = self._kafka_sink(sink, source, reader.origin)
        reader.begin(start)
        return self._ends(reader, to, dead, sink)

    def _ends(
        self, reader: NatsSource | KafkaSource, to: Sink, dead: DeadLetters, sink: ToNats | ToKafka | ToParts
    ) -> Ends:
        ends = Ends(source=reader, receipts=reader, sink=to, dead_letters=dead, lag=reader.lag)
        if not isinstance(sink, ToParts):
            return ends
        cadence = Cadence(rows=sink.rows_per_part, seconds=sink.seconds_per_part)
        return replace(ends, cadence=cadence, keep=lambda scored: scored.light(self.options.key_columns))

    def _nats_sink(
        self, sink: ToNats, source: FromNats | FromKafka, origin: str, stack: ExitStack, from_link: NatsLink | None
    ) -> tuple[NatsSink, Recall | None]:
        link = from_link
        if link is None or sink.url not in (None, link.url):
            link = self._link(sink.url or FromNats.model_fields["url"].default, stack)
        stream = link.run(open_sink(link, sink, source))
        recall = None
        if from_link is not None and isinstance(source, FromNats):
            recall = _recall(source, from_link, origin, link, stream)
            recall.begin()
        known: Callable[[], set[str]] = recall.known if recall else set
        keys = self.options.key_columns
        made = NatsSink(link, sink, origin, contract=self.contract, keys=keys, model=self._model, known=known)
        return made, recall

    def _kafka_sink(self, sink: ToKafka, source: FromNats | FromKafka, origin: str) -> KafkaSink:
        servers = sink.servers or (
            source.servers if isinstance(source, FromKafka) else FromKafka.model_fields["servers"].default
        )
        writer = KafkaWriter(servers, KafkaVoice(servers, self.say, self.give_up))
        keys = self.options.key_columns
        return KafkaSink(writer, sink, origin, contract=self.contract, keys=keys, model=self._model)

    @property
    def _model(self) -> str:
        return f"{self.model.name}/{self.model.version}"

    def _table(self, sink: ToParts, identity: str) -> PartsSink:
        plan = table_plan(sink, identity, model=self.model, contract=self.contract, keys=self.options.key_columns)
        return PartsSink(open_storage(sink.destination), plan, self.model, self.decoder.key_types)

    def _nats_table(self, sink: ToParts, source: FromNats, identity: str, link: NatsLink) -> tuple[PartsSink, int]:
        """Return a table and the number to read its stream from; raises where the table is not of this stream."""
        subject = source.subject or ""
        standing = load_plan(open_storage(sink.destination), sink.name)
        root = standing.source.root.split(" ") if standing is not None else []
        if len(root) > 1 and root[1] != identity and root[1].partition("@")[0] == source.stream:
            message = (
                f"The table {sink.name!r} must go on in the stream {source.stream!r} that it is made of ({root[1]}), "
                f"but that was deleted and made again ({identity}). Read the new one with another name of the table."
            )
            raise StreamReplaced(message)
        table = self._table(sink, f"nats {identity} {subject}")
        table.confirm = lambda: link.run(check_identity(link, source, identity))
        start = table.begin(identity, lambda: {0: link.run(find_stream(link, source.stream)).state.first_seq})[0]
        link.run(check_reach(link, source, f"table {sink.name!r}", start))
        return table, start

    def _kafka_table(self, sink: ToParts, source: FromKafka, log: TopicLog) -> tuple[PartsSink, dict[int, int]]:
        """Return a table and where to read its topic from; raises where the table is not of this topic."""
        log.reader, log.instead = f"table {sink.name!r}", "another name of the table"
        storage = open_storage(sink.destination)
        standing, identity = load_plan(storage, sink.name), log.identity
        if standing is not None and standing.source.root == log.name:
            self._adopt(storage, sink, source, log)
            identity = log.name
        elif (
            standing is not None
            and standing.source.root.startswith(f"{log.name} ")
            and standing.source.root != identity
        ):
            message = (
                f"The table {sink.name!r} must go on in the topic {source.topic!r} that it is made of (id "
                f"{standing.source.root.rpartition(' ')[2]}), but that was deleted and made again (id {log.id}). Read "
                "the new one with another name of the table."
            )
            raise StreamReplaced(message)
        table = self._table(sink, identity)
        table.confirm = log.confirm
        start = table.begin(log.identity, lambda: {at: low for at, (low, _) in log.reach(log.partitions).items()})
        return table, start

    def _adopt(self, storage: Storage, sink: ToParts, source: FromKafka, log: TopicLog) -> None:
        """See to it that a table of an earlier version, which has no id of its topic, is of this one."""
        known = read_record(storage, log_path(sink.name), TableLog)
        if known is not None and known.identity != log.identity:
            message = (
                f"The table {sink.name!r} must go on in the topic {source.topic!r} that it is made of "
                f"({known.identity}), but that was deleted and made again ({log.identity}). Read the new one with "
                "another name of the table."
            )
            raise StreamReplaced(message)
        if known is None and source.topic_id is None:
            message = (
                f"The table {sink.name!r} must be made of this topic {source.topic!r}, not of an earlier one of its "
                "name, but the version of Overnight that began it did not keep the id of the topic. Where the topic "
                f"was never deleted, set topic_id={log.id!r} of the source once; else read it with another name of the "
                "table."
            )
            raise StreamUnfit(message)

    def _link(self, url: str, stack: ExitStack) -> NatsLink:
        link = NatsLink(url, self.say, self.give_up)
        stack.callback(link.close)
        return link


def _recall(source: FromNats, link: NatsLink, origin: str, sink_link: NatsLink, stream: StreamInfo) -> Recall:
    return Recall(
        link=link,
        source=source,
        sink_link=sink_link,
        sink=stream.config.name or "",
        origin=origin,
        window_seconds=stream.config.duplicate_window or 0.0,
    )


def check_names(contract: Contract, key_columns: tuple[str, ...], *, parts: bool) -> None:
    """Raise BadInput where two columns of the output would have one name."""
    places = (PARTITION, NUMBER, ROW) if parts else ()
    names = [*places, *key_columns, *(output.name for output in contract.outputs), REJECT_COLUMN, REJECT_REASON]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        message = (
            f"The columns of the output must have different names, got {twice} twice. Choose other keys, or rename the "
            "output."
        )
        raise BadInput(message)
