"""A V2 server in its own process: `python v2_child.py PORT`. The name of a version says how it behaves.

1 and 2: score = 1 or 2 times the sum of x, plus n. same: as 1. slow: as 1, after 0.4 s. broken: 500. html: no V2.
wrong: other outputs than those of the contract. The models toy and steady are loaded from the start, others after
POST /v2/repository/models/MODEL/load, sluggish slowly. GET /seen counts the requests; GET /last returns the bytes of
the last one.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response

from serving.errors import BadRequest
from serving.model.contract import Column, Contract, Input, Output
from serving.protocol.oip import HEADER_LENGTH, decode_request, encode_error, encode_response, read_header_length

CONTRACT = Contract(
    inputs=(
        Input(
            name="x",
            dtype="float32",
            shape=(3,),
            columns=tuple(Column(name=name, dtype="float32") for name in ("a", "b", "c")),
        ),
        Input(name="n", dtype="int64", columns=(Column(name="n", dtype="int64"),)),
    ),
    outputs=(Output(name="score", dtype="float32"),),
)
LOAD_S, SLUGGISH_LOAD_S, SLOW_S = 0.5, 1.5, 0.4
FACTORS = {"1": 1.0, "2": 2.0, "same": 1.0, "slow": 1.0, "wrong": 1.0}

app = FastAPI()
seen: Counter[str] = Counter()
last: dict[str, bytes] = {}
loaded: set[str] = {"toy", "steady"}


@app.exception_handler(BadRequest)
async def refuse_bad_request(_request: Request, error: BadRequest) -> Response:
    return _refuse(error.status, str(error))


def _refuse(status: int, message: str) -> Response:
    return Response(encode_error(message), status, media_type="application/json")


@app.get("/v2/health/ready")
async def ready() -> Response:
    return Response()


@app.get("/v2/models/{model}/versions/{version}/ready")
async def version_ready(model: str, version: str) -> Response:
    return Response() if model in loaded else _refuse(400, "not loaded")


@app.post("/v2/repository/models/{model}/{verb}")
async def repository(model: str, verb: str) -> Response:
    seen[f"{model} {verb}"] += 1
    if model == "unloadable":
        return _refuse(500, "no memory for it")
    if verb == "load":
        await asyncio.sleep(SLUGGISH_LOAD_S if model == "sluggish" else LOAD_S)
        loaded.add(model)
    else:
        loaded.discard(model)
    return Response()


@app.post("/v2/models/{model}/versions/{version}/infer")
async def infer(model: str, version: str, request: Request) -> Response:
    seen[version] += 1
    if model not in loaded:
        return _refuse(400, f"unknown model {model}")
    if version == "broken":
        return _refuse(500, "no row is good enough")
    if version == "html":
        return Response("<html>Bad</html>", 418, media_type="text/html")
    if version == "slow":
        await asyncio.sleep(SLOW_S)
    body, length = await request.body(), request.headers.get(HEADER_LENGTH)
    last["body"] = body
    decoded = decode_request(body, CONTRACT, header_length=read_header_length(length), rows_max=1 << 20)
    scores = FACTORS[version] * decoded.inputs["x"].sum(axis=1) + decoded.inputs["n"]
    if version == "wrong":
        return Response(b'{"outputs":[]}', media_type="application/json")
    answer = encode_response(decoded, {"score": scores.astype(np.float32)}, CONTRACT, model=model, version=version)
    return Response(answer.content, 200, answer.headers)


@app.get("/seen")
async def count_seen() -> dict[str, int]:
    return dict(seen)


@app.get("/last")
async def last_body() -> Response:
    return Response(last["body"])


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
