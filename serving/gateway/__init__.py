"""The gateway: the HTTP server in front of every endpoint's model servers. It forwards requests and runs no model.

A request goes through `app` (the web application), `inference_handler` (key, limits, contract) and `endpoint` (queue,
choice of a version) to an adapter in `upstreams` or `mlflow_scoring`. `rollout` judges canaries and sends copies to
shadows; `scale_to_zero` unloads idle models and loads them again. `route` holds the records that the administrator puts
and the files store, `client` the administrator's client, `metering` the log of requests. `python -m serving.gateway`
starts a gateway, which is in `server`. All but `route`, `client` and `metering` need the extra `serve`.
"""
