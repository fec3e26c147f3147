"""Real servers from wheels, on free loopback ports, stopped by the process that started them.

Each function starts one server and returns once it answers: `prefect_server`, `mlflow_server`, `s3_server`,
`nats_server`, `triton_server`, `gateway_server`, `local_controller`. `process` has what they share, and
`guard` ends a server whose starter is gone. `stack` starts several of them side by side, for `overnight local up`.
`venv` makes environments for model servers that cannot share this one.
"""
