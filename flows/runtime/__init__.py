"""How flows run: `flow_decorator` makes them, `steps` times and shows what they do, `interruption` ends them early.

`parameters` explains a wrong call, `error_output` is how an error looks in logs, and `own_process` what is changed of
the process that a flow is called in.
`task_runners` and `ray_runner` score the shards of a batch run by `shard_task`; `joining` lets many workers score one
run. `stream_run`, `calibration_run` and the modules about deployments carry out what other flows decide.
"""
