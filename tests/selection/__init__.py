"""Which tests of servers and machines a change can reach: what CI runs beside all tests of values.

`graph` says what each file of the project reads, imports or starts, and `choice` decides from that, as a function of
values. `record` has the last run of the whole suite, which a change is measured against. `python -m tests.selection`
prints the choice, and `edges.toml` declares what no import and no name in a file shows.
"""
