"""Resolve a registered model: its name, version and digest are pinned before anything is scored."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient, MlflowException
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model as MLmodel
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

from serving.errors import BadInput, ModelNotFound, ModelUnfit, suggest_name
from serving.machine import pause_garbage_collection
from serving.model.contract import Contract
from serving.model.missing_values import takes_missing_values
from serving.model.pin import FileStates, ModelPin, digest_files, digest_folder, read_file_states
from serving.model.signature import Names, Params, Policies, read_contract

_URI = re.compile(r"(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+|latest))")
_COPIED = re.compile(r"models:/(?P<name>[^/@]+)/(?P<version>\d+)")
# Enough to find the name that was meant; few of them are shown.
_MODELS_SEARCHED, _MODELS_SHOWN = 1000, 10


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

    @property
    def needs_torch(self) -> bool:
        """Whether torch runs it, in the process of the caller; other models run in processes of their own."""
        return self.is_torch or self.is_text

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
    return _open_version(read_version(uri))


def resolve_kept_model(uri: str) -> Resolved | None:
    """Resolve a model as `resolve_model` does, where its files are here or a download of them is kept; else None.

    Raises ModelNotFound in any case.
    """
    found = read_version(uri)
    is_kept = urlsplit(str(found.source)).scheme in ("", "file", "models")
    return _open_version(found) if is_kept else None


def _open_version(found: ModelVersion) -> Resolved:
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
    pin = ModelPin(name=name, version=version, model_id=model_id, source=source, digest=digest_files(folder, files))
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
