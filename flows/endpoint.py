"""An online endpoint: a registered model on a model server that the team runs, behind one gateway."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, NoReturn

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from flows.adhoc import adhoc_flow
from serving.contract import Contract
from serving.errors import EndpointFailed
from serving.gateway.client import GatewayClient
from serving.gateway.keys import digest
from serving.gateway.route import Route
from serving.model import Tunable, load_model
from serving.registry import Resolved, resolve_model
from serving.release import Dial, Release
from serving.targets import Address, Host
from tasks.batch.artifacts import Logger
from tasks.endpoint import spec as specs
from tasks.endpoint.access import read_admin_key, read_keys
from tasks.endpoint.client import InferClient
from tasks.endpoint.deploy import host_of
from tasks.endpoint.load import Latency, measure_latency
from tasks.endpoint.render import bare_release, make_release, remember, remembered
from tasks.endpoint.report import Endpoint, publish_endpoint
from tasks.endpoint.route import check_change, idle, rolled_out, serving, without
from tasks.endpoint.samples import Sample
from tasks.endpoint.spec import AnyTarget, EndpointSpec
from tasks.endpoint.traffic import check_door, keep_warm_seconds, shift, wait_drained
from tasks.endpoint.tuning import Chosen, settle_dial
from tasks.endpoint.verify import Verification, samples, verify

_GATEWAY = "http://127.0.0.1:8080"
