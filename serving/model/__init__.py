"""Models: a registered version is resolved, loaded, tuned, and asked for predictions.

In the order of a run: `registry` pins a version, `signature` and `contract` say which columns feed it, `loading` loads
its files, `encoding` turns a table into its inputs, `forward` runs the passes, and `outputs` names what it returns.
`interface` has the Protocols that `loading`, `torch_model`, `cuda` and `text` implement. `tuner` chooses an engine and
a batch size; `batching` has the cost model of a batch; `release` is a model version as an endpoint serves it.
"""
