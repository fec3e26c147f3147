"""Envoy, the gateway's data path: its configuration as functions of the endpoints, its process, and its statistics.

`configuration` renders the files that Envoy reads, `process` runs it, `admin` reads its statistics. The two Lua files
run inside Envoy, for each inference request.
"""
