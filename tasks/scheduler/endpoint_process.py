"""The process of an endpoint that is measured: `python -m tasks.scheduler.endpoint_process FOLDER`.

It serves the release in the folder by the Open Inference Protocol, writes its port to stdout, and ends when its stdin
does. Its imports are part of the cold start that is measured, so that it has a module of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import uvicorn

from serving.model.interface import Arrays, Predictions
from serving.model.release import open_predictor, unwrap_prediction
from serving.protocol.oip import ServerMetadata
from serving.protocol.v2_app import create_v2_app

BUSY_SECONDS_PATH = "/busy-seconds"


def main() -> None:
    """Load the release in the folder, and answer requests until stdin ends."""
    predictor = open_predictor(Path(sys.argv[1]))

    async def predict(inputs: Arrays) -> Predictions:
        (answer,) = await predictor.predict_requests([inputs])
        return unwrap_prediction(answer)

    app = create_v2_app(predictor.release, predict, ServerMetadata(name="overnight", version=predictor.release.version))

    @app.get(BUSY_SECONDS_PATH)
    def busy() -> float:
        """Return the processor time of this process in seconds."""
        return time.process_time()

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    # The parent may send a request as soon as it has the port; it waits here until the server is up.
    listening.listen()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning", ws="none")).run(sockets=[listening])
    predictor.close()


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
