"""A model that was logged with other versions than those here, in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.errors import EnvironmentUnusable
from serving.model.environment import make_environment
from serving.model.registry import resolve_model
from serving.model.requirements import read_model_environment
from serving.model.uv import PackageSource
from tasks.batch.options import BatchOptions
from tests.support import register_script, write_customers

pytestmark = [pytest.mark.usefixtures("serverless"), pytest.mark.machines]

# The second version of scikit-learn's minor number, in place of the doubled column.
LINE = "import sklearn; return model_input['a'].to_numpy() * 0 + int(sklearn.__version__.split('.')[1])"


def test_a_model_runs_with_its_own_versions_where_those_here_differ_and_a_resume_does_too(
    registry: Path, tmp_path: Path
) -> None:
    import sklearn

    from flows import batch_inference, open_predictions

    model = register_script("old-versions", LINE, requirements=("scikit-learn==1.6.1", "mlflow-skinny"))
    try:
        make_environment(read_model_environment(resolve_model(model).folder), packages=PackageSource())
    except EnvironmentUnusable as error:
        pytest.skip(f"uv must be able to get the packages: {error}")
    source = str(write_customers(tmp_path / "in", rows=4_000, files=2, rows_per_group=1_000))
    options = BatchOptions(key_columns=("customer",), experiment=None)
    found = {}
    for name, update in (("own", {}), ("here", {"environment": "caller"})):
        destination = str(tmp_path / name)
        batch_inference(model, source, destination, options.model_copy(update=update))
        found[name] = open_predictions(destination).collect()["prediction"].unique().to_list()
    lost = next((tmp_path / "own").glob("run=*/*.parquet"))
    before = lost.read_bytes()
    lost.unlink()
    batch_inference(model, source, str(tmp_path / "own"), options)

    assert {"own": [6.0], "here": [float(sklearn.__version__.split(".")[1])]} == found
    assert before == lost.read_bytes()
