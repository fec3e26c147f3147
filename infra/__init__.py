"""Where Overnight runs: the worker of a machine, AWS, files for systemd and Kubernetes, a local stack of real servers.

`worker` takes flow runs from a Prefect work pool and lets them drain when its machine ends. `aws` is a stack in an AWS
account, and how many machines it has. `local` starts real servers and workers on this machine. It imports nothing of
the other packages.
"""
