"""With disclose="nothing" no value of a row leaves the destination: it is looked for wherever else a call writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from pydantic import ValidationError

from infra.local.prefect_server import PrefectServer
from serving.errors import OvernightError
from tasks.batch.gate_rules import Gate, RangeRule
from tasks.batch.options import BatchOptions
from tests.eventually import eventually
from tests.support import register_script

# As no other number is written: the registry keeps the rates of tunings, with all their digits. It is exact as a float
# of 32 bits.
TOLD = 3_731_925.25


@pytest.fixture(scope="module")
def picky(registry: Path) -> str:
    """A model that names the value in its error."""
    line = "b = model_input['a'].max(); assert b < 7e3, f'{b:.2f} is too much'"
    return register_script("picky", line)


@pytest.fixture(scope="module")
def useless(registry: Path) -> str:
    return register_script("useless", "raise ValueError(f'no {model_input.a.max():.2f}')")


@pytest.fixture
def written(
    prefect: PrefectServer,
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """The file with the events of OpenLineage; the rest of what is written is with the servers."""
    pytest.importorskip("openlineage.client", reason="pip install 'overnight[openlineage]' brings it")
    config = {"transport": {"type": "file", "log_file_path": str(tmp_path / "lineage.json"), "append": True}}
    (tmp_path / "openlineage.yml").write_text(json.dumps(config))
    monkeypatch.setenv("OPENLINEAGE_CONFIG", str(tmp_path / "openlineage.yml"))
    monkeypatch.delenv("OPENLINEAGE_URL", raising=False)
    with caplog.at_level(logging.INFO):
        yield tmp_path / "lineage.json"


CASES = {
    "a value that the model names in its error": ("picky", {"max_reject_fraction": 0.5}),
    "rejects of the model that are too many": ("picky", {"max_reject_fraction": 0.0}),
    "a model that takes no row": ("useless", {}),
    "a text that is no number": ("picky", {"max_reject_fraction": 0.0, "source": "text"}),
    "a line of CSV that is broken": ("picky", {"source": "broken"}),
    "rows that are shown": ("picky", {"source": "keys"}),
    "keys that are there twice": ("picky", {"source": "twice"}),
    "keys that are there twice, in an upsert": (
        "picky",
        {"source": "twice", "output": "delta", "delta_mode": "upsert"},
    ),
    "what a gate says": (
        "picky",
        {"max_reject_fraction": 0.5, "gate": Gate(rules=(RangeRule(columns=("a",), maximum=1.0),))},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_value_of_a_row_is_written_anywhere_but_into_the_destination(
    case: str,
    request: pytest.FixtureRequest,
    written: Path,
    prefect: PrefectServer,
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both ways: told to disclose values, the same call writes what is looked for."""
    from flows.batch import batch_inference

    name, given = CASES[case]
    model, told = request.getfixturevalue(name), f"{TOLD + list(CASES).index(case):.2f}"
    source = write_source(tmp_path, str(given.get("source", "")), told)
    options = {key: value for key, value in given.items() if key != "source"}
    experiment = f"disclosure of {case}"
    mlflow.create_experiment(experiment, artifact_location=str(tmp_path / "artifacts"))

    def infer(disclose: str) -> str:
        caplog.clear()
        call = BatchOptions(key_columns=("k",), batch_size=4, experiment=experiment, disclose=disclose, **options)
        try:
            return batch_inference(model, source, tmp_path / disclose, call).markdown()
        except OvernightError as error:
            return str(error)

    def find(said: str) -> list[str]:
        places = [*prefect.home.glob("*.db*"), *registry.glob("*.db*"), *(tmp_path / "artifacts").rglob("*"), written]
        texts = {"logged": caplog.text, "said": said}
        texts |= {str(place): place.read_bytes().decode("latin-1") for place in places if place.is_file()}
        # With what stands before it, which tells where it is from.
        return [f"{where}: {text.partition(told)[0][-99:]!r}" for where, text in texts.items() if told in text]

    said = infer("nothing")
    assert [] == find(said), said
    # What a server is sent is there by the time that what comes after it is.
    said = infer("values")
    eventually(lambda: find(said))
    assert [] != find(said)


def write_source(folder: Path, kind: str, told: str) -> Path:
    """Write some rows, one of them with a value that is told of."""
    values = {"": told, "small": "2.5", "text": f"x{told}"}.get(kind, "2.5")
    key = told if kind in ("keys", "twice") else "last"
    lines = ["k,a", f"{key},{values}", *(f"k{row},{row}.5" for row in range(8))]
    if kind == "twice":
        lines.append(lines[1])
    if kind == "broken":
        lines.append(f"k9,{told},{told},{told}")
    path = folder / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_challengers_are_refused_where_nothing_is_disclosed() -> None:
    with pytest.raises(ValidationError, match="challengers must be left out"):
        BatchOptions(disclose="nothing", challengers=("models:/a/1",))
