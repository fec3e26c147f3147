"""Kafka as source and sink of a stream.

`source` reads a topic as a member of a group, or into a table. `sink` produces scores and dead letters. `client` has
what both share: settings, error handling, and the id and the bounds of a topic.
"""
