"""Real servers from wheels, on free loopback ports, stopped by the process that started them.

Each function starts one server and returns once it answers: `prefect_server`, `s3_server`, `nats_server`,
`triton_server`, `gateway_server`, `ray_cluster`, `local_controller`. `process` has what they share, and `guard` ends a
server whose starter is gone. `venv` makes environments for model servers that cannot share this one.
`python -m infra.local` starts Prefect and S3 for work by hand.
"""
