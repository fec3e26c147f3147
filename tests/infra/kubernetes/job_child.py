"""Print the Job that Prefect's worker for Kubernetes makes of a pool: `python job_child.py POOL.json`.

Its own environment runs it, which has prefect-kubernetes. The worker's settings come by the environment.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefect.client.schemas.objects import Flow, FlowRun
from prefect_kubernetes.settings import KubernetesSettings
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration


async def main(given: dict[str, Any]) -> None:
    job = await KubernetesWorkerJobConfiguration.from_template_and_values(given["template"], given["variables"])
    job.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="x"), flow=Flow(id=uuid4(), name="batch"))
    worker = KubernetesSettings().worker
    # What it does with these two settings before it sends the Job to the API of the cluster.
    await KubernetesWorker._replace_env_variable_with_secret(
        None,
        env_variable_name="PREFECT_API_AUTH_STRING",
        configuration=job,
        secret_name=worker.api_auth_string_secret_name,
        secret_key=worker.api_auth_string_secret_key,
    )
    sys.stdout.write("\n" + json.dumps(job.job_manifest))


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
