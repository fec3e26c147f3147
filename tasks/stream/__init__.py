"""Streaming inference: what comes in, how it is scored in micro-batches, and where it goes, each input once."""
