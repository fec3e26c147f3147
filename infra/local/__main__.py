"""Run the local stack by hand: `python -m infra.local` starts the servers and prints what to export.

They run until Ctrl-C or SIGTERM. Without `--folder` everything they keep is deleted at the end.
"""

import argparse
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from infra.local.prefect_server import prefect_server
from infra.local.s3 import s3_server


def main(arguments: Sequence[str] | None = None) -> None:
    """Start both servers, print `export` lines for a shell, wait for Ctrl-C or SIGTERM, stop both."""
    parser = argparse.ArgumentParser(prog="python -m infra.local", description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep databases and objects here (default: nowhere)")
    folder: Path | None = parser.parse_args(arguments).folder
    # A shell's `&` makes a program ignore SIGINT, so that only SIGTERM can end it.
    signal.signal(signal.SIGTERM, _exit)
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        home = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="infra-local-")))
        s3 = stack.enter_context(s3_server(home / "s3"))
        prefect = stack.enter_context(prefect_server(home / "prefect"))
        exports = {**s3.environment, **prefect.environment}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
        sys.stdout.write("\n".join([*lines, f"# Prefect's pages: {prefect.ui_url}", ""]))
        sys.stdout.flush()
        threading.Event().wait()


def _exit(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":
    main()
