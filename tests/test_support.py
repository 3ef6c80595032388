"""The ground that other tests stand on."""

from __future__ import annotations

import os
import pwd
import sys

import pytest

from tests import machine, support
from tests.support import needs


def test_a_need_that_must_run_fails_instead_of_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "lacks", lambda name: "it is not here")
    monkeypatch.setenv("MINISANDBOX_MUST_RUN", "cgroup")
    with pytest.raises(pytest.skip.Exception, match="needs overlay: it is not here"):
        support.require("overlay")
    with pytest.raises(pytest.fail.Exception, match="cgroup is in MINISANDBOX_MUST_RUN: it is not here"):
        support.require("cgroup")


def test_an_unknown_need_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown need `roots`"):
        needs("roots")


@needs("root", "rootless")
def test_an_ordinary_user_has_our_python_and_packages_and_is_gone_afterwards() -> None:
    with support.ordinary_user() as user:
        program = "import skyrl_minisandbox, pydantic, os, sys; print(os.getuid(), os.getcwd(), sys.version)"
        done = user.run([user.python, "-c", program], check=True)
        assert done.stdout.strip() == f"{user.uid} {user.home} {sys.version}"
        user.popen(["sleep", "300"], start_new_session=True).poll()
        uid, home = user.uid, user.home
    assert not home.exists()
    assert not [p for p in machine.living_processes().values() if p.uid == uid]
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)
    assert os.getuid() == 0
