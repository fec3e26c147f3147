import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from infra.local import prefect_server

ROOT = Path(__file__).parents[3]


@pytest.mark.usefixtures("prefect")
def test_it_prints_what_to_export_and_stops_both_servers_on_sigterm(template_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prefect").mkdir()
    prefect_server.restore_template(prefect_server.template_path(template_folder), tmp_path / "prefect")
    stack = subprocess.Popen(
        [sys.executable, "-m", "infra.local", "--folder", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert stack.stdout is not None
    lines = iter(stack.stdout.readline, "# Prefect's pages")
    exports = {}
    for line in lines:
        if not line.startswith("export "):
            break
        name, _, value = shlex.split(line)[1].partition("=")
        exports[name] = value

    assert httpx.get(f"{exports['PREFECT_API_URL']}/health").json() is True
    assert httpx.get(exports["AWS_ENDPOINT_URL"]).status_code == 403

    stack.send_signal(signal.SIGTERM)
    assert stack.wait(30) == 0
    stack.stdout.close()
    for url in (exports["PREFECT_API_URL"], exports["AWS_ENDPOINT_URL"]):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
