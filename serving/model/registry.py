"""Resolve a registered model: its name, version and digest are pinned before anything is scored."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient, MlflowException
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model as MLmodel
from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

from serving.errors import BadInput, ModelNotFound, ModelUnfit, suggest_name
from serving.machine import pause_garbage_collection
from serving.model.contract import Contract, Frozen
from serving.model.missing_values import takes_missing_values
from serving.model.signature import Names, Params, Policies, read_contract

_URI = re.compile(r"(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+|latest))")
_COPIED = re.compile(r"models:/(?P<name>[^/@]+)/(?P<version>\d+)")
_BLOCK = 1 << 20
# Enough to find the name that was meant; few of them are shown.
_MODELS_SEARCHED, _MODELS_SHOWN = 1000, 10
# The clock of a file system may tick only this often.
_TICK_NS = 20_000_000

# Path, size, time of modification and time of change of each file of a folder. No program can set the last.
FileStates = tuple[tuple[str, int, int, int], ...]


class ModelPin(Frozen):
    """One version of a registered model, pinned by the digest of its files."""

    name: str
    version: str
    model_id: str | None
    source: str
    digest: str

    @property
    def uri(self) -> str:
        """The address of the version, which no alias changes."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A pinned model, the folder with its files (read only), its MLmodel, and its tags.

    `files` is the state of the files when they were hashed. Without it they are hashed when the model is loaded, and
    compared with the pin.
    """

    pin: ModelPin
    folder: Path
    mlmodel: MLmodel
    files: FileStates | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_torch(self) -> bool:
        """Whether it runs as a torch module rather than through pyfunc."""
        return "pytorch" in self.mlmodel.flavors

    @property
    def is_text(self) -> bool:
        """Whether it may run as a text model rather than through pyfunc."""
        return not {"sentence_transformers", "transformers"}.isdisjoint(self.mlmodel.flavors)

    def contract(self, columns: Names, policies: Policies, params: Params | None = None) -> Contract:
        """Return the contract of the model. Raises ModelUnfit where its signature does not suffice, BadInput."""
        return read_contract(
            self.mlmodel,
            stack=self.is_torch,
            columns=columns,
            policies=policies,
            params=params,
            takes_missing=takes_missing_values(self.folder, self.mlmodel),
        )


@pause_garbage_collection()
def resolve_model(uri: str) -> Resolved:
    """Resolve models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest.

    Returns the pinned version with a SHA-256 over its files. The registry is that of MLFLOW_TRACKING_URI or
    MLFLOW_REGISTRY_URI. Raises ModelNotFound, whose message says what the registry has.
    """
    found = read_version(uri)
    resolved = open_model(name=str(found.name), version=str(found.version), source=str(found.source))
    return replace(resolved, tags=dict(found.tags))


def read_version(uri: str) -> ModelVersion:
    """Return what the registry says of the version that the address of a model names. Raises ModelNotFound."""
    name, client = _parse_uri(uri)["name"], MlflowClient()
    try:
        return client.get_model_version(name, find_version(uri))
    except MlflowException as error:
        raise _not_found(client, uri, name, error) from None


def find_version(uri: str) -> str:
    """Return the version that the address of a model names at this moment. Raises ModelNotFound."""
    match, client = _parse_uri(uri), MlflowClient()
    name = match["name"]
    try:
        if match["alias"]:
            return str(client.get_model_version_by_alias(name, match["alias"]).version)
        if match["version"] != "latest":
            return str(int(match["version"]))
        versions = [int(found.version) for found in client.search_model_versions(f"name = '{name}'")]
    except MlflowException as error:
        raise _not_found(client, uri, name, error) from None
    if not versions:
        raise _not_found(client, uri, name, None)
    return str(max(versions))


def _parse_uri(uri: str) -> re.Match[str]:
    match = _URI.fullmatch(uri)
    if match is None:
        message = f"A model must be models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest, got {uri!r}."
        if name_only := re.fullmatch(r"(?:models:/)?([^/@:]+)", uri):
            message += f" Say which version: models:/{name_only[1]}/latest, for one."
        raise ModelNotFound(message)
    return match


def save_tag(pin: ModelPin, key: str, value: str) -> bool:
    """Set a tag of a model version; return False where the registry refuses."""
    try:
        MlflowClient().set_model_version_tag(pin.name, pin.version, key, value)
    except MlflowException:
        return False
    return True


def delete_tags(uri: str, keys: Iterable[str]) -> None:
    """Delete tags of the model version that an address names. Raises ModelNotFound, BadInput where it is refused."""
    found = read_version(uri)
    try:
        for key in keys:
            MlflowClient().delete_model_version_tag(found.name, found.version, key)
    except MlflowException as error:
        message = f"The registry must let {uri} lose its tags, got: {error}. Ask for the right to edit the model."
        raise BadInput(message) from None


def open_model(*, name: str, version: str, source: str) -> Resolved:
    """Open the files of one version, downloaded where they are remote, and pin them by digest."""
    try:
        source = _resolve_copies(source)
        model_id = source.removeprefix("models:/") if source.startswith("models:/") else None
        folder = _fetch_folder(source, model_id)
    except (MlflowException, BotoCoreError, ClientError, OSError) as error:
        message = (
            f"The files of {name} version {version} must be readable at {source}, got: {error}. "
            "Check the artifact store."
        )
        raise ModelUnfit(message) from None
    mlmodel_file = folder / "MLmodel"
    if not mlmodel_file.is_file():
        message = f"The files of {name} version {version} must hold an MLmodel, got none in {folder}. Log it again."
        raise ModelUnfit(message)
    files = read_file_states(folder)
    pin = ModelPin(name=name, version=version, model_id=model_id, source=source, digest=digest_folder(folder))
    return Resolved(pin=pin, folder=folder, mlmodel=MLmodel.load(str(mlmodel_file)), files=files)


def _not_found(client: MlflowClient, uri: str, name: str, error: MlflowException | None) -> ModelNotFound:
    try:
        versions = client.search_model_versions(f"name = '{name}'") if re.fullmatch(r"[^']+", name) else []
        models = [model.name for model in client.search_registered_models(max_results=_MODELS_SEARCHED)]
        aliases = dict(client.get_registered_model(name).aliases) if versions else {}
    except MlflowException:
        return ModelNotFound(f"The registry must answer for {uri}, got: {error}. Check MLFLOW_TRACKING_URI.")
    if versions:
        numbers = sorted(int(found.version) for found in versions)
        meant = suggest_name(uri.partition("@")[2], aliases)
        have = f"versions {numbers} and aliases {aliases or 'none'}"
        return ModelNotFound(f"{uri} must name a version or an alias of {name!r}, which has {have}{meant or '.'}")
    known = ", ".join(map(repr, models[:_MODELS_SHOWN])) or "none"
    more = " and more" if len(models) > _MODELS_SHOWN else ""
    where = mlflow.get_registry_uri()
    return ModelNotFound(
        f"{uri} must be registered, but {where} has no model {name!r}{suggest_name(name, models) or '.'} Registered "
        f"are: {known}{more}. Register it, or set MLFLOW_TRACKING_URI to the registry that has it."
    )


def _resolve_copies(source: str) -> str:
    """Return the source with the files: a copied version names the version that it copies, which may be a copy too."""
    while copied := _COPIED.fullmatch(source):
        source = str(MlflowClient().get_model_version(copied["name"], copied["version"]).source)
    return source


def _fetch_folder(source: str, model_id: str | None) -> Path:
    """Return the folder of the files: in place where they are local, else in a cache that goes by their content."""
    location = source
    if model_id is not None:
        location = str(MlflowClient().get_logged_model(model_id).artifact_location)
    parts = urlsplit(location)
    if not parts.scheme:
        return Path(location)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    # The files of a logged model stay. At another address there may be others by now.
    name = model_id or _fingerprint(location)
    folder = _cache() / name if name else None
    if folder is None or not folder.is_dir():
        folder = _download(location, name)
        if model_id is None and name != _fingerprint(location):
            message = f"{location} must stay as it is while it is read, but was written meanwhile. Call again."
            raise ModelUnfit(message)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "overnight" / "models"


def _fingerprint(location: str) -> str | None:
    """Return the SHA-256 over names, sizes and ETags of what is at an address of S3, None for one elsewhere."""
    if urlsplit(location).scheme != "s3":
        return None
    repository = S3ArtifactRepository(location)
    bucket, prefix = repository.parse_s3_compliant_uri(location)  # type: ignore[no-untyped-call]
    client = repository._get_s3_client()  # type: ignore[no-untyped-call]  # noqa: SLF001 - as MLflow itself signs in
    listed = [
        f"{each['Key']}\0{each['Size']}\0{each['ETag']}\n"
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix.rstrip('/')}/")
        for each in page.get("Contents", [])
    ]
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def _download(location: str, name: str | None) -> Path:
    """Download into a temporary folder, then rename it, to its digest where it has no name, and return it.

    A folder that exists is complete.
    """
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as part:
        got = Path(download_artifacts(artifact_uri=location, dst_path=part))
        folder = cache / (name or digest_folder(got))
        try:
            got.rename(folder)
        except OSError:
            # Another process has downloaded it meanwhile.
            if not folder.is_dir():
                raise
    return folder


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 over the relative names and bytes of every file below a folder.

    Files that appear when a model is used do not count: Python's bytecode caches, and the file in which MLflow notes
    the name and version that a local model was loaded by.
    """
    total = hashlib.sha256()
    for file in sorted(_iter_files(folder)):
        inner = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                inner.update(block)
        total.update(f"{file.relative_to(folder).as_posix()}\0{inner.hexdigest()}\n".encode())
    return total.hexdigest()


def read_file_states(folder: Path) -> FileStates:
    """Return the state of every file in the digest of a folder; writing to one later changes its state.

    Waits until the clock of the file system has ticked. Raises ModelUnfit where a subfolder is a link, since the files
    behind it are not in the digest.
    """
    states = []
    for file in sorted(_iter_files(folder)):
        status = file.stat()
        states.append((str(file.relative_to(folder)), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    newest = max((changed for *_, changed in states), default=0)
    time.sleep(min(max(newest + _TICK_NS - time.time_ns(), 0), _TICK_NS) / 1e9)
    return tuple(states)


def check_files_unchanged(pin: ModelPin, folder: Path, files: FileStates) -> None:
    """Raise ModelUnfit where a file of a model has changed since it was hashed."""
    try:
        now = read_file_states(folder)
    except FileNotFoundError as error:
        now = ((str(error.filename), 0, 0, 0),)
    if now == files:
        return
    changed = sorted({path for path, *_ in set(now) ^ set(files)})
    message = (
        f"The files of {pin.uri} must stay as they were when they were hashed (digest {pin.digest[:12]}), for as long "
        f"as they are read, but {len(changed)} in {folder} were changed, the first {changed[0]}. Put them back and "
        "call again; a new version belongs in the registry under a number of its own."
    )
    raise ModelUnfit(message)


def _iter_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if "__pycache__" in path.parts or path == folder / REGISTERED_MODEL_META_FILE_NAME:
            continue
        if path.is_file():
            yield path
        elif path.is_symlink() and path.is_dir():
            message = (
                "A model's folder must hold no link to a folder, since what that holds would not be in the digest; got "
                f"{path}. Log the model with the files themselves."
            )
            raise ModelUnfit(message)
