"""Versions of the delay model that no endpoint should keep, as MLflow loads a model out of a file of code.

The fault is in the model's configuration. moody: it answers differently each time. delicate: it fails on flights that
leave over an hour late. slow: it takes a third of a second for those.
"""

import time

import mlflow
import numpy as np
from mlflow.pyfunc.model import PythonModel

LATE_MINUTES = 60.0


class Faulty(PythonModel):
    """Predicts that a flight arrives as late as it left, but for its fault."""

    # MLflow takes hints of types for a schema of its own.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, ARG002
        """Return the delay on arrival in minutes for N rows of features [N, F], the delay at departure first."""
        dep_delay_N = np.asarray(next(iter(model_input.values())))[:, 0]
        fault = context.model_config["fault"]
        if fault == "moody":
            return dep_delay_N + np.random.default_rng().standard_normal(len(dep_delay_N), dtype=np.float32)
        late = bool((dep_delay_N > LATE_MINUTES).any())
        if fault == "delicate" and late:
            message = "a flight can't leave that late"
            raise ValueError(message)
        if fault == "slow" and late:
            time.sleep(0.33)
        return dep_delay_N


mlflow.models.set_model(Faulty())
