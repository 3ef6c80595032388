"""The main verbs on real tasks: what they print, what they write, how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from skyrl_minisandbox.policies.script import load_script
from skyrl_minisandbox.record import RolloutRecord
from tests.cli.conftest import Command
from tests.support import REPOSITORY, needs

pytestmark = [pytest.mark.ci, needs("userns", "overlay", "network")]

TASK = "humanize-4.12.0"
OTHER = "inflection-0.3.1"


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs("mini")
def test_a_run_directory_is_what_the_design_says(minisandbox: Command, places: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = minisandbox("rollout", "scaffold=mini", "policy=script", f"tasks.ids=[{TASK}]", f"out={out}", *places)
    assert done.code == 0, done.err
    table = done.out.splitlines()
    stages = [word for stage in ("checkout", "create", "agent", "grade") for word in (stage, "s")]
    assert table[0].split() == ["task", "outcome", "reward", "turns", *stages]
    assert table[1].split()[:3] == [TASK, "resolved", "1"]
    assert table[-2] == "mean reward 1.000 over 1 of 1 rollouts"
    assert table[-1] == "run directory: DIR/out"
    (result,) = lines(out / "results.jsonl")
    keys = "rollout_id task_id outcome ended_by reward turns seconds node error"
    assert list(result) == keys.split()
    assert list(result["seconds"]) == ["checkout", "create", "agent", "grade"]
    record = RolloutRecord.from_json(result)
    assert (record.task_id, record.reward, record.turns) == (TASK, 1.0, len(load_script("pypi")[TASK]))
    (prediction,) = lines(out / "predictions.jsonl")
    assert list(prediction) == ["instance_id", "model_name_or_path", "model_patch"]
    assert prediction["instance_id"] == TASK
    assert prediction["model_patch"].startswith("diff --git ")
    trajectory = json.loads((out / "trajectories" / f"{record.rollout_id}.json").read_text())
    assert trajectory["trajectory"]
    grades = json.loads((out / "grades" / f"{record.rollout_id}.json").read_text())
    assert set(grades["report"]["tests"].values()) <= {"PASSED", "SKIPPED", "XFAIL"}
    assert yaml.safe_load((out / "config.yaml").read_text())["scaffold"]["name"] == "mini"
    regraded = minisandbox("grade", f"predictions={out}/predictions.jsonl", "--json", *places)
    assert regraded.code == 0, regraded.err
    (row,) = json.loads(regraded.out)
    assert (row["task_id"], row["outcome"], row["reward"]) == (TASK, "resolved", 1.0)
    assert row["tests"] == grades["report"]["tests"]


@needs("mini")
def test_recorded_answers_solve_every_recorded_task_through_the_env(
    minisandbox: Command, places: list[str], tmp_path: Path
) -> None:
    recorded = load_script("pypi")
    assert len(recorded) >= 3
    overrides = ["scaffold=mini", "policy=script", f"tasks.ids=[{','.join(recorded)}]", f"out={tmp_path}/out"]
    done = minisandbox("rollout", *overrides, *places)
    assert done.code == 0, done.err
    results = {result["task_id"]: result for result in lines(tmp_path / "out/results.jsonl")}
    assert {task: result["outcome"] for task, result in results.items()} == dict.fromkeys(recorded, "resolved")
    assert {task: result["turns"] for task, result in results.items()} == {t: len(v) for t, v in recorded.items()}
    assert {result["ended_by"] for result in results.values()} == {"submit"}


def test_unresolved_is_a_result_and_no_error(minisandbox: Command, places: list[str], tmp_path: Path) -> None:
    for scaffold, outcome in (("empty", "empty_patch"), ("wrong", "unresolved")):
        out = tmp_path / scaffold
        done = minisandbox("rollout", f"scaffold={scaffold}", f"tasks.ids=[{OTHER}]", f"out={out}", *places)
        assert done.code == 0, done.err
        (result,) = lines(out / "results.jsonl")
        assert (result["outcome"], result["reward"]) == (outcome, 0.0)


def test_a_shell_runs_in_the_task_s_image(minisandbox: Command, places: list[str]) -> None:
    done = minisandbox("shell", f"task={OTHER}", "command=pwd; python -c 'import inflection'; exit 7", *places)
    assert (done.code, done.out) == (7, "/testbed\n")


def test_images_are_listed_by_the_task_they_were_built_for(minisandbox: Command, places: list[str]) -> None:
    assert minisandbox("image", "build", f"tasks.ids=[{OTHER}]", *places).code == 0
    done = minisandbox("image", "ls", "--json", *places)
    assert OTHER in [image["name"] for image in json.loads(done.out)]
    shown = minisandbox("image", "show", f"task={OTHER}", *places)
    assert "workdir  /testbed" in shown.out


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that answers from the package's own recording."""

    texts: list[str] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        message = {"role": "assistant", "content": self.texts[turn]}
        answer = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Endpoint.texts = load_script("pypi")[TASK]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@needs("mini", "ray")
def test_mini_solves_a_task_with_an_endpoint_through_ray(
    minisandbox: Command, store_directory: Path, cache_directory: Path, tmp_path: Path, endpoint: str
) -> None:
    here = [f"images.store={store_directory}", f"images.cache={cache_directory}", "cluster=ray"]
    policy = ["policy=openai", f"policy.base_url={endpoint}", "policy.model=recorded"]
    # A short path: Ray puts sockets below the run directory, whose paths have at most 107 bytes.
    with_short_path = Path("/tmp") / f"ms-{os.getpid()}"
    try:
        done = minisandbox("rollout", "scaffold=mini", f"tasks.ids=[{TASK}]", *policy, *here, f"out={with_short_path}")
        assert done.code == 0, done.err
        (result,) = lines(with_short_path / "results.jsonl")
        assert (result["outcome"], result["reward"]) == ("resolved", 1.0)
        (prediction,) = lines(with_short_path / "predictions.jsonl")
        assert prediction["model_name_or_path"] == "mini/recorded"
    finally:
        subprocess.run(["rm", "-rf", str(with_short_path)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", ["images to build", "rollouts: "])
def test_an_interrupt_ends_in_order_and_leaves_nothing(
    at: str, number: signal.Signals, tmp_path: Path, store_directory: Path
) -> None:
    store = tmp_path / "store" if at.startswith("images") else store_directory
    cache = tmp_path / "cache"
    if store == store_directory:
        built = [sys.executable, "-m", "skyrl_minisandbox.cli.main", "image", "build", f"tasks.ids=[{OTHER}]"]
        places = [f"images.store={store}", f"images.cache={cache}"]
        subprocess.run([*built, *places], check=True, cwd=REPOSITORY, capture_output=True, timeout=300)
    overrides = [f"tasks.ids=[{OTHER}]", "scaffold=gold", "cluster=local", f"out={tmp_path}/out"]
    watched = [sys.executable, "-m", "tests.orphans", "10", sys.executable, "-m", "skyrl_minisandbox.cli.main"]
    process = subprocess.Popen(
        [*watched, "rollout", *overrides, f"images.store={store}", f"images.cache={cache}"],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stderr is not None
    seen = ""
    while at not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(0.3)  # into the middle of it
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all of the foreground
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, err.splitlines()[-1]) == ("", "minisandbox: interrupted")
    assert not (tmp_path / "out").exists()
    assert list((cache / "aside").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "cache"}
