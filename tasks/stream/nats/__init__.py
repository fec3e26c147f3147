"""NATS JetStream as source and sink of a stream."""
