"""Plan a task with SkyPilot, as its own environment does: `python plan_child.py TASK.yaml CATALOG`, JSON on stdout.

HOME must be an empty folder. The catalog of prices comes from CATALOG, since SkyPilot ships none and would download it,
and AWS counts as the cloud that `sky check` has found.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path


def main(task_file: str, catalog: str) -> None:
    home = Path.home() / ".sky"
    shutil.copytree(catalog, home / "catalogs/v8", dirs_exist_ok=True)
    (home / "config.yaml").write_text("allowed_clouds: [aws]\n")
    import sky
    import yaml
    from sky import global_user_state
    from sky.clouds.cloud import CloudCapability

    global_user_state.set_allowed_clouds(["aws"], "default")
    global_user_state.set_enabled_clouds(["aws"], CloudCapability.COMPUTE, "default")
    given = json.loads(sys.stdin.read())
    task = sky.Task.from_yaml_config(
        yaml.safe_load(Path(task_file).read_text()),
        env_overrides=list(given["envs"].items()),
        secrets_overrides=list(given["secrets"].items()),
    )
    with sky.Dag() as dag:
        dag.add(task)
    sky.optimizer.Optimizer.optimize(dag, quiet=True)
    best = task.best_resources
    found = {
        "instance": best.instance_type,
        "region": best.region,
        "spot": best.use_spot,
        "usd_an_hour": best.get_cost(3600),
        "accelerators": best.accelerators,
        "recovery": best.job_recovery,
        "nodes": task.num_nodes,
        "envs": task.envs,
        "shown": task.to_yaml_config(use_user_specified_yaml=False),
    }
    sys.stdout.write("\n" + json.dumps(found, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
