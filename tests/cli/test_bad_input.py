"""What a user can get wrong, and what a machine can lack: one clear message, the exit code, nothing left behind.

The whole text is asserted. What varies (numbers, hashes, versions of an index) is cut to `…` first.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import skyrl_minisandbox
from tests.cli.conftest import Command
from tests.support import needs

TASK = "inflection-0.3.1"
TASK_FILES = Path(skyrl_minisandbox.__file__).parent / "tasks" / "pypi_tasks"


def said(text: str) -> str:
    """The last message of ours on stderr; what comes before it is progress."""
    return text[text.rindex("minisandbox: ") :].rstrip("\n")


def task_file(directory: Path, name: str, **changes: object) -> Path:
    """A task file like the package's own, with some fields changed; a value of None takes the field away."""
    row = yaml.safe_load((TASK_FILES / f"{TASK}.yaml").read_text())
    row["id"] = name
    for key, value in changes.items():
        if value is None:
            del row[key]
        else:
            row[key] = value
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(row, sort_keys=False))
    return directory


def test_an_unknown_verb(minisandbox: Command) -> None:
    done = minisandbox("rolout")
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        "minisandbox: unknown verb `rolout`\n"
        "hint: minisandbox VERB …; verbs: doctor, tasks, image, validate, rollout, grade, explain, shell, train"
    )


def test_an_unknown_configuration_key(minisandbox: Command) -> None:
    done = minisandbox("rollout", "images.stor=/x")
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        "minisandbox: unknown key `images.stor`\n"
        "hint: did you mean `images.store` or `images.pythons` or `images.cache`? "
        "minisandbox VERB --help lists every key with its default"
    )


def test_a_run_directory_that_cannot_be_looked_at(minisandbox: Command, tmp_path: Path) -> None:
    out = tmp_path / ("x" * 300)
    done = minisandbox("rollout", "scaffold=gold", f"tasks.ids=[{TASK}]", f"out={out}")
    assert (done.code, done.out) == (3, "")
    assert said(done.err) == (
        f"minisandbox: the run directory DIR/{out.name} cannot be read: File name too long\nhint: name another: out=DIR"
    )


def test_an_unknown_choice(minisandbox: Command) -> None:
    done = minisandbox("rollout", "scaffold=gould")
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        "minisandbox: unknown choice `scaffold=gould`\n"
        "hint: did you mean `scaffold=gold`? choices: empty, gold, menu, mini, wrong; "
        "or a dotted path `package.module.Name`"
    )


def test_an_unknown_option(minisandbox: Command) -> None:
    done = minisandbox("rollout", "--scaffold", "gold")
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        "minisandbox: minisandbox rollout: unknown option `--scaffold`\nhint: options: -h, --help"
    )


@needs("network")
def test_an_unknown_task_id(minisandbox: Command, places: list[str]) -> None:
    done = minisandbox("rollout", "scaffold=gold", "tasks.ids=[inflection]", *places)
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        "minisandbox: unknown task id `inflection` in `pypi`\n"
        "hint: near names: inflection-0.3.1; `minisandbox tasks list tasks=pypi` lists all"
    )


def test_a_row_without_a_required_field(minisandbox: Command, tmp_path: Path, places: list[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instance_id": "a__b-1", "repo": "a/b"}\n')
    done = minisandbox("tasks", "list", "tasks=swebench", f"tasks.path={rows}", *places)
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        "minisandbox: row 1 of rows.jsonl (`a__b-1`) has no field `base_commit` (6 more fields are wrong)\n"
        "hint: rows have the columns of princeton-nlp/SWE-bench_Verified"
    )


def test_a_task_file_without_a_required_field(minisandbox: Command, tmp_path: Path, places: list[str]) -> None:
    path = task_file(tmp_path / "tasks", "mine", command=None)
    done = minisandbox("tasks", "list", f"tasks.path={path}", *places)
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        "minisandbox: task file mine.yaml has no field `command`\n"
        "hint: a task file looks like those in skyrl_minisandbox/tasks/pypi_tasks"
    )


@needs("network")
def test_a_package_version_that_does_not_exist(minisandbox: Command, tmp_path: Path, places: list[str]) -> None:
    fix = {"version": "99.99.1", "filename": "inflection-99.99.1.tar.gz", "sha256": "0" * 64}
    path = task_file(tmp_path / "tasks", "mine", fix=fix)
    done = minisandbox("image", "build", f"tasks.path={path}", *places)
    assert (done.code, done.out) == (2, "")
    assert re.sub(r"near it: .*", "near it: …", said(done.err)) == (
        "minisandbox: task `mine`: package `inflection` has no version 99.99.1 on the package index; near it: …\n"
        "hint: see `pip index versions inflection`"
    )


@pytest.mark.ci
@needs("userns", "overlay", "network")
def test_a_build_step_that_fails(minisandbox: Command, tmp_path: Path, places: list[str]) -> None:
    pins = ["iniconfig==2.1.0", "pytest==999.1"]
    path = task_file(tmp_path / "tasks", "mine", pins=pins)
    done = minisandbox("image", "build", f"tasks.path={path}", *places)
    assert (done.code, done.out) == (1, "")
    text = said(done.err)
    (log,) = re.findall(r"hint: the whole log is (\S+)", text)
    assert "No matching distribution found for pytest==999.1" in Path(log).read_text()
    text = re.sub(r"\n  (?!ERROR: No).*", "", text).replace(log, "LOG")
    assert text == (
        "minisandbox: building image mine: step `packages` failed (exit code 1)\n"
        "  ERROR: No matching distribution found for pytest==999.1\n"
        "hint: the whole log is LOG"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB: an interpreter does not fit."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "minisandbox-test", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.ci
@needs("root", "userns", "overlay", "network")
def test_a_full_disk_while_building(minisandbox: Command, small_disk: Path) -> None:
    here = [f"images.store={small_disk}/store", f"images.cache={small_disk}/cache"]
    done = minisandbox("image", "build", f"tasks.ids=[{TASK}]", *here)
    assert (done.code, done.out) == (3, "")
    assert said(done.err) == (
        "minisandbox: no room left on the disk that holds DIR/disk/cache\n"
        "hint: free some (`df -h DIR/disk/cache`), or name another place: images.cache=DIR, images.store=DIR"
    )
    assert not list((small_disk / "cache" / "aside").iterdir())


@needs("root")
def test_a_full_disk_under_the_run_directory(tmp_path: Path, small_disk: Path) -> None:
    from skyrl_minisandbox.cli.run_directory import RunDirectory
    from skyrl_minisandbox.errors import MachineError
    from skyrl_minisandbox.record import EndedBy, Outcome, RolloutRecord, Seconds

    directory = RunDirectory(small_disk / "run", {})
    record = RolloutRecord("r-1", "t", Outcome.UNRESOLVED, EndedBy.SUBMIT, 0.0, 1, Seconds(), "n")
    directory.add(record, "m", {"patch": "p"}, {})
    record.rollout_id = "r-2"
    with pytest.raises(MachineError) as caught:
        directory.add(record, "m", {"report": {"log": "x" * (30 << 20)}}, {})
    directory.close()
    assert caught.value.render().replace(str(tmp_path), "DIR") == (
        "the result of task t cannot be written to DIR/disk/run: No space left on device\nhint: df -h DIR/disk/run"
    )
    assert len((small_disk / "run" / "results.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (small_disk / "run" / "grades").iterdir()] == ["r-1.json"]


NO_USERNS = ["unshare", "-Ur", "bash", "-c", 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"', "bash"]
NO_USERNS_HINT = (
    "hint: user namespaces are switched off: as root `sysctl -w user.max_user_namespaces=65536`, and where they "
    "exist `kernel.unprivileged_userns_clone=1` and `kernel.apparmor_restrict_unprivileged_userns=0`; in "
    "Kubernetes allow them or run the pod privileged"
)


@needs("userns", "network")
def test_no_user_namespaces(minisandbox: Command, places: list[str], tmp_path: Path) -> None:
    arguments = ["rollout", "scaffold=gold", f"tasks.ids=[{TASK}]", f"out={tmp_path}/out", *places]
    done = minisandbox(*arguments, prefix=NO_USERNS)
    assert (done.code, done.out) == (3, "")
    assert said(done.err) == (
        "minisandbox: no user namespace can be made here: unshare: No space left on device "
        f"(the limit on namespaces is reached)\n{NO_USERNS_HINT}"
    )
    assert not (tmp_path / "out").exists()


@needs("userns")
def test_doctor_without_user_namespaces(minisandbox: Command, tmp_path: Path) -> None:
    done = minisandbox("doctor", f"images.cache={tmp_path}/cache", prefix=NO_USERNS)
    assert done.code == 3
    assert said(done.err) == (
        f"minisandbox: rollouts cannot run on this machine: user-namespaces, cache-directory\n{NO_USERNS_HINT}"
    )
    assert "BROKEN  user-namespaces: " in done.out
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def overlay_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that cannot hold an overlay upper: an overlay itself."""
    top = tmp_path / "overlay"
    for name in ("lower", "upper", "work", "root"):
        (top / name).mkdir(parents=True)
    options = f"lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "minisandbox-test", str(top / "root")], check=True)
    yield top / "root"
    subprocess.run(["umount", str(top / "root")], check=True)


@needs("root", "userns", "overlay", "network")
def test_a_cache_that_cannot_hold_an_overlay_upper(minisandbox: Command, overlay_disk: Path, tmp_path: Path) -> None:
    here = [f"images.store={tmp_path}/store", f"images.cache={overlay_disk}/cache"]
    done = minisandbox("image", "build", f"tasks.ids=[{TASK}]", *here)
    assert (done.code, done.out) == (3, "")
    assert said(done.err) == (
        "minisandbox: the file system of the cache directory DIR/overlay/root/cache (overlay) cannot hold an "
        "overlay upper: Invalid argument\n"
        "hint: name a directory on a local disk (ext4, xfs, btrfs) or tmpfs: images.cache=DIR"
    )


@pytest.mark.ci
@needs("userns", "overlay", "network", "mini")
def test_a_policy_endpoint_that_is_down(minisandbox: Command, places: list[str], tmp_path: Path) -> None:
    policy = ["policy=openai", "policy.base_url=http://127.0.0.1:9/v1", "policy.model=m", "policy.retries=1"]
    out = f"out={tmp_path}/out"
    done = minisandbox("rollout", "scaffold=mini", f"tasks.ids=[{TASK}]", *policy, *places, out)
    assert (done.code, done.out) == (1, "")
    assert said(done.err) == (
        "minisandbox: the endpoint http://127.0.0.1:9/v1/chat/completions does not answer for model `m`: "
        "Connection refused\n"
        "hint: curl http://127.0.0.1:9/v1/models   (is it up, with this model?)"
    )
    assert not (tmp_path / "out").exists()


@needs("network", "mini")
def test_a_script_without_texts_for_a_task(minisandbox: Command, places: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text('{"other-1": ["text"]}')
    overrides = [f"tasks.ids=[{TASK}]", "scaffold=mini", "policy=script", f"policy.path={script}"]
    done = minisandbox("rollout", *overrides, *places)
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        f"minisandbox: the script `DIR/script.json` has no texts for task `{TASK}`; it has: other-1\n"
        "hint: tasks.ids=[other-1]"
    )


def test_a_run_directory_that_holds_results(minisandbox: Command, places: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text("{}\n")
    done = minisandbox("rollout", "scaffold=gold", f"tasks.ids=[{TASK}]", *places, f"out={out}")
    assert (done.code, done.out) == (2, "")
    assert said(done.err) == (
        "minisandbox: the run directory DIR/out holds the results of another run\n"
        "hint: name another: out=DIR, or remove it"
    )


@pytest.mark.parametrize(
    "text,message",
    [
        ("", 'holds no predictions\nhint: {"instance_id": …, "model_patch": …} a line'),
        ("{]", "line 1: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (
            '{"instance_id": "a"}',
            'entry 1: no field `model_patch`\nhint: {"instance_id": …, "model_patch": …} a line',
        ),
        ('[{"instance_id": "a", "model_patch": 3}]', "entry 1: `model_patch` is neither a text nor null"),
    ],
)
def test_predictions_that_are_none(
    minisandbox: Command, tmp_path: Path, places: list[str], text: str, message: str
) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(text)
    done = minisandbox("grade", f"predictions={path}", *places)
    assert (done.code, done.out) == (2, "")
    separator = " " if message.startswith("holds") else ", "
    assert said(done.err) == f"minisandbox: DIR/predictions.jsonl{separator}{message}"


@pytest.mark.ci
@needs("userns", "overlay", "network")
def test_two_runs_at_once_on_a_cold_cache_both_succeed(minisandbox: Command, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    here = [f"images.store={tmp_path}/store", f"images.cache={tmp_path}/cache", "cluster=local"]

    def run(number: int) -> object:
        out = f"out={tmp_path}/run{number}"
        return minisandbox("rollout", "scaffold=gold", f"tasks.ids=[{TASK}]", *here, out, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (1, 2))
    for done in (first, second):
        assert done[0] == 0, done  # type: ignore[index]
        assert "mean reward 1.000 over 1 of 1 rollouts" in done[1]  # type: ignore[index]
