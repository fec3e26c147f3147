"""Models: a registered version is resolved, loaded, tuned, and asked for predictions.

In the order of a run: `registry` pins a version, `signature` and `contract` say which columns feed it, `loading` loads
its files, `encoding` turns a table into its inputs, `forward` runs the passes, and `outputs` names what it returns.
`interface` has the Protocols that `loading`, `torch_model`, `cuda`, `text`, `generation` and `processes` implement.
`processes` runs a model of Python in child processes: `process_handle` starts and ends them, `process_program` runs in
them, `process_protocol` is what they say to each other, and `python_model` calls the model. `requirements` reads what a
model was logged with, and `environment` makes that by uv. `tuner` chooses an engine and a batch size; `batching` has
the cost model of a batch and chooses the batching of an endpoint, by the queue that `queueing` simulates;
`release` is a model version as an endpoint serves it, and `graph` two or three of them as one.
"""
