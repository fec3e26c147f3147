"""Which tests of servers and machines a change can reach: what CI runs beside all tests of values.

In a run of the whole suite each process is observed: by `observer`, and those of pytest by `plugin` too. From that,
`reads` says which files of tests read which files of the project, and `record` keeps it. `choice` decides by it, as a
function of values. `python -m tests.selection` prints the choice, and `unseen.toml` declares what is not observed.
"""
