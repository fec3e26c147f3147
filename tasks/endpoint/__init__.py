"""The steps that put a release into service, in the order in which `flows.endpoint` takes them.

`spec` is what a person writes. `resolve` loads the model and rows that it answers, `batching` chooses how requests are
batched, `deploy` makes the release and its host, `change` deploys it or undoes that, `verify` compares its answers with
the model's own, `load` measures how long requests wait, `budget` holds that against the budget, `traffic` moves
requests to it, and `report` shows the result.
"""
