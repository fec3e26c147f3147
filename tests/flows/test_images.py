"""Images as they come: real pictures in a Parquet tensor column, scored by a small convolutional network."""

from __future__ import annotations

import gzip
from pathlib import Path

import mlflow
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions

DATA = Path("/usr/share/datasets/fashion-mnist")
TRAINED_ON, FILES = 6_000, 4

pytestmark = [
    pytest.mark.usefixtures("prefect"),
    pytest.mark.skipif(not DATA.is_dir(), reason="Fashion-MNIST is missing: apt-get install dataset-fashion-mnist"),
]

Bytes = npt.NDArray[np.uint8]


class Wardrobe(torch.nn.Module):
    """Ten probabilities for a picture of 28 x 28 bytes, which it scales itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Flatten(), torch.nn.Linear(16 * 5 * 5, 10)),
        )

    def logits(self, image_NHW: torch.Tensor) -> torch.Tensor:
        return self.layers(image_NHW.unsqueeze(1).float() / 255)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits(image).softmax(dim=1)


def read_idx(name: str) -> Bytes:
    """Read a file of the IDX format: two zeros, the type, the count of dimensions, their sizes, the bytes."""
    data = gzip.decompress((DATA / name).read_bytes())
    shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


@pytest.fixture(scope="module")
def wardrobe() -> Wardrobe:
    torch.manual_seed(0)
    images_NHW = torch.from_numpy(read_idx("train-images-idx3-ubyte.gz")[:TRAINED_ON].copy())
    labels_N = torch.from_numpy(read_idx("train-labels-idx1-ubyte.gz")[:TRAINED_ON].astype(np.int64))
    network = Wardrobe()
    steps = torch.optim.Adam(network.parameters(), lr=3e-3)
    before = torch.get_num_threads()
    # On a machine that has other work, threads that wait for each other take many times as long.
    torch.set_num_threads(1)
    for _ in range(4):
        for batch in torch.randperm(TRAINED_ON).split(100):
            steps.zero_grad()
            torch.nn.functional.cross_entropy(network.logits(images_NHW[batch]), labels_N[batch]).backward()
            steps.step()
    torch.set_num_threads(before)
    return network.eval()


@pytest.fixture(scope="module")
def model(wardrobe: Wardrobe, registry: Path) -> str:
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("uint8"), (-1, 28, 28), "image")]),
        Schema([TensorSpec(np.dtype("float32"), (-1, 10), "garment")]),
    )
    with mlflow.start_run():
        logged = mlflow.pytorch.log_model(
            *(wardrobe,),
            name="model",
            signature=signature,
            input_example=torch.zeros(2, 28, 28, dtype=torch.uint8),
            pip_requirements=["torch"],
            registered_model_name="wardrobe",
        )
    return f"models:/wardrobe/{logged.registered_model_version}"


def write_images(folder: Path, images_NHW: Bytes, *, as_tensors: bool) -> Path:
    folder.mkdir()
    for at, numbers in enumerate(np.array_split(np.arange(len(images_NHW)), FILES)):
        image = pa.FixedShapeTensorArray.from_numpy_ndarray(images_NHW[numbers])
        table = pa.table({"number": numbers, "image": image if as_tensors else image.storage})
        pq.write_table(table, folder / f"images-{at}.parquet", row_group_size=1_000)
    return folder


@pytest.mark.parametrize("as_tensors", [True, False], ids=["tensors", "lists of a fixed size"])
def test_real_images_are_scored_as_the_network_itself_does_and_told_apart(
    as_tensors: bool,  # noqa: FBT001
    wardrobe: Wardrobe,
    model: str,
    tmp_path: Path,
) -> None:
    from flows.batch import batch_inference

    images_NHW, labels_N = read_idx("t10k-images-idx3-ubyte.gz"), read_idx("t10k-labels-idx1-ubyte.gz")
    source = write_images(tmp_path / "images", images_NHW, as_tensors=as_tensors)
    options = BatchOptions(key_columns=("number",), experiment=None)
    report = batch_inference(model, str(source), str(tmp_path / "garments"), options)

    table = open_predictions(str(tmp_path / "garments")).collect().sort("number")
    found = np.stack(table["garment"].to_numpy())
    with torch.inference_mode():
        expected = wardrobe(torch.from_numpy(images_NHW.copy())).numpy()
    assert (10_000, 0) == (report.rows_scored, report.rows_rejected)
    assert list(range(10_000)) == table["number"].to_list()
    np.testing.assert_allclose(expected, found, rtol=0, atol=1e-6)
    assert np.mean(found.argmax(axis=1) == labels_N) >= 0.7


def test_an_image_that_is_missing_rejects_its_row_alone(model: str, tmp_path: Path) -> None:
    from flows.batch import batch_inference

    images_NHW = read_idx("t10k-images-idx3-ubyte.gz")[:500]
    whole = write_images(tmp_path / "whole", images_NHW, as_tensors=False)
    holes = tmp_path / "holes"
    holes.mkdir()
    for path in whole.iterdir():
        table = pq.read_table(path)
        # Lists of any size: pyarrow can't read back one of a fixed size that is null.
        hole = np.arange(table.num_rows) % 25 == 3
        image = pa.array(table["image"].to_pylist(), pa.list_(pa.uint8()), mask=hole)
        pq.write_table(table.set_column(1, "image", image), holes / path.name)
    for name in ("whole", "holes"):
        options = BatchOptions(key_columns=("number",), batch_size=50, rows_per_chunk=250, experiment=None)
        batch_inference(model, str(tmp_path / name), str(tmp_path / f"{name}-garments"), options)

    good, table = (open_predictions(str(tmp_path / f"{name}-garments")).collect() for name in ("whole", "holes"))
    assert [("image", "null")] * 20 == list(
        table.filter(pl.col("garment").is_null()).select("reject_column", "reject_reason").iter_rows()
    )
    kept = table.filter(pl.col("garment").is_not_null())
    assert good.join(kept, on="number", how="semi").sort("number").equals(kept.sort("number"))
