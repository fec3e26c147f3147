"""Machines and flow runs as a test has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID, uuid4

from tasks.spot.purchase import MachineKind
from tasks.spot.work_pools import FlowRunStage, FlowRunStatus


@dataclass
class Market:
    """Satisfies Capacity and Dispatcher."""

    living_names: frozenset[str] = frozenset({"a"})
    stage: FlowRunStage = "running"
    rows: int = 0
    sent: list[MachineKind] = field(default_factory=list)
    drained: list[tuple[str, bool]] = field(default_factory=list)
    # By the order in which they were sent, where runs differ.
    stages: dict[int, FlowRunStage] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    _ids: list[UUID] = field(default_factory=list)

    def list_live_workers(self) -> frozenset[str]:
        return self.living_names

    def submit(self, kind: MachineKind) -> UUID:
        self.sent.append(kind)
        self._ids.append(uuid4())
        return self._ids[-1]

    def read_status(self, flow_run_id: UUID) -> FlowRunStatus:
        at = self._ids.index(flow_run_id)
        return FlowRunStatus(
            stage=self.stages.get(at, self.stage), message="its last message.", worker=self.names.get(at)
        )

    def end(self, flow_run_id: UUID, why: str, *, lost: bool) -> None:
        self.drained.append((why, lost))
