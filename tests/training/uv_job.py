"""What `test_uv.py` runs under `uv run`, away from the checkout: a rollout in a Ray task, as SkyRL's entry points are.

    uv_job.py STORE CACHE    prints one JSON object
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray


def rollout(task: str, images: dict[str, str]) -> dict[str, Any]:
    """With a scaffold of the working directory, which Ray brings to the task and we to the workers."""
    import skyrl_gym

    import skyrl_minisandbox
    from skyrl_minisandbox.env import shared_cluster, shutdown

    skyrl_minisandbox.register()
    config = {"scaffold": "own_scaffold.Own", "images": images}
    env = skyrl_gym.make("minisandbox", env_config=config, extras={"task": task, "max_turns": 5})
    messages, _ = env.init([])
    out = env.step(messages[-1]["content"])
    pids = [pid for node in shared_cluster(env.config).status() for pid in node.pids]
    env.close()
    found = {
        "record": out["metadata"]["record"],
        "prefix": sys.prefix,
        "package": skyrl_minisandbox.__file__,
        "workers": [Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0] for pid in pids],
    }
    shutdown()
    return found


if __name__ == "__main__":
    ray.init(runtime_env={"env_vars": {"ANY": "1"}}, num_cpus=1, include_dashboard=False)  # as SkyRL's initialize_ray
    job = ray.remote(num_cpus=1, max_retries=0)(rollout)
    images = {"store": sys.argv[1], "cache": sys.argv[2]}
    found = ray.get(job.remote(Path("task.json").read_text(), images))
    print(json.dumps({**found, "driver": sys.prefix}))
    ray.shutdown()
