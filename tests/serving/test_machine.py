from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from serving.machine import _processor, cores, machine_kind


def test_a_machine_is_named_by_processor_cores_and_torch() -> None:
    assert f"{cores()} cores, torch {version('torch')}" in machine_kind()


def test_naming_the_machine_does_not_import_torch() -> None:
    code = "import sys, serving.machine as m; m.machine_kind(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "False" == done.stdout.strip()


def test_the_first_processor_names_them_all(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: A Chip\n\ncpu family\t: 6\nmodel name\t: Other\n")

    assert "A Chip 26.2" == _processor(told)


def test_a_system_that_does_not_say_still_has_a_name(tmp_path: Path) -> None:
    assert _processor(tmp_path / "absent")
