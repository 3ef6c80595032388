"""Nodes behind Ray: rollouts on each, what comes and goes, and what is left of our own Ray: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.claims import sweep
from skyrl_minisandbox.cluster import RayCluster, connect
from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.errors import NodeError
from skyrl_minisandbox.own_ray import RAY_TAIL, SOCKET_PATH, ray_place
from tests.machine import descendants
from tests.small import SOLVE, cluster_config, play, request, small_task
from tests.support import REPOSITORY, needs, seconds, told_over_ray

sandboxes = needs("userns", "overlay", "git")


@pytest.fixture(scope="module")
def config(store_directory: Path, cache_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> EnvConfig:
    return cluster_config(store_directory, cache_directory, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def cluster(config: EnvConfig) -> Iterator[RayCluster]:
    """The module's one Ray, our own."""
    found = connect(config)
    assert isinstance(found, RayCluster)
    yield found
    found.shutdown()


@sandboxes
@needs("ray")
def test_a_rollout_through_ray_is_the_same(cluster: RayCluster) -> None:
    finished = play(cluster, "true", SOLVE, "submit")
    assert (finished.record.reward, finished.record.turns) == (1.0, 3)
    assert finished.record.node == cluster.status()[0].name
    assert cluster.slots == 2
    assert cluster.status()[0].open == 0


@sandboxes
@needs("ray")
def test_commands_through_ray_find_the_signals_and_the_priority_that_they_find_without(cluster: RayCluster) -> None:
    asked = request(small_task())
    cluster.open(asked)
    text = cluster.step(asked.rollout_id, "grep -E 'SigBlk|SigIgn' /proc/self/status; nice").messages[0]["content"]
    words = text.split()
    assert words[:5] == ["exit", "code", "0", "SigBlk:", "0" * 16]
    # glibc's posix_spawn has its own two (32 and 33) ignored, which no program can use.
    assert words[5] == "SigIgn:" and int(words[6], 16) & ~(0b11 << 31) == 0 and words[7] == "0"
    cluster.close(asked.rollout_id, grade=False)


def test_ray_goes_where_its_sockets_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_place(Path("/r")) == (Path("/r"), "ray-")
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    parent, prefix = ray_place(long)
    assert parent != long and prefix == "minisandbox-" and os.access(parent, os.W_OK)


@sandboxes
@needs("ray")
def test_our_ray_is_below_the_run_directory_or_short(cluster: RayCluster, config: EnvConfig) -> None:
    path = cluster._ray._claim.path  # type: ignore[union-attr]
    assert len(str(path)) + RAY_TAIL <= SOCKET_PATH
    if len(f"{config.out}/ray-12345678") + RAY_TAIL <= SOCKET_PATH:
        assert path.parent == Path(config.out)


@sandboxes
@needs("ray")
def test_a_dead_node_loses_its_rollouts_and_comes_back(cluster: RayCluster) -> None:
    import ray

    asked = request(small_task())
    cluster.open(asked)
    pids = cluster.status()[0].pids
    ray.kill(cluster._places[0].handle.actor)  # type: ignore[attr-defined]
    with pytest.raises(NodeError, match="is lost"):
        cluster.step(asked.rollout_id, "true")
    assert play(cluster, SOLVE, "submit").record.reward == 1.0
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "the dead node's workers live on"
        time.sleep(0.05)


@sandboxes
@needs("ray")
def test_a_second_cluster_of_the_same_process_shares_ray_and_nodes_and_leaves_them(
    cluster: RayCluster, config: EnvConfig
) -> None:
    other = RayCluster(config)
    assert other.status()[0].pids == cluster.status()[0].pids
    assert not other._ray._ours
    other._ray.close()
    assert play(cluster, SOLVE, "submit").record.reward == 1.0


@sandboxes
@needs("ray")
def test_what_the_node_says_is_in_the_run_directory(cluster: RayCluster, config: EnvConfig) -> None:
    name = cluster.status()[0].name
    assert (Path(config.out) / "logs" / name / "node.log").exists()


@needs("ray")
def test_an_address_where_no_ray_is_says_so_at_once(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from skyrl_minisandbox.cluster import connect\n"
        "from skyrl_minisandbox.config import make_config\n"
        "connect(make_config({'images': {'cache': sys.argv[1]}, 'cluster': {'address': '127.0.0.1:1'}}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "MachineError: no Ray answers at 127.0.0.1:1: Connection refused" in done.stderr


_RUN = """
import sys, threading
from skyrl_minisandbox.cluster import connect
from skyrl_minisandbox.config import make_config
from tests.small import SOLVE, request, small_task
cluster = connect(make_config({
    "images": {"store": sys.argv[1], "cache": sys.argv[2]}, "cluster": {"workers": 1}, "out": sys.argv[3]}))
asked = request(small_task())
cluster.open(asked)
if sys.argv[4] == "hang":
    threading.Thread(target=cluster.step, args=(asked.rollout_id, "sleep 600"), daemon=True).start()
    print("open", flush=True)
    sys.stdin.read()
cluster.step(asked.rollout_id, SOLVE)
print(cluster.step(asked.rollout_id, "submit").finished.record.reward)
cluster.shutdown()
"""


def run(config: EnvConfig, out: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, config.images.store, config.images.cache, str(out), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def claims(config: EnvConfig) -> set[str]:
    return set(os.listdir(Path(config.images.cache) / "claims"))


def alive(processes: list[Any]) -> list[str]:
    return [str(p) for p in processes if Path(f"/proc/{p.pid}").exists() and _state(p.pid) not in "ZX"]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


@sandboxes
@needs("ray")
@pytest.mark.ci
def test_after_kill_minus_9_the_next_start_finds_and_removes_all(config: EnvConfig, tmp_path: Path) -> None:
    before = claims(config)
    owner = run(config, tmp_path, "hang")
    assert owner.stdout is not None
    assert owner.stdout.readline() == "open\n"
    below = descendants(owner.pid)
    assert len(below) > 8
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 30
    ours = [p for p in below if "ray" not in p.command]
    while alive(ours) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(ours) == []
    removed = sweep(Path(config.images.cache))
    assert len(removed) == 1, removed
    assert not Path(removed[0]).exists()
    assert alive(below) == []
    assert claims(config) == before


@sandboxes
@needs("ray")
@pytest.mark.ci
def test_two_runs_at_once_on_one_cache_both_succeed_and_leave_nothing(config: EnvConfig, tmp_path: Path) -> None:
    before = claims(config)
    runs = [run(config, tmp_path / name, "go") for name in ("a", "b")]
    for each in runs:
        out, err = each.communicate(timeout=120)
        assert (each.returncode, out, err) == (0, "1.0\n", "")
    for name in ("a", "b"):
        assert [p.name for p in (tmp_path / name).iterdir()] == ["logs"]
    assert claims(config) == before


@needs("ray")
@pytest.mark.ci
@pytest.mark.parametrize("call", ["cluster.open(asked)", "node.step('id', '')", "node.close('id', False, None)"])
def test_a_call_after_the_end_starts_no_other_ray(tmp_path: Path, call: str) -> None:
    program = (
        "import sys\n"
        "import ray\n"
        "from skyrl_minisandbox.cluster import REFRESH, RayCluster\n"
        "from skyrl_minisandbox.config import make_config\n"
        "from skyrl_minisandbox.errors import NodeError\n"
        "from tests.small import request, small_task\n"
        "cluster = RayCluster(make_config({'images': {'cache': sys.argv[1]}}))\n"
        "node = cluster._places[0].handle\n"
        "asked = request(small_task())\n"
        "cluster.shutdown()\n"
        "cluster._looked = -REFRESH\n"  # as if the run had taken longer than a look at the nodes is good for
        "try:\n"
        f"    {call}\n"
        "except NodeError as error:\n"
        "    print(error.message, ray.is_initialized())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the cluster has been shut down False\n", "")


@needs("ray")
@pytest.mark.ci
def test_our_ray_starts_again_in_the_same_process(tmp_path: Path) -> None:
    program = (
        "import os, sys, threading, ray\n"
        "from skyrl_minisandbox.own_ray import RayConnection\n"
        "from skyrl_minisandbox.config import make_config\n"
        "before = dict(os.environ)\n"
        "config = make_config({'images': {'cache': sys.argv[1]}})\n"
        "for _ in range(2):\n"
        "    made = []\n"
        "    thread = threading.Thread(target=lambda: made.append(RayConnection(config)))\n"
        "    thread.start(); thread.join()\n"
        "    import ray, time\n"
        "    time.sleep(1)\n"  # long enough for a signal of the ended thread to have come
        "    print(len([n for n in ray.nodes() if n['Alive']]))\n"
        "    made[0].close()\n"
        "    assert os.environ == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n1\n", "")
    assert not (Path.home() / ".ray" / "auth_token").exists() or "RAY_AUTH_TOKEN" in os.environ


_TASK = """
import json, logging, os, sys, time
import ray
from ray.cluster_utils import Cluster
logging.getLogger("ray").setLevel(logging.ERROR)
small = {"num_cpus": 1, "object_store_memory": 80 << 20}
machines = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
for _ in range(2):
    machines.add_node(**small)
ray.init(address=machines.address, log_to_driver=False, logging_level=logging.ERROR)

@ray.remote(num_cpus=1, max_retries=0)
def entry(store, cache):  # as SkyRL runs a training: in one task on one node
    from skyrl_minisandbox.cluster import connect
    from skyrl_minisandbox.config import make_config
    from tests.small import SOLVE, request, small_task
    given = {"images": {"store": store, "cache": cache}, "cluster": {"slots": 2, "workers": 1}}
    cluster = connect(make_config(given))
    asked = [request(small_task(f"small-{number}")) for number in range(6)]
    for each in asked:
        cluster.open(each)
        cluster.step(each.rollout_id, SOLVE)
    records = [cluster.step(each.rollout_id, "submit").finished.record for each in asked]
    given["cluster"]["nodes"] = 2
    bounded = connect(make_config(given))
    found = {
        "nodes": [record.node for record in records],
        "rewards": [record.reward for record in records],
        "oversubscribed": cluster.oversubscribed,
        "bounded": len(bounded.status()),
        "pids": [pid for status in cluster.status() for pid in status.pids],
    }
    if sys.argv[3] == "end":
        cluster.shutdown()
    return found

def lives(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

found = ray.get(entry.remote(sys.argv[1], sys.argv[2]))
deadline = time.monotonic() + 30
if sys.argv[3] == "end":
    while time.monotonic() < deadline and any(map(lives, found["pids"])):
        time.sleep(0.05)
    while time.monotonic() < deadline and ray.util.list_named_actors(all_namespaces=True):
        time.sleep(0.05)  # Ray takes a moment to end them, and longer on a busy machine
    found["left"] = ray.util.list_named_actors(all_namespaces=True)
ray.shutdown()
machines.shutdown()
while time.monotonic() < deadline and any(map(lives, found["pids"])):
    time.sleep(0.05)
found["alive"] = [pid for pid in found["pids"] if lives(pid)]
print(json.dumps(found))
"""


@sandboxes
@needs("ray")
@pytest.mark.ci
@pytest.mark.parametrize("ending", ["end", "just stop"])
def test_inside_a_ray_task_rollouts_go_to_every_node_and_nothing_of_us_stays(config: EnvConfig, ending: str) -> None:
    images = config.images
    found = told_over_ray([sys.executable, "-c", _TASK, images.store, images.cache, ending], timeout=180)
    assert found["rewards"] == [1.0] * 6
    assert sorted(Counter(found["nodes"]).values()) == [2, 2, 2]
    assert (found["oversubscribed"], found["bounded"]) == (0, 2)
    assert found["alive"] == []
    assert found.get("left", []) == []
    sweep(Path(config.images.cache))
    runs = Path(config.images.cache) / "runs"
    assert not runs.exists() or list(runs.iterdir()) == []


_HUNG = """
import json, logging, os, signal, sys, time
import ray
from ray.cluster_utils import Cluster
from skyrl_minisandbox import cluster as ours
from tests.small import cluster_config, request, small_task
from pathlib import Path
logging.getLogger("ray").setLevel(logging.ERROR)
small = {"num_cpus": 1, "object_store_memory": 80 << 20}
machines = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
ray.init(address=machines.address, log_to_driver=False, logging_level=logging.ERROR)
cluster = ours.RayCluster(cluster_config(*map(Path, sys.argv[1:4])))
other = machines.add_node(**small)
raylet = other.all_processes["raylet"][0].process.pid
os.kill(raylet, signal.SIGSTOP)  # Ray lists it for many seconds more
alive = sum(node["Alive"] for node in ray.nodes())
cluster._looked = -ours.REFRESH
started = time.monotonic()
asked = [request(small_task(f"small-{number}")) for number in range(3)]
first = cluster.open(asked[0])
seconds = time.monotonic() - started
os.kill(raylet, signal.SIGCONT)
deadline = time.monotonic() + 60
while len(cluster.status()) < 2 and time.monotonic() < deadline:
    time.sleep(0.1)
for each in asked[1:]:
    cluster.open(each)
found = {"listed": alive, "seconds": seconds, "open": sorted(status.open for status in cluster.status())}
cluster.shutdown()
ray.shutdown()
machines.shutdown()
print(json.dumps(found))
"""


@sandboxes
@needs("ray")
@pytest.mark.ci
def test_a_node_that_hangs_while_it_joins_holds_nobody_and_joins_when_it_is_there(
    config: EnvConfig, tmp_path: Path
) -> None:
    images = config.images
    found = told_over_ray([sys.executable, "-c", _HUNG, images.store, images.cache, str(tmp_path)], timeout=180)
    assert found["listed"] == 2
    assert found["seconds"] < seconds(20)
    assert found["open"] == [1, 2]
