"""Machines and flow runs as a test has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID, uuid4

from tasks.spot.dispatch import Seen, Stage
from tasks.spot.purchase import Kind


@dataclass
class Market:
    """Satisfies Capacity and Dispatcher."""

    living_names: frozenset[str] = frozenset({"a"})
    stage: Stage = "running"
    rows: int = 0
    sent: list[Kind] = field(default_factory=list)
    drained: list[tuple[str, bool]] = field(default_factory=list)
    # By the order in which they were sent, where runs differ.
    stages: dict[int, Stage] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    _ids: list[UUID] = field(default_factory=list)

    def living(self) -> frozenset[str]:
        return self.living_names

    def send(self, kind: Kind) -> UUID:
        self.sent.append(kind)
        self._ids.append(uuid4())
        return self._ids[-1]

    def look_at(self, flow_run_id: UUID) -> Seen:
        at = self._ids.index(flow_run_id)
        return Seen(stage=self.stages.get(at, self.stage), message="its last word.", machine=self.names.get(at))

    def drain(self, flow_run_id: UUID, why: str, *, lost: bool) -> None:
        self.drained.append((why, lost))
