"""Wheels from which environments of models are made without a network: of tests' own packages, and of what is here."""

from __future__ import annotations

import sysconfig
import zipfile
from pathlib import Path

# A package of pure Python that this project needs, which is here in another version than tests write.
PACKAGE, OLD_VERSION = "coolname", "0.5"
_SCALE = 5
_CALLERS = {"pyarrow": "25.0.1", "mlflow_skinny": "3.17.2", "pandas": "3.1.1"}


def write_wheel(folder: Path, name: str, version: str, *, text: str | None = None, needs: str = "") -> Path:
    """Write a package of one module that says its version, with a script `say-NAME`."""
    content = text or f"VERSION = {version!r}\ndef say(): print(VERSION)\n"
    return _write(folder, name, version, {f"{name}.py": content}, needs)


def _write(folder: Path, name: str, version: str, files: dict[str, str], needs: str = "") -> Path:
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/entry_points.txt", f"[console_scripts]\nsay-{name} = {name}:say\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def write_model_wheels(folder: Path) -> Path:
    """Write what an environment of a model needs: an old version of a package, and the packages that read models.

    Installing the latter takes minutes and a network. So each is empty but for the path to those that are here, which
    come after the environment's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_wheel(folder, PACKAGE, OLD_VERSION, text=f"SCALE = {_SCALE}\n")
    here = sysconfig.get_path("purelib")
    for name, version in _CALLERS.items():
        _write(folder, name, version, {f"{name}_of_the_caller.pth": f"{here}\n"})
    return folder
