"""How flows run: `flow_decorator` makes them, `steps` times and shows what they do, `interruption` ends them early.

`parameters` explains a wrong call, and `error_output` and `uncaught` are how an error looks in logs and on a screen.
`task_runners` and `ray_runner` score the shards of a batch run by `shard_task`; `joining` lets many workers score one
run. `stream_run`, `calibration_run` and the modules about deployments carry out what other flows decide.
"""
