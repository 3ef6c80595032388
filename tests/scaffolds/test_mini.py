"""mini-swe-agent around a sandbox: what a model sees, how it ends, and what it may not learn."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import InputError, PolicyError
from skyrl_minisandbox.images import Cache, Sources, Store
from skyrl_minisandbox.images.recipe import Sdist
from skyrl_minisandbox.policies import load_policy
from skyrl_minisandbox.policies.policy import Message
from skyrl_minisandbox.policies.script import scripted_tasks
from skyrl_minisandbox.record import EndedBy, Outcome
from skyrl_minisandbox.rewards import grade
from skyrl_minisandbox.sandbox import Limits, Sandbox
from skyrl_minisandbox.scaffolds import load_scaffold, mini
from skyrl_minisandbox.tasks import Task
from tests.policies.server import Reply, scripted_server
from tests.scaffolds.conftest import Place, Played, play
from tests.small import RECIPE, SOLVE, build_small_image, small_task
from tests.support import needs

pytestmark = needs("mini")

SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat patch.txt"


def action(command: str) -> str:
    return f"THOUGHT: so be it\n\n```mswea_bash_command\n{command}\n```"


class Texts:
    """Answers in order."""

    def __init__(self, *texts: str) -> None:
        self.left = list(texts)

    def query(self, messages: list[Message]) -> str:
        return self.left.pop(0)


@pytest.fixture
def sandbox(store_directory: Path, cache_directory: Path) -> Iterator[Sandbox]:
    build_small_image(store_directory, cache_directory)
    store, cache = Store(store_directory), Cache(cache_directory)
    image = store.find(RECIPE.digest())
    assert image is not None
    limits = Limits(memory=512 << 20, disk=64 << 20, output=100_000)
    with cache.checkout(image, store) as checkout, Sandbox(checkout.sandbox_spec(limits=limits)) as made:
        yield made


def run(sandbox: Sandbox, *texts: str, turns: int = 100, **config: object) -> Played:
    return play(load_scaffold("mini", **config), small_task(), sandbox, Texts(*texts), turns=turns)


def observations(played: Played) -> list[str]:
    return [m["content"] for m in played.conversation if m["role"] == "user"][1:]


needs_sandbox = needs("userns", "overlay", "git")


@needs_sandbox
class TestInASandbox:
    def test_the_first_messages_are_minis_own_and_hold_the_problem(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action(SUBMIT), turns=1)
        assert [m["role"] for m in played.conversation[:3]] == ["system", "user", "assistant"]
        assert "```mswea_bash_command" in played.conversation[0]["content"]
        assert small_task().problem_statement in played.conversation[1]["content"]

    def test_a_submission_is_the_patch(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action(SOLVE), action("git diff -- answer.sh > patch.txt"), action(SUBMIT))
        assert played.submission.ended_by is EndedBy.SUBMIT
        assert "-echo wrong\n+echo right\n" in (played.submission.patch or "")
        assert (played.policy.turns, played.policy.history_divergence) == (3, 0)
        trajectory = json.loads(json.dumps(played.submission.trajectory))
        assert trajectory["trajectory_format"].startswith("mini-swe-agent-")
        assert trajectory["info"]["exit_status"] == "Submitted"
        assert trajectory["info"]["submission"] == played.submission.patch
        assert [m["role"] for m in trajectory["messages"]] == [
            "system",
            "user",
            *["assistant", "user"] * 2,
            "assistant",
            "exit",
        ]

    def test_each_command_is_its_own_shell_and_a_failed_one_is_shown(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action("cd /tmp; x=1; pwd; exit 7"), action('pwd; echo "x=$x"'), turns=2)
        first, second = observations(played)
        assert "<returncode>7</returncode>" in first
        assert "/tmp" in first
        assert "/srv\nx=\n" in second

    def test_what_a_terminal_would_garble_comes_through(self, sandbox: Sandbox) -> None:
        command = (
            "cat > Makefile <<'EOF'\nall:\n\techo \"hi!there\" $(X) `date` ünï\nEOF\ncat -A Makefile; cat Makefile"
        )
        (seen,) = observations(run(sandbox, action(command), turns=1))
        assert "^Iecho" in seen
        assert 'all:\n\techo "hi!there" $(X) `date` ünï\n' in seen

    def test_a_command_longer_than_an_argument_may_be(self, sandbox: Sandbox) -> None:
        text = "0123456789 ü\n" * 20_000
        command = f"cat > big <<'EOF'\n{text}EOF\nwc -c big; read line; echo \"read: [$line]\""
        (seen,) = observations(run(sandbox, action(command), turns=1))
        assert f"{len(text.encode())} big\nread: []" in seen

    def test_stdin_is_empty_and_a_background_job_does_not_hold_the_turn(self, sandbox: Sandbox) -> None:
        played = run(
            sandbox, action("cat; python3 -c 'print(1)'; sleep 300 & echo started"), turns=1, command_timeout=20
        )
        assert "started" in observations(played)[0]
        assert "<returncode>0</returncode>" in observations(played)[0]

    def test_a_command_that_does_not_end_is_told_with_what_it_printed(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action("echo begun; sleep 600"), action("echo on"), turns=2, command_timeout=0.5)
        first, second = observations(played)
        assert "The command did not end within 0.5 seconds and was killed." in first
        assert "<returncode>-1</returncode>" in first
        assert "begun" in first
        assert "on" in second

    def test_a_full_disk_and_no_memory_are_told(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action("head -c 100M /dev/zero > fill"), action("rm fill; ls"), turns=2)
        assert "The disk of the sandbox is full." in observations(played)[0]
        assert "<returncode>0</returncode>" in observations(played)[1]

    def test_long_output_is_cut_for_the_model_and_in_the_trajectory(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action("seq 20000"), turns=1, output_limit=30_000)
        assert "elided_chars" in observations(played)[0]
        assert len(observations(played)[0]) < 12_000
        raw = played.submission.trajectory["messages"][3]["extra"]["raw_output"]
        assert 30_000 <= len(raw) < 30_100
        assert raw.startswith("1\n2\n")
        assert raw.endswith("20000\n")

    @pytest.mark.parametrize("text", ["no block", action("a") + action("b"), "", "\ud800"])
    def test_a_malformed_answer_is_told_and_counted_as_not_kept(self, sandbox: Sandbox, text: str) -> None:
        played = run(sandbox, text, action("echo fine"), turns=2)
        assert "EXACTLY ONE action" in observations(played)[0]
        assert "fine" in observations(played)[1]
        assert played.policy.history_divergence == 1

    def test_half_a_character_is_a_result(self, sandbox: Sandbox) -> None:
        (seen,) = observations(run(sandbox, action("echo a\ud800b\0c"), turns=1))
        assert "<returncode>" in seen

    def test_three_malformed_answers_end_it_with_our_own_diff(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action(SOLVE), "x", "y", "z")
        assert played.submission.ended_by is EndedBy.ERROR
        assert played.submission.patch is None
        assert "RepeatedFormatError" in played.submission.error

    def test_the_step_limit_ends_it(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action("echo 1"), action("echo 2"), step_limit=2)
        assert played.submission.ended_by is EndedBy.TURN_LIMIT
        assert played.submission.patch is None

    def test_stopped_from_outside_it_leaves_its_trajectory(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action("echo 1"), turns=1)
        assert played.submission.ended_by is EndedBy.TURN_LIMIT
        assert played.submission.patch is None
        assert len(played.submission.trajectory["messages"]) == 4

    def test_a_submission_whose_output_was_cut_is_left_to_our_own_diff(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action("seq 100000 > patch.txt"), action(SUBMIT))
        assert played.submission.ended_by is EndedBy.SUBMIT
        assert played.submission.patch is None

    def test_bytes_of_a_submission_survive(self, sandbox: Sandbox) -> None:
        played = run(sandbox, action("printf 'caf\\351\\f\\n' > patch.txt"), action(SUBMIT))
        assert (played.submission.patch or "").encode("utf-8", "surrogateescape") == b"caf\xe9\f\n"

    def test_a_policy_that_fails_fails_the_run(self, sandbox: Sandbox) -> None:
        class Down:
            def query(self, messages: list[Message]) -> str:
                raise PolicyError("down")

        with pytest.raises(PolicyError):
            load_scaffold("mini").run(small_task().public(), sandbox, Down())

    def test_an_endpoint_answers_it(self, sandbox: Sandbox) -> None:
        texts = [action(SOLVE), action("git diff -- answer.sh > patch.txt"), action(SUBMIT)]
        with scripted_server([Reply(text) for text in texts], by_turn=True) as server:
            driver = load_policy("openai", base_url=server.base_url, model="scripted")
            played = play(load_scaffold("mini"), small_task(), sandbox, driver)
        assert played.submission.ended_by is EndedBy.SUBMIT
        assert [len(request["messages"]) for request in server.requests] == [2, 4, 6]


_SILENT = """
import os, sys
before = dict(os.environ)
from skyrl_minisandbox.scaffolds import load_scaffold
from skyrl_minisandbox.tasks import Task
load_scaffold("mini")
assert dict(os.environ) == before
assert "minisweagent" in sys.modules
assert "litellm" not in sys.modules
"""


def test_importing_it_prints_and_leaves_nothing_and_brings_no_litellm(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MSWEA_", "XDG_"))}
    env |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _SILENT], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(home.iterdir())
    assert not list(temporary.iterdir())


def test_without_the_extra_the_command_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minisweagent", None)
    monkeypatch.setattr(mini, "_import_mini", mini._import_mini.__wrapped__)  # else read before, by another test
    with pytest.raises(InputError) as caught:
        load_scaffold("mini")
    assert caught.value.hint == "pip install 'skyrl-minisandbox[mini]'"


def test_an_unknown_key_lists_the_known() -> None:
    with pytest.raises(InputError, match="no key `steps`; known: command_timeout, output_limit, step_limit"):
        load_scaffold("mini", steps=3)


SCRIPTED = scripted_tasks("pypi")
EVERY = [pytest.param(name, marks=() if name == "humanize-4.12.0" else pytest.mark.ci) for name in SCRIPTED]


@pytest.mark.parametrize("task_id", EVERY)
def test_recorded_answers_solve_the_task(place: Callable[[str], Place], task_id: str) -> None:
    here = place(task_id)
    played = play(load_scaffold("mini"), here.task, here.open(), load_policy("script", task_id=task_id))
    assert played.submission.ended_by is EndedBy.SUBMIT
    report = grade(here.task, played.submission.patch or "", here.open)
    assert report.outcome is Outcome.RESOLVED, report.error


def secrets(task: Task, known: bytes) -> list[bytes]:
    """Lines that only the gold patch or the hidden tests have, and the patches as a whole."""
    found = []
    for patch in (task.gold_patch, task.tests.patch):
        lines = {line[1:].strip().encode() for line in patch.splitlines() if line[:1] == "+" and line[:3] != "+++"}
        own = [line for line in lines if len(line) > 12 and line not in known]
        assert own, "a patch whose lines all stand elsewhere cannot be looked for"
        found += [patch.encode(), *own]
    return found


def leaks(needles: list[bytes], places: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return [(name, needle) for name, data in places.items() for needle in needles if needle in data]


def upper_of(sandbox: Sandbox) -> bytes:
    out = io.BytesIO()
    sandbox.export_layer(out)
    return out.getvalue()


def released(task: Task, sources: Sources) -> bytes:
    """All bytes of the release that the agent starts from."""
    origin = task.recipe.repository
    assert isinstance(origin, Sdist)
    with tarfile.open(sources.sdist(origin.package, origin.version, origin.sha256, origin.filename)) as tar:
        files = [tar.extractfile(member) for member in tar if member.isreg()]
        return b"\0".join(file.read() for file in files if file is not None)


# What an agent could read about the machine it is in.
_LOOK = (
    "env; for f in environ cmdline comm mountinfo maps mem; do cat /proc/1/$f; done;"
    "ls -l /proc/1/fd /proc/1/cwd; ls -lR /tmp /run /root /dev /var/tmp"
)


def test_a_rollout_never_holds_the_gold_patch_or_the_hidden_tests(
    place: Callable[[str], Place], cache_directory: Path
) -> None:
    here = place("click-8.1.2")
    task = here.task
    agent = here.open()
    played = play(load_scaffold("mini"), task, agent, load_policy("script", task_id=task.id))
    spoken = json.dumps(played.conversation).encode()
    needles = secrets(task, released(task, Sources(cache_directory / "sources")) + spoken)
    seen = agent.run(_LOOK, timeout=60).merged
    assert b"PYTHONPATH=/testbed/src" in seen  # it looked
    upper = upper_of(agent)
    assert b"if self.is_flag and self.multiple:" in upper  # it is the upper, with the agent's edit
    places = {
        "environment and /proc/1": seen,
        "upper": upper,
        "trajectory": json.dumps(played.submission.trajectory).encode() + spoken,
        "sandbox": repr(agent.spec).encode(),
    }
    for layer in agent.spec.layers:
        for file in layer.rglob("*"):
            if file.is_file() and not file.is_symlink():
                places[f"{layer.name}/{file.relative_to(layer)}"] = file.read_bytes()
    assert any(name.endswith("src/click/core.py") for name in places)
    assert leaks(needles, places) == []
    # The search finds what is there: the same in a sandbox that was told.
    told = here.open()
    told.write_file("/var/tmp/told", task.gold_patch.encode() + task.tests.patch.encode())
    assert {needle for _, needle in leaks(needles, {"upper": upper_of(told)})} == set(needles)
