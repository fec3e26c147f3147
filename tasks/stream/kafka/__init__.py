"""Kafka as source and sink of a stream."""
