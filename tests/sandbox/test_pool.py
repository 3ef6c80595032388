"""A pool gives what a fresh sandbox is, sooner; what died in it is never given, and it leaves nothing."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox import Bind, Pool, Sandbox, SandboxSpec
from tests.sandbox.test_teardown import gone
from tests.support import seconds


def test_what_is_taken_was_ready_and_its_first_shell_runs(spec: SandboxSpec) -> None:
    with Pool(spec, 2) as pool:
        assert pool.wait_full(seconds(30))
        waiting = {sandbox.pid for sandbox in pool._ready}
        with pool.take() as sandbox:
            assert sandbox.pid in waiting
            first = sandbox.shell()
            assert first.run("ps -o ppid= $$ | tr -d ' '; cd /tmp; echo on").output == "1\non\n"
            assert first is sandbox.shells[0]
            second = sandbox.shell()
            assert second is not first and second.run("pwd").output == "/testbed\n"
        assert pool.wait_full(seconds(30))  # refilled


def test_a_shell_with_arguments_is_a_new_one(spec: SandboxSpec) -> None:
    with Pool(spec, 1) as pool, pool.take() as sandbox:
        shell = sandbox.shell(env={"WORD": "x"}, cwd="/tmp")
        assert shell.run("echo $WORD $PWD").output == "x /tmp\n"
        assert sandbox.shell() is sandbox.shells[0] is not shell


def test_an_empty_pool_still_gives_and_each_is_given_once(spec: SandboxSpec) -> None:
    with Pool(spec, 1) as pool:
        taken: list[Sandbox] = []
        threads = [threading.Thread(target=lambda: taken.append(pool.take())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds(60))
        assert len({sandbox.pid for sandbox in taken}) == 6
        for number, sandbox in enumerate(taken):
            assert sandbox.shell().run(f"echo {number} > /tmp/mark; cat /tmp/mark").output == f"{number}\n"
        for sandbox in taken:
            sandbox.close()


def test_what_died_while_it_waited_is_not_given(spec: SandboxSpec) -> None:
    with Pool(spec, 2) as pool:
        assert pool.wait_full(seconds(30))
        dead = [sandbox.pid for sandbox in pool._ready]
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        assert gone(dead)
        with pool.take() as sandbox:
            assert sandbox.pid not in dead and sandbox.shell().run("echo on").output == "on\n"


def test_a_killed_launcher_costs_the_pool_nothing_but_time(layer: Path) -> None:
    done = in_a_process(layer, """
with Pool(spec, 2) as pool:
    pool.wait_full(60)
    launcher, waiting = shared(), [os.pidfd_open(sandbox.pid) for sandbox in pool._ready]
    os.kill(launcher.pid, signal.SIGKILL)
    for fd in waiting:
        select.select([fd], [], [], 60)
    for _ in range(3):
        with pool.take() as sandbox:
            print(sandbox.shell().run("echo on").output.strip())
""")
    assert done.stdout.split() == ["on"] * 3, done.stderr


def test_what_keeps_it_from_being_refilled_is_raised_once_and_it_goes_on(spec: SandboxSpec, tmp_path: Path) -> None:
    place = tmp_path / "bound"
    with Pool(dataclasses.replace(spec, binds=(*spec.binds, Bind(str(place), "/opt/bound"))), 1) as pool:
        assert not pool.wait_full(seconds(30))
        with pytest.raises(SandboxError, match="bound"):
            pool.take()
        place.mkdir()
        deadline = seconds(30)
        try:
            pool.take().close()
        except SandboxError:  # the thread had tried once more before the directory was there
            pool.take().close()
        assert pool.wait_full(deadline)
        with pool.take() as sandbox:
            assert sandbox.run("ls -d /opt/bound").output == "/opt/bound\n"


def test_close_ends_what_waits_and_not_what_was_taken(spec: SandboxSpec) -> None:
    pool = Pool(spec, 2)
    assert pool.wait_full(seconds(30))
    with pool.take() as taken:
        waiting = [sandbox.pid for sandbox in pool._ready]
        pool.close()
        pool.close()
        assert gone(waiting)
        assert taken.run("echo on").output == "on\n"
        with pytest.raises(SandboxError, match="the pool is closed"):
            pool.take()
    assert not pool._thread.is_alive()


def test_close_waits_for_the_one_that_is_being_made(spec: SandboxSpec) -> None:
    made: list[int] = []

    class Watched(Pool):
        def _make(self) -> Sandbox:
            sandbox = super()._make()
            made.append(sandbox.pid)
            return sandbox

    for _ in range(5):
        Watched(spec, 3).close()
        assert gone(made)


def test_a_fork_has_a_pool_of_its_own_and_nothing_is_left_at_the_end(layer: Path) -> None:
    done = in_a_process(layer, """
pool = Pool(spec, 2)
pool.wait_full(60)
waiting = {sandbox.pid for sandbox in pool._ready}
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    with pool.take() as sandbox:
        os.write(write, f"{sandbox.pid not in waiting} {sandbox.shell().run('echo on').output}".encode())
    pool.close()
    from skyrl_minisandbox.sandbox import shutdown_launcher
    shutdown_launcher()
    os._exit(0)
os.waitpid(pid, 0)
print(os.read(read, 100).decode().strip(), {sandbox.pid for sandbox in pool._ready} == waiting)
with pool.take() as sandbox:
    print(sandbox.pid in waiting, sandbox.shell().run("echo on").output.strip(), flush=True)
print(*waiting)
""")  # without a close at its end
    *said, pids = done.stdout.splitlines()
    assert said == ["True on True", "True on"], done.stdout + done.stderr
    assert done.stderr == "" and gone([int(pid) for pid in pids.split()])


def test_a_size_below_one_is_no_pool(spec: SandboxSpec) -> None:
    with pytest.raises(ValueError, match="a pool of 0 sandboxes"):
        Pool(spec, 0)


def in_a_process(layer: Path, program: str) -> subprocess.CompletedProcess[str]:
    head = """
import os, select, signal, sys
from pathlib import Path
from skyrl_minisandbox.sandbox import Pool, SandboxSpec
from skyrl_minisandbox.sandbox.client import shared
from tests.sandbox.conftest import base_binds
spec = SandboxSpec((Path(sys.argv[1]),), base_binds(), scratch=Path(sys.argv[1]).parent / "scratch")
"""
    return subprocess.run(
        [sys.executable, "-c", head + program, str(layer)], capture_output=True, text=True, timeout=seconds(120),
        cwd=Path(__file__).resolve().parents[2], check=False,
    )
