"""How flows run: `flow_decorator` makes them, `steps` times and shows what they do, `interruption` ends them early.

`task_runners` and `ray_runner` score the shards of a batch run by `shard_task`; `joining` lets many workers score one
run. `stream_run`, `calibration_run` and the modules about deployments carry out what other flows decide.
"""
