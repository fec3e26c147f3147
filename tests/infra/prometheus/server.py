"""A real Prometheus on loopback that scrapes pages of metrics."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import yaml

from infra.local.process import ServerCommand, base_environment, send_request, start_on_free_ports
from tests.eventually import eventually
from tests.servers import serve_http

_SECONDS_MAX = 60.0


@contextmanager
def serve_pages(pages: Sequence[str]) -> Generator[list[str]]:
    """Serve each page at an address of its own while the block runs; yields the addresses, as HOST:PORT/PATH."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages[int(self.path.strip("/"))].encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serve_http(Handler) as port:
        yield [f"127.0.0.1:{port}/{at}" for at in range(len(pages))]


@contextmanager
def prometheus_server(program: Path, pages: Sequence[str], rules: Path, folder: Path) -> Generator[str]:
    """Run Prometheus with rules over pages of metrics; yields its address once it has scraped all of them twice."""
    with serve_pages(pages) as addresses:
        jobs = []
        for address in addresses:
            host, _, path = address.partition("/")
            target = {"job_name": f"page-{path}", "metrics_path": f"/{path}", "static_configs": [{"targets": [host]}]}
            jobs.append(target)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": jobs,
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

        def command(ports: Sequence[int]) -> ServerCommand:
            return ServerCommand(
                argv=(
                    str(program),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{ports[0]}",
                ),
                environment=base_environment(),
                folder=folder,
                log_path=folder / "prometheus.log",
                ready=lambda: send_request("GET", ports[0], "/-/ready").ok,
            )

        process, (port,) = start_on_free_ports(1, command)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_for_scrapes(url, len(pages))
            yield url
        finally:
            process.stop()


def _wait_for_scrapes(url: str, targets: int) -> None:
    query = {"query": "count(count_over_time(up[1m]) > 2 and up == 1)"}
    eventually(
        lambda: httpx.get(f"{url}/api/v1/query", params=query, timeout=30).json()["data"]["result"],
        lambda result: result and int(result[0]["value"][1]) == targets,
    )
