"""Where Overnight runs: the worker of a machine, files for systemd and Kubernetes, and a local stack of real servers.

`worker` takes flow runs from a Prefect work pool and lets them drain when its machine ends. `local` starts real servers
on this machine. It imports nothing of the other packages.
"""
