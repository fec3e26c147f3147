"""A server in the place of KServe's, for tests without its environment: run in the folder of a release, as its python.

`v2_server_child.py predictor.py --http_port PORT ...` answers the Open Inference Protocol with the release's own model.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Before the modules that the release brings, which are those of KServe's server alone.
sys.path.insert(0, str(Path(__file__).parents[2]))

import uvicorn

from serving.model.interface import Arrays, Predictions
from serving.model.release import open_predictor, unwrap_prediction
from serving.protocol.oip import ServerMetadata
from serving.protocol.v2_app import create_v2_app

predictor = open_predictor(Path.cwd())


async def predict(inputs: Arrays) -> Predictions:
    (prediction,) = await predictor.predict_requests([inputs])
    return unwrap_prediction(prediction)


app = create_v2_app(predictor.release, predict, ServerMetadata(name="child", version="1", extensions=()))
port = int(sys.argv[sys.argv.index("--http_port") + 1])
uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
