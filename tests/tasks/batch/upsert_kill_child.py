"""Publishes the one run that has a plan at a destination, and kills itself with SIGKILL at a named point.

usage: upsert_kill_child.py POINT DESTINATION
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from deltalake import DeltaTable

from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, publish
from tasks.storage import LocalStorage, open_storage


def _die(owner: Any, name: str, *, before: bool, when: str = "") -> None:
    """Have the process die before or after a call, where `when` is in its arguments."""
    inner: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hit = any(when in str(arg) for arg in args)
        if before and hit:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


POINTS = {
    "after a rewritten file": lambda: _die(LocalStorage, "put_new", before=False, when="rewritten/"),
    "before the commit": lambda: _die(DeltaTable, "create_write_transaction", before=True),
    "after the commit": lambda: _die(DeltaTable, "create_write_transaction", before=False),
}


def main(point: str, address: str) -> None:
    """Publish the run."""
    destination = open_storage(address)
    (path,) = [entry.path for entry in destination.entries("_overnight") if entry.path.endswith("/plan.json")]
    plan = Plan.model_validate_json(destination.read(path) or b"")
    audit = audit_parts(destination, plan)
    POINTS[point]()
    publish(destination, plan, audit)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
