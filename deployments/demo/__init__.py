"""The demos: real flights to score, and a model that is trained on them.

`python -m deployments.demo` is the batch run; `endpoint`, `stream` and `modes` are run in the same way. `flights`
writes the data, `delay_model` trains the model, and `prepare` does both once.
"""

import os

# MLflow decides on telemetry at its first import, so this comes before every import of it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
