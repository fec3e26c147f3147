"""The image's Dockerfile and what it installs, without building it: test_docker.py does."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.infra.locks import DOCKER, ROOT, Pin, read_lock

LOCKS = sorted([*DOCKER.glob("*.txt"), ROOT / "infra/local/wheels.txt"])
# The extras that a worker's image has; Ray, texts, the demo and the tests are not in it.
EXTRAS = ("delta", "environments", "iceberg", "openlineage", "serve", "stream")
NEITHER_CPU_NOR_CUDA = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def read_constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        str(canonicalize_name(name)): version
        for name, version in (line.split(";")[0].strip().split("==") for line in lines if "==" in line)
    }


def required_by(name: str, extras: tuple[str, ...], found: set[str]) -> set[str]:
    """Every package that a package needs here, and that those need, by what is installed."""
    try:
        requires = [Requirement(line) for line in distribution(name).requires or ()]
    except PackageNotFoundError:
        pytest.fail(f"{name} is not installed here")
    for each in requires:
        wanted = each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        key = f"{canonicalize_name(each.name)}[{','.join(sorted(each.extras))}]"
        if wanted and key not in found:
            found.add(key)
            required_by(each.name, tuple(each.extras), found)
    return {key.split("[")[0] for key in found}


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stdout + done.stderr)


def test_hadolint_finds_a_base_image_without_a_version(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)

    assert 1 == done.returncode
    assert "DL3006" in done.stdout


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_requirement_is_one_version_and_has_hashes_and_no_file_names_an_index(lock: Path) -> None:
    pins = read_lock(lock)

    assert pins
    assert [] == [pin.name for pin in pins if not pin.version or not pin.hashes]
    assert "://" not in lock.read_text()


def test_a_requirement_without_a_hash_and_a_line_that_names_an_index_are_seen(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("one==1 \\\n    --hash=sha256:" + "a" * 64 + "\ntwo==2\n")
    (tmp_path / "index.txt").write_text("--index-url https://example.com/simple\n")

    assert [("one", ("a" * 64,)), ("two", ())] == [(pin.name, pin.hashes) for pin in read_lock(tmp_path / "lock.txt")]
    with pytest.raises(AssertionError, match="holds options"):
        read_lock(tmp_path / "index.txt")


def test_the_image_has_the_versions_that_are_tested_here() -> None:
    constraints = read_constraints()
    locked = {pin.name: pin.version for name in ("requirements", "sbom") for pin in read_lock(DOCKER / f"{name}.txt")}

    assert {} == {
        name: (version, constraints[name])
        for name, version in locked.items()
        if name in constraints and version != constraints[name]
    }
    # Those that are not pinned there are for other systems, other Pythons, or the inventory.
    assert 100 < len(locked.keys() & constraints.keys())


def test_the_image_has_all_that_its_packages_need() -> None:
    pins: list[Pin] = [*read_lock(DOCKER / "requirements.txt"), *read_lock(DOCKER / "torch-cpu.txt")]
    python = ".".join(map(str, sys.version_info[:3]))
    locked = {pin.name for pin in pins if pin.holds_for(python)}
    # Where the torch that is installed here is CUDA's, it needs what the other variant has.
    locked |= {pin.name for pin in read_lock(DOCKER / "torch-cuda.txt")}

    assert set() == required_by("overnight", EXTRAS, set()) - locked
    assert [] == [pin.name for pin in pins if NEITHER_CPU_NOR_CUDA.match(pin.name) and pin.name != "torch"]


def test_both_variants_have_the_same_torch_within_the_range_of_the_package() -> None:
    cpu = {pin.name: pin.version for pin in read_lock(DOCKER / "torch-cpu.txt")}
    cuda = {pin.name: pin.version for pin in read_lock(DOCKER / "torch-cuda.txt")}
    (wanted,) = (Requirement(line) for line in distribution("overnight").requires or () if line.startswith("torch"))

    assert f"{cuda['torch']}+cpu" == cpu["torch"]
    assert cuda["torch"] in SpecifierSet(str(wanted.specifier))
    assert {"torch"} == cpu.keys()
    assert all(NEITHER_CPU_NOR_CUDA.match(name) for name in cuda)


def test_the_build_gets_what_it_copies_and_nothing_else() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    copied = {
        name.split("/")[0] for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", text) for name in line.split()[:-1]
    }
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_the_base_image_has_no_default_that_could_be_built() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    (default,) = re.findall(r"(?m)^ARG BASE_IMAGE=(.*)$", text)

    # No name of an image holds capitals.
    assert default != default.lower()
    assert "BASE_IMAGE=NAME@sha256:DIGEST" in default
    assert {"scratch", "${BASE_IMAGE}"} == set(re.findall(r"(?m)^FROM (\S+)", text))


def test_each_file_that_the_page_on_security_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = {name for name in re.findall(r"`([a-z_]+/[^`\s]*)`", text) if not name.startswith("/")}

    assert len(named) > 15
    assert [] == sorted(name for name in named if not list(ROOT.glob(name.rstrip("/"))))
