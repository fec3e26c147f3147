"""Images without a registry and without Docker: a base by mmdebstrap, and what is built on it by buildah."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.infra.locks import DOCKER, ROOT, read_lock

PROGRAMS = ("buildah", "mmdebstrap", "crun", "netavark")
_PACKAGES = "python3,python3-venv,ca-certificates"
# Where a build is kept: some 7 GB at its peak. In memory it takes a third of the time.
_MEMORY_GB = 14
_STORAGE_GB = 12
# Python's version of each release of Debian. The libraries are those of the newer one, as wheels may need them.
_PINNED = 'mkdir -p "$1/etc/apt/preferences.d"; printf "{text}" > "$1/etc/apt/preferences.d/python"'
_PYTHON_OF_BOOKWORM = "Package: python3* libpython3*\\nPin: release n=bookworm\\nPin-Priority: 1001\\n"
_ULIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=90000:90000")
_LOG_LINES = 25


def skip_without_programs() -> None:
    """Skip where an image cannot be built, saying what is missing."""
    if missing := [name for name in PROGRAMS if not (shutil.which(name) or Path("/usr/lib/podman", name).exists())]:
        pytest.skip(f"{', '.join(missing)} must be installed: apt-get install {' '.join(PROGRAMS)}")
    if os.geteuid() != 0:
        pytest.skip("buildah builds without user namespaces here, which needs root")
    if "ID=debian" not in Path("/etc/os-release").read_text().splitlines():
        pytest.skip("the base image comes from the mirror of a Debian machine")
    if sys.version_info[:2] not in ((3, 11), (3, 13)):
        pytest.skip(f"Debian has Python 3.11 and 3.13, whose wheels must be those of {platform.python_version()}")


def _call(command: Sequence[str | Path], folder: Path, **changes: Any) -> str:
    """Run a program, and return what it wrote to stdout; fails with the end of its output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **changes)
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-_LOG_LINES:])
    assert 0 == done.returncode, f"{command[0]} ended with {done.returncode}:\n{tail}"
    return done.stdout


@contextmanager
def make_storage(folder: Path) -> Generator[Path]:
    """A folder for images, in memory where there is enough of it; nothing of it is left."""
    folder.mkdir()
    (available_kb,) = re.findall(r"(?m)^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text())
    if int(available_kb) > _MEMORY_GB * 2**20:
        _call(["mount", "-t", "tmpfs", "-o", f"size={_STORAGE_GB}g", "tmpfs", folder], folder.parent)
    try:
        yield folder
    finally:
        # Mounts of containers and of the storage itself, the innermost first.
        while str(folder) in Path("/proc/self/mounts").read_text():
            inner = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
            _call(["umount", [path for path in inner if path.startswith(str(folder))][-1]], folder.parent)
        shutil.rmtree(folder)


def make_base(archive: Path) -> None:
    """Write the files of a Debian with the Python of these tests, and nothing to build with, as one archive."""
    targets = _call(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"], archive.parent
    )
    mirror = next(line.split()[0] for line in targets.splitlines() if line.endswith(" trixie"))
    suites = ("trixie", "bookworm") if sys.version_info[:2] == (3, 11) else ("trixie",)
    hooks = [f"--setup-hook={_PINNED.format(text=_PYTHON_OF_BOOKWORM)}"] if len(suites) > 1 else []
    _call(
        [
            *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}", *hooks, "trixie", archive),
            *(f"deb {mirror} {suite} main" for suite in suites),
        ],
        archive.parent,
    )


def make_context(folder: Path) -> Path:
    """Copy what a build gets of this checkout."""
    shutil.copyfile(ROOT / ".dockerignore", folder / ".dockerignore")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("flows", "tasks", "serving", "deployments", "infra"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def download_wheels(context: Path, folder: Path, python: str) -> None:
    """Fill a folder with all wheels of a CPU image for a version of Python, by pip as it is set up on this machine.

    A machine may have a CPU build of torch that is not PyTorch's own. Its hash is added to the copy of the lock.
    """
    folder.mkdir()
    lines = [
        " ".join([f"{pin.requirement.name}=={pin.version}", *(f"--hash=sha256:{each}" for each in pin.hashes)])
        for name in ("requirements.txt", "sbom.txt")
        for pin in read_lock(DOCKER / name)
        if pin.holds_for(python)
    ]
    wanted = folder.parent / "wanted.txt"
    wanted.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder]
    (torch,) = read_lock(DOCKER / "torch-cpu.txt")
    found = subprocess.run([*pip, str(torch.requirement)], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"pip must find {torch.requirement} here: add its index or folder to pip's settings")
    _call([*pip, "--require-hashes", "-r", wanted], folder.parent)
    (wheel,) = folder.glob("torch-*.whl")
    digest = sha256(wheel.read_bytes()).hexdigest()
    if digest not in torch.hashes:
        lock = context / "infra/docker/torch-cpu.txt"
        lock.write_text(f"{torch.requirement} --hash=sha256:{digest}\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Buildah:
    """Buildah with a storage of its own; `scratch` is for what it writes elsewhere."""

    storage: Path
    scratch: Path

    def command(self, *arguments: str | Path) -> list[str]:
        """Return the command line of a call."""
        where = ("--root", str(self.storage / "root"), "--runroot", str(self.storage / "run"))
        return ["buildah", *where, "--storage-driver", "overlay", *map(str, arguments)]

    def environment(self, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a call."""
        return {**os.environ, "TMPDIR": str(self.scratch), **(given or {})}

    def call(self, *arguments: str | Path) -> str:
        """Run a call, and return its output."""
        return _call(self.command(*arguments), self.scratch, env=self.environment())

    def build(self, context: Path, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Build an image in a network of its own, which leads nowhere, and return how that ended."""
        command = self.command(
            *("bud", "--isolation", "chroot", *_ULIMITS, "--format", "docker", "--tag", name, *arguments, context)
        )
        return subprocess.run(
            ["unshare", "--net", *command], env=self.environment(), capture_output=True, text=True, check=False
        )

    def import_base(self, archive: Path) -> str:
        """Make an image of the files in an archive, and return its name with its digest."""
        (archive.parent / "Dockerfile").write_text(f"FROM scratch\nADD {archive.name} /\n")
        built = self.build(archive.parent, "localhost/base")
        assert 0 == built.returncode, built.stderr
        (image,) = json.loads(self.call("images", "--json", "localhost/base"))
        return f"localhost/base@{image['digest']}"

    def start_container(self, image: str) -> str:
        """Make a container of an image, in which programs can be run; return its name."""
        return self.call("from", *_ULIMITS, image).strip()

    def run_command(self, container: str, *command: str, variables: Sequence[str] = ()) -> list[str]:
        """Return the command line that runs a program in a container, with these variables of the caller."""
        passed = [part for name in variables for part in ("--env", name)]
        return self.command("run", "--isolation", "chroot", *passed, container, "--", *command)

    def inspect(self, image: str) -> dict[str, Any]:
        """Return what an image says of itself, as Docker does."""
        found: dict[str, Any] = json.loads(self.call("inspect", "--type", "image", image))["Docker"]
        return found

    @contextmanager
    def mounted(self, container: str) -> Generator[Path]:
        """The files of a container."""
        path = Path(self.call("mount", container).strip())
        try:
            yield path
        finally:
            with suppress(AssertionError):
                self.call("umount", container)
