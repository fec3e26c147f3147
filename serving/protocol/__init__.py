"""Protocols: the Open Inference Protocol, version 2, as bodies, tensors and an app."""
