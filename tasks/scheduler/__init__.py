"""From a description of the consumer to the mode that serves it at the lowest cost: online, batch or streaming.

A `workload` says who consumes the predictions; `arrivals`, `prices` and `profile` give the figures of a `scenario`.
Each way to serve it is simulated (`simulate_online`, `keep_warm`, `simulate_batch`, on `queue_simulation` and
`spot_simulation`), `candidates` ranks them, and `decide` makes the `decision`, with what would change it
(`sensitivity`). `report` shows it, `deployment_plan` says which deployments put it into effect, and `review` decides
whether a later decision is worth a change.
"""
