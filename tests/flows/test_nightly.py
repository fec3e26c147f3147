"""What a night refuses before it sends anything anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.local.prefect_server import PrefectServer
from serving.errors import SourceFormat
from tasks.spot.purchase import Buying


def test_a_source_that_does_not_tell_its_rows_is_refused_by_its_format(
    linear: str, prefect: PrefectServer, tmp_path: Path
) -> None:
    from flows.nightly import nightly_inference

    source = tmp_path / "customers.csv"
    source.write_text("customer,a,b,c\n1,1.0,2.0,3.0\n")
    buying = Buying(spot_price=1, on_demand_price=3)

    with pytest.raises(SourceFormat, match=r"which Parquet tells, got csv at .*Write it as Parquet"):
        nightly_inference(linear, str(source), str(tmp_path / "scores"), "06:00", buying)

    assert not (tmp_path / "scores").exists()
