"""Prefect's runner of tasks on Ray, with the trace of a step carried into the processes of Ray.

Prefect sends the trace along with the context of a task, and in the process of another machine begins the span of the
task without it: the span would be a trace of its own. It needs the extra `ray`.
"""

from __future__ import annotations

from typing import Any

from prefect_ray.task_runners import RayTaskRunner

from flows.runtime.tracing import continue_trace


class TracedRayTaskRunner(RayTaskRunner[Any]):  # type: ignore[misc]  # prefect_ray has no types
    """RayTaskRunner, whose tasks are in the trace of the step that submits them."""

    @staticmethod
    def _run_prefect_task(*upstream_ray_obj_refs: Any, context: dict[str, Any], **arguments: Any) -> Any:
        """Run a task in a process of Ray's, within the trace that its context names."""
        with continue_trace(context):
            return RayTaskRunner._run_prefect_task(*upstream_ray_obj_refs, context=context, **arguments)  # noqa: SLF001 - what it overrides
