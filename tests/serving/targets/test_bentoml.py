"""What BentoML is given, held against a schema of the fields that are used."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from serving.model.release import Release
from serving.targets.bentoml import BentoMLTarget
from tests.serving.targets.manifests import STABLE, closed

TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
NAMED = closed({"name": {"type": "string"}, "value": {"type": "string"}}, "name", "value")
BENTOFILE = closed(
    {
        "service": {"const": "service:Endpoint"},
        "name": {"type": "string", "pattern": "^[a-z0-9]([-_.a-z0-9]*[a-z0-9])?$"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "include": TEXTS,
        "exclude": TEXTS,
        "python": closed(
            {"packages": TEXTS, "lock_packages": {"type": "boolean"}, "requirements_txt": {"type": "string"}},
            "packages",
        ),
        "envs": {"type": "array", "items": NAMED},
    },
    *("service", "name", "include", "python"),
)
ANY = BentoMLTarget(python=Path("python"))


def test_the_bentofile_names_the_service_and_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").touch()
    bentofile = yaml.safe_load(ANY.render(STABLE, tmp_path).files["bentofile.yaml"])
    jsonschema.validate(bentofile, BENTOFILE)

    assert "scores" == bentofile["name"]
    assert "model/requirements.txt" == bentofile["python"]["requirements_txt"]
    assert {"model/**", "serving/**/*.py", "release.json", "service.py"} == set(bentofile["include"])


@pytest.mark.parametrize("typo", ["services", "includes", "pythons"])
def test_a_typo_in_the_bentofile_is_caught(typo: str) -> None:
    bentofile = ANY.render_bentofile(STABLE, Path("model"))
    bentofile[typo] = bentofile.pop(typo.removesuffix("s"))

    with pytest.raises(jsonschema.ValidationError, match=typo):
        jsonschema.validate(bentofile, BENTOFILE)


def test_the_release_lies_beside_the_service() -> None:
    files = ANY.render(STABLE, Path("model")).files

    assert STABLE == Release.model_validate_json(files["release.json"])
    assert b"max_latency_ms=60_000" in files["service.py"]
