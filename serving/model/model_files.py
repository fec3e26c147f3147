"""Checks that the files of a model can be read without running code, before any library reads them.

MLflow checks pt2 archives too (3.17, with torch 2.10 or newer): records that may be pickles must pass torch's
restricted unpickler. But torch may read an archive otherwise than MLflow does. MLflow skips a record that a
configuration in the archive calls raw, while torch may unpickle it under another name or load it as a library. So only
the records that torch.export.save writes are accepted, in a zip that all readers read alike.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.models import Model as MLmodel

from serving.errors import ModelUnfit
from serving.option_words import give_option

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(model_weights_config\.json|weight_\d+|model\.pt)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+|model\.pt)|data/sample_inputs/model\.pt"
)
# The records of torch up to 2.7, without a folder.
_OLD_RECORDS = re.compile(r"version|serialized_(exported_program|state_dict|constants|example_inputs)\.(json|pt)")
_END, _LOCATOR, _END_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
_FOUR_BYTES, _TWO_BYTES = 0xFFFFFFFF, 0xFFFF

# The types of LightGBM that MLflow trusts, beside those of skops. A list in the model itself does not count, since
# the author of the model wrote the list.
_TRUSTED_TYPES = {
    "collections.OrderedDict",
    "lightgbm.basic.Booster",
    "lightgbm.sklearn.LGBMClassifier",
    "lightgbm.sklearn.LGBMRegressor",
}
_TYPES_SHOWN = 10
# What skops writes of a numpy dtype, as fitted imputers hold one: an empty array in numpy's own format, which is read
# without unpickling. skops has yet to decide whether to trust it, and MLflow logs no such model unless it is listed.
_DTYPE, _DTYPE_LOADER = "numpy.dtype", "DTypeNode"
_BOOSTER = "lightgbm.basic.Booster"


def check_files(folder: Path, mlmodel: MLmodel) -> bool:
    """Check the files of a model that must not be unpickled, before any library reads them.

    Returns whether they are files of skops with trusted types only, which MLflow would refuse to read where unpickling
    is not allowed. Raises ModelUnfit where they may run code.
    """
    loader = mlmodel.flavors.get("python_function", {}).get("loader_module")
    if "pytorch" in mlmodel.flavors or loader == "mlflow.pytorch":
        for archive in folder.rglob("*.pt2"):
            _check_pt2(archive)
        return False
    return _is_skops(folder, mlmodel)


def _check_pt2(path: Path) -> None:
    """Raise ModelUnfit where an exported torch model has records that torch.export.save does not write."""
    with path.open("rb") as file:
        if not _is_unambiguous_zip(file, path.stat().st_size):
            raise _unsafe_archive(path, "a zip that may be read in more than one way")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise _unsafe_archive(path, str(error)) from None
    if len(set(names)) < len(names):
        raise _unsafe_archive(path, "two records of one name")
    if all(_OLD_RECORDS.fullmatch(name) for name in names):
        return
    folder = names[0].partition("/")[0]
    for name in names:
        if not name.startswith(f"{folder}/") or not _RECORDS.fullmatch(name.removeprefix(f"{folder}/")):
            raise _unsafe_archive(path, f"the record {name!r}")


def _is_skops(folder: Path, mlmodel: MLmodel) -> bool:
    """Return whether a model is read by skops alone, from a file whose types are all trusted; False for other formats.

    Raises ModelUnfit where there are types in it that neither skops nor MLflow trusts.
    """
    pyfunc = mlmodel.flavors.get("python_function", {})
    flavor = {"mlflow.sklearn": "sklearn", "mlflow.lightgbm": "lightgbm"}.get(str(pyfunc.get("loader_module")))
    options: dict[str, Any] = mlmodel.flavors.get(flavor, {}) if flavor else {}
    # A Booster is saved in LightGBM's own text format, whatever the flavour's serialization_format says.
    is_booster = flavor == "lightgbm" and options.get("model_class", _BOOSTER) == _BOOSTER
    if is_booster or options.get("serialization_format") != "skops":
        return False
    name = options.get("data") if flavor == "lightgbm" else pyfunc.get("model_path")
    # A file in another folder may be read by MLflow with another description, the one beside it there.
    in_place = isinstance(name, str) and Path(name).name == name and pyfunc.get("data") in (None, name)
    if not in_place or (flavor == "sklearn" and pyfunc.get("data") is not None):
        return False
    untrusted = _untrusted_types(folder / str(name))
    if untrusted:
        shown = ", ".join(untrusted[:_TYPES_SHOWN]) + (" and more" if len(untrusted) > _TYPES_SHOWN else "")
        message = (
            "A model saved by skops must be made of types that skops and MLflow trust, unless asked for; got: "
            f"{shown}. The model's own list of trusted types (skops_trusted_types) is no reason to trust them. Pass "
            f"{give_option('allow_pickle', value=True)} if you trust its author."
        )
        raise ModelUnfit(message)
    return True


def _untrusted_types(path: Path) -> list[str]:
    untrusted = set(import_skops().get_untrusted_types(file=path)) - _TRUSTED_TYPES
    if _DTYPE in untrusted:
        with zipfile.ZipFile(path) as archive:
            if _are_dtypes_arrays(json.loads(archive.read("schema.json"))):
                untrusted.remove(_DTYPE)
    return sorted(untrusted)


def import_skops() -> Any:
    """Import skops without torch, where torch has not been imported before; return its module of files.

    skops walks through all modules of scikit-learn, and the one for torch alone would import it: a second, and 200 MB.
    Raises ImportError where skops is not installed.
    """
    with _hide_torch():
        import skops.io  # noqa: PLC0415 - few models need it
    return skops.io


class _TorchHider:
    """Finds no module of scikit-learn that is for torch alone."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "sklearn.externals.array_api_compat.torch":
            raise ModuleNotFoundError(name=name)


@contextmanager
def _hide_torch() -> Generator[None]:
    hider = _TorchHider()
    sys.meta_path.insert(0, hider)
    try:
        yield
    finally:
        sys.meta_path.remove(hider)


def _are_dtypes_arrays(state: Any) -> bool:
    """Return whether every numpy dtype in what skops keeps of a model is read from an empty array, and not made."""
    if isinstance(state, list):
        return all(map(_are_dtypes_arrays, state))
    if not isinstance(state, dict):
        return True
    name = f"{state.get('__module__')}.{state.get('__class__')}"
    if name == _DTYPE and state.get("__loader__") != _DTYPE_LOADER:
        return False
    return all(map(_are_dtypes_arrays, state.values()))


def _is_unambiguous_zip(file: Any, size: int) -> bool:
    """Return whether a zip ends in its directory: no comment, no gap, and the zip64 end where its locator says.

    Readers find the directory of any other zip in different ways.
    """
    tail_size = min(size, _END_64.size + _LOCATOR.size + _END.size)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    if len(tail) < _END.size:
        return False
    signature, disk, first_disk, _, entries, directory, offset, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\5\6" or disk or first_disk or comment:
        return False
    located = tail[-_END.size - _LOCATOR.size : -_END.size]
    if not located.startswith(b"PK\6\7"):
        return bool(offset + directory == size - _END.size)
    end_64 = size - tail_size
    if len(tail) < _END_64.size + _LOCATOR.size + _END.size or _LOCATOR.unpack(located)[2] != end_64:
        return False
    signature, rest, *_, entries_64, directory_64, offset_64 = _END_64.unpack(tail[: _END_64.size])
    agrees = (
        directory in (directory_64, _FOUR_BYTES)
        and offset in (offset_64, _FOUR_BYTES)
        and entries in (entries_64, _TWO_BYTES)
    )
    whole = signature == b"PK\6\6" and rest == _END_64.size - 12  # which counts what follows the count itself
    return bool(whole and agrees and offset_64 + directory_64 == end_64)


def _unsafe_archive(path: Path, got: str) -> ModelUnfit:
    return ModelUnfit(
        f"An exported model must hold what torch.export.save writes of tensors and nothing else, got {got} in "
        f"{path.name}: reading it might unpickle, which runs any code in it. Log it again with "
        f'serialization_format="pt2", or pass {give_option("allow_pickle", value=True)} if you trust its author.'
    )
