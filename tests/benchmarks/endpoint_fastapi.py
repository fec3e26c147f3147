"""The endpoint that a good engineer writes by hand: FastAPI, one process, the model in it, no batching.

The pass is made in the event loop: a pass of one row takes less than the way to a thread and back, and one process has
one core's worth of Python either way. `python -m tests.benchmarks.endpoint_fastapi FOLDER PORT` serves the model's
files in FOLDER.
"""

from __future__ import annotations

import sys
from typing import Annotated

import mlflow.pytorch
import numpy as np
import torch
import uvicorn
from annotated_types import Len
from fastapi import FastAPI
from pydantic import BaseModel

FEATURES = 32


class Row(BaseModel):
    features: Annotated[list[float], Len(FEATURES, FEATURES)]


class Score(BaseModel):
    score: float


def application(folder: str) -> FastAPI:
    torch.set_num_threads(1)
    model = mlflow.pytorch.load_model(folder)
    app = FastAPI()

    @app.post("/score")
    async def score(row: Row) -> Score:
        with torch.inference_mode():
            x_1F = torch.from_numpy(np.array([row.features], dtype=np.float32))
            return Score(score=model(x_1F).item())

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ok": True}

    return app


if __name__ == "__main__":
    uvicorn.run(
        application(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False
    )
