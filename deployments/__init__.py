"""Deployments of the flows on a Prefect server, and demos that run them on real flights.

`prefect.yaml` has the complete configurations. `apply` creates them, with their work pools, on a server; `automations`
has those that resume lost runs. `demo` runs the flows on this machine.
"""
