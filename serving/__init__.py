"""Models and the servers in front of them: what batch runs, streams and endpoints share. Never imports Prefect.

`model` resolves, loads and runs registered models; `protocol` reads and writes requests; `gateway` is the proxy in
front of endpoints; `targets` puts releases on model servers. `errors` has every error that is raised on purpose.
"""
