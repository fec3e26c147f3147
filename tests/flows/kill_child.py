"""Runs batch_inference in a process of its own, and kills it with SIGKILL at a named point.

usage: kill_child.py POINT TIMES MODEL SOURCE DESTINATION OPTIONS_JSON
The process dies the TIMES-th time that it comes to POINT; at "never" it runs to the end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import flows.batch
import serving.model.forward
import tasks.batch.chunk_reader
import tasks.batch.publish
import tasks.batch.resolve
import tasks.batch.score
import tasks.storage.local
from tasks.batch.options import BatchOptions
from tasks.batch.parts import list_parts

_left = 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count_down() -> None:
    global _left  # noqa: PLW0603 - one process, one countdown
    _left -= 1
    if _left == 0:
        _die()


def _before(owner: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            _count_down()
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        if when(*args, **kwargs):
            _count_down()
        return result

    setattr(owner, name, wrapped)


def _half_written(stream: Any, data: Any) -> None:
    if "part-" in str(stream.name):
        stream.write(bytes(data)[: len(data) // 2])
        stream.flush()
        _count_down()
        stream.seek(0)
        stream.truncate()
    _write_synced(stream, data)


_write_synced = tasks.storage.local._write_synced
_local = tasks.storage.local.LocalStorage


def _is(name: str) -> Callable[..., bool]:
    return lambda _self, path, *_: path.endswith(name)


def _part_link(_source: Any, target: Any, **_: Any) -> bool:
    return "part-" in str(target)


POINTS: dict[str, Callable[[], None]] = {
    "never": lambda: None,
    "before the plan": lambda: _before(_local, "put_new", _is("plan.json")),
    "after the plan": lambda: _after(_local, "put_new", _is("plan.json")),
    "after the start": lambda: _after(tasks.batch.resolve, "save_start"),
    "reading": lambda: _before(tasks.batch.chunk_reader.Reader, "read"),
    "before a batch": lambda: _before(serving.model.forward.Forward, "_begin_batch"),
    "forward": lambda: _after(tasks.batch.score.Forward, "score"),
    "encoding a part": lambda: _after(tasks.batch.score, "encode_part"),
    "a part half written": lambda: setattr(tasks.storage.local, "_write_synced", _half_written),
    "before the link": lambda: _before(os, "link", _part_link),
    "after the link": lambda: _after(os, "link", _part_link),
    "after a part": lambda: _after(_local, "put_new", lambda _self, path, *_: "part-" in path),
    "rows are done": lambda: _after(flows.batch, "count_done", lambda storage, plan: bool(list_parts(storage, plan))),
    "before the audit": lambda: _before(flows.batch, "audit_parts"),
    "before the page": lambda: _before(flows.batch, "save_page"),
    "before the manifest": lambda: _before(_local, "put_new", _is("manifest.json")),
    "after the manifest": lambda: _after(_local, "put_new", _is("manifest.json")),
    "after the Delta commit": lambda: _after(tasks.batch.publish, "commit_delta"),
}


def main() -> None:
    global _left  # noqa: PLW0603
    point, times, model, source, destination, options = sys.argv[1:]
    _left = int(times)
    POINTS[point]()
    report = flows.batch.batch_inference(model, source, destination, BatchOptions.model_validate_json(options))
    print(report.model_dump_json())


if __name__ == "__main__":
    main()
