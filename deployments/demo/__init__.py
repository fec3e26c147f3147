"""The demo: real flights to score and a model that was trained on them."""

import os

# MLflow decides on telemetry at its first import, so this comes before every import of it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
