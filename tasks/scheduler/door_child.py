"""A release behind the Open Inference Protocol, to be measured: `python -m tasks.scheduler.door_child FOLDER`.

Writes its port to stdout once it is there, and ends when its stdin does.
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

BUSY = "/busy-seconds"


def main() -> None:
    """Load the release that the folder holds, and answer for it."""
    predictor = open_predictor(Path(sys.argv[1]))

    async def predict(inputs: Arrays) -> Predictions:
        (answer,) = await predictor.predict_requests([inputs])
        return unwrap_prediction(answer)

    app = create_v2_app(predictor.release, predict, ServerMetadata(name="overnight", version=predictor.release.version))

    @app.get(BUSY)
    def busy() -> float:
        """Return the seconds for which this process has computed."""
        return time.process_time()

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    # Whoever reads the port may ask at once, and waits in the line until the server is up.
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
