"""Short names of models, addresses and flow runs."""

from __future__ import annotations

import pytest

from tasks.common.names import describe_model, find_last_folder, find_model_name, name_batch_run


@pytest.mark.parametrize(
    ("model", "short", "name"),
    [
        ("models:/churn/3", "churn v3", "churn"),
        ("models:/churn@champion", "churn@champion", "churn"),
        ("block:central/churn@champion", "churn@champion", "churn"),
        ("block:central/churn/3", "churn v3", "churn"),
        ("models:/main.default.churn/12", "main.default.churn v12", "main.default.churn"),
        ("churn", "churn", "churn"),
        ("", "", ""),
    ],
)
def test_a_model_is_named_by_name_and_version_or_alias(model: str, short: str, name: str) -> None:
    assert (short, name) == (describe_model(model), find_model_name(model))


@pytest.mark.parametrize(
    ("address", "folder"),
    [
        ("s3://lake/scores/", "scores"),
        ("s3://lake", "lake"),
        ("/data/scores", "scores"),
        ("scores", "scores"),
        ("block:lake-scores", "lake-scores"),
        ("block:lake/2026", "2026"),
        ("/", "/"),
    ],
)
def test_an_address_is_named_by_its_last_folder(address: str, folder: str) -> None:
    assert folder == find_last_folder(address)


def test_a_run_is_named_by_what_goes_where_on_one_line() -> None:
    assert "churn v3 → scores" == name_batch_run("models:/churn/3", "s3://lake/scores/")
    assert 120 == len(name_batch_run(f"models:/{'long' * 50}/3", "/data/scores"))
