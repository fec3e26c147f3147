"""NATS JetStream as source and sink of a stream.

`connection` keeps one connection to a server. `consumer` creates and checks consumers, `source` pulls messages from
one, and `sink` publishes scores and dead letters. `deduplication` finds scores that are emitted already where the
server does not remember their ids any more.
"""
