"""Streaming inference: messages are read from NATS or Kafka, scored in micro-batches, and emitted once each.

`options` holds what a user may set. `opener` turns it into open `connections`: the Protocols of source, sink and dead
letters, which `nats`, `kafka` and `parts_sink` satisfy. `pipeline` runs the stream in threads: `batcher` collects
messages, `decode` reads them, `score` scores them. `tuning` chooses engine and batching, and `report` has metrics,
progress and the final report.
"""
