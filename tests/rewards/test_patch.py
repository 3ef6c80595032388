"""The patch that we take from a frozen sandbox."""

from __future__ import annotations

import io
import tarfile

import pytest

from skyrl_minisandbox.errors import StoreError
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import grade, patch_from_upper
from skyrl_minisandbox.rewards import patch as patch_module
from skyrl_minisandbox.rewards.agent_tree import read_tree, write_files
from skyrl_minisandbox.rewards.apply import apply_patch
from skyrl_minisandbox.sandbox import Sandbox
from tests.rewards.conftest import Opener
from tests.rewards.test_grade import task

pytestmark = pytest.mark.ci  # the fast tier has five minutes for all rooms


def after(open_sandbox: Opener, script: str) -> str:
    """The patch of an agent that ran this script."""
    with open_sandbox() as agent:
        result = agent.run(script, timeout=60)
        assert result.exit_code == 0, result.output
        return patch_from_upper(agent, open_sandbox, "/srv")


def files(patch: str) -> list[str]:
    return [line.split(" b/", 1)[-1] for line in patch.splitlines() if line.startswith("diff --git")]


def state(open_sandbox: Opener, patch: str, script: str) -> str:
    """What `script` prints once the patch is applied to a fresh sandbox."""
    with open_sandbox() as sandbox:
        applied = apply_patch(sandbox, patch, "/srv")
        assert applied.ok, applied
        return sandbox.run(script, timeout=30).output


def test_nothing_changed_is_the_empty_patch(open_sandbox: Opener) -> None:
    assert after(open_sandbox, "touch keep.txt; cat pkg/a.py; echo x > /tmp/elsewhere") == ""


def test_an_edit_becomes_a_patch_that_grades(open_sandbox: Opener) -> None:
    patch = after(open_sandbox, "sed -i s/one/ONE/ keep.txt")
    assert files(patch) == ["keep.txt"]
    assert grade(task(), patch, open_sandbox).outcome is Outcome.RESOLVED


def test_every_kind_of_change_survives(open_sandbox: Opener) -> None:
    script = (
        "rm -r pkg/deep; rm pkg/a.py; mkdir pkg/a.py; echo in > pkg/a.py/inside; rm link; ln -s /etc/passwd link;"
        "printf '\\000\\002other' > data.bin; chmod 755 pkg/b.py; printf 'caf\\351' > latin.txt; mkdir -p new/er;"
        "echo x > new/er/file; echo > 'with space'; echo > \"$(printf 'new\\nline')\"; printf 'no newline' > end"
    )
    patch = after(open_sandbox, script)
    look = "ls -A . pkg pkg/a.py new/er; readlink link; od -c data.bin latin.txt end; stat -c %a pkg/b.py"
    with open_sandbox() as agent:
        agent.run(script, timeout=30)
        expected = agent.run(look, timeout=30).output
    assert state(open_sandbox, patch, look) == expected
    assert "deleted file mode 100644" in patch


def test_a_directory_replaced_by_a_file_and_one_removed_and_made_anew(open_sandbox: Opener) -> None:
    patch = after(open_sandbox, "rm -r pkg && mkdir pkg && echo new > pkg/b.py; rm -r tests && echo file > tests")
    assert (
        state(open_sandbox, patch, "find pkg tests | sort; cat pkg/b.py tests") == "pkg\npkg/b.py\ntests\nnew\nfile\n"
    )


def test_the_workdir_emptied_keeps_the_repository(open_sandbox: Opener) -> None:
    patch = after(open_sandbox, "find . -mindepth 1 -delete; cd /; rmdir /srv; mkdir /srv; echo x > /srv/only")
    assert state(open_sandbox, patch, "ls -A") == ".git\nonly\n"


def test_the_workdir_removed_deletes_every_file(open_sandbox: Opener) -> None:
    patch = after(open_sandbox, "cd / && rm -rf /srv")
    assert state(open_sandbox, patch, "ls -A") == ".git\n"


class TestTheAgentsGitNeverRuns:
    def test_its_hooks_configuration_index_and_commits_mean_nothing(self, open_sandbox: Opener) -> None:
        marker = "/srv/ran"
        patch = after(
            open_sandbox,
            "for hook in pre-commit post-index-change post-checkout; do "
            f"printf '#!/bin/sh\\ntouch {marker}' > .git/hooks/$hook;"
            f"chmod +x .git/hooks/$hook; done; git config core.fsmonitor 'touch {marker}; false';"
            f"git config diff.external 'touch {marker}'; git config filter.evil.clean 'touch {marker}; cat';"
            f"git config diff.evil.textconv 'touch {marker}; cat';"
            "printf '*.txt filter=evil diff=evil\\n' > .gitattributes; sed -i s/one/ONE/ keep.txt;"
            "git update-index --assume-unchanged keep.txt; git rm -q --cached pkg/b.py;"
            "git -c core.hooksPath=/dev/null -c user.name=a -c user.email=a@b commit -q -m hidden; rm -f ran",
        )
        assert files(patch) == [".gitattributes", "keep.txt"]
        assert "+ONE" in patch

    def test_a_repository_inside_is_taken_as_files(self, open_sandbox: Opener) -> None:
        patch = after(open_sandbox, "mkdir sub && cd sub && git init -q . && echo x > file && git add -A")
        assert files(patch) == ["sub/file"]


def test_byte_code_and_caches_are_left_out_unless_tracked(open_sandbox: Opener) -> None:
    script = (
        "mkdir -p pkg/__pycache__ .pytest_cache build; echo > pkg/__pycache__/a.cpython-311.pyc; echo > x.pyc;"
        "echo > .pytest_cache/v; echo > build/out; echo changed > pkg/tracked.pyc; echo > real.py"
    )
    assert files(after(open_sandbox, script)) == ["pkg/tracked.pyc", "real.py"]


def test_pipes_sockets_and_links_out_of_the_tree_do_not_hurt(open_sandbox: Opener) -> None:
    script = (
        "mkfifo pipe; rm pkg/b.py; mkfifo pkg/b.py; ln -s / root; ln -s ../../../etc up; ln -s loop loop;"
        "ln keep.txt hard; echo more >> hard; rm -r pkg/deep; ln -s /etc pkg/deep;"
        'bash -c \'exec python3 -c "import socket; socket.socket(socket.AF_UNIX).bind(\\"s\\")"\' 2>/dev/null; true'
    )
    patch = after(open_sandbox, script)
    assert set(files(patch)) == {"hard", "keep.txt", "loop", "pkg/b.py", "pkg/deep", "pkg/deep/c.py", "root", "up"}
    assert state(open_sandbox, patch, "readlink root up pkg/deep; tail -1 hard; ls pkg") == (
        "/\n../../../etc\n/etc\nmore\na.py\ndeep\ntracked.pyc\n"
    )


def test_an_unreadable_tree_is_read_all_the_same(open_sandbox: Opener) -> None:
    patch = after(open_sandbox, "mkdir dark && echo x > dark/file && chmod 000 dark/file dark pkg/a.py && echo y > end")
    assert files(patch) == ["dark/file", "end"]


def test_a_tree_larger_than_allowed_is_the_empty_patch(open_sandbox: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    assert after(open_sandbox, "sed -i s/one/ONE/ keep.txt; truncate -s 1T sparse") == ""


def test_a_patch_larger_than_allowed_has_only_tracked_files(
    open_sandbox: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_module, "LARGEST_PATCH", 100_000)
    patch = after(open_sandbox, "sed -i s/one/ONE/ keep.txt; head -c 200000 /dev/urandom > big")
    assert files(patch) == ["keep.txt"]


def layer(*members: tuple[str, bytes, dict[str, object]]) -> io.BytesIO:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, data, more in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in more.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    raw.seek(0)
    return raw


def test_only_what_git_could_see_is_taken() -> None:
    members: tuple[tuple[str, bytes, dict[str, object]], ...] = (
        ("testbed/a", b"1", {}),
        ("testbed/.git/config", b"evil", {}),
        ("testbed/.GIT/config", b"evil", {}),
        ("testbed/sub/.git", b"gitdir: /evil", {}),
        ("testbed/../etc/passwd", b"evil", {}),
        ("/testbed/b", b"22", {}),
        ("testbedding/c", b"3", {}),
        ("testbed/device", b"", {"type": tarfile.CHRTYPE}),
        ("testbed/pipe", b"", {"type": tarfile.FIFOTYPE}),
        ("testbed/hard", b"", {"type": tarfile.LNKTYPE, "linkname": "testbed/a"}),
        ("testbed/out", b"", {"type": tarfile.LNKTYPE, "linkname": "etc/shadow"}),
        ("testbed/.gitmodules", b"", {"type": tarfile.SYMTYPE, "linkname": "x"}),
        ("testbed/.wh.gone", b"", {}),
        ("testbed/.wh..git", b"", {}),
        ("testbed/dir/.wh..wh..opq", b"", {}),
        ("testbed/dir", b"", {"type": tarfile.DIRTYPE}),
    )
    tree = read_tree(layer(*members), "testbed")
    assert (tree.files, tree.links, tree.directories) == ({"a": 1, "b": 2, "hard": 1}, {"hard": "a"}, ["dir"])
    assert {"gone", "dir", "pipe", "a"} <= set(tree.gone)
    assert ".git" not in tree.gone
    assert not tree.cleared
    copy = io.BytesIO()
    write_files(layer(*members), copy, tree, ["hard"], "testbed")
    copy.seek(0)
    with tarfile.open(fileobj=copy) as tar:
        assert tar.getnames() == ["a", "hard"]


def test_an_opaque_or_removed_workdir_is_told() -> None:
    assert read_tree(layer(("testbed/.wh..wh..opq", b"", {})), "testbed").cleared
    assert read_tree(layer((".wh.testbed", b"", {})), "testbed").cleared
    assert read_tree(layer(("testbed", b"a file", {})), "testbed").cleared


@pytest.mark.ci
@pytest.mark.parametrize(
    "script",
    [
        "i=0; while echo x > pkg/$i; do i=$((i+1)); done 2>/dev/null; true",  # as many as the disk takes
        "truncate -s 900M sparse",  # more than the disk of the sandbox that it is laid into
        "python3 -c \"import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\"",
        pytest.param("mkdir many; cd many; seq 250000 | xargs touch 2>/dev/null; true", marks=pytest.mark.night),
    ],
    ids=["full", "sparse", "deep", "many"],
)
def test_a_tree_that_cannot_be_compared_is_no_fault_of_ours(open_sandbox: Opener, script: str) -> None:
    """Else an agent could have its row masked instead of scored."""
    assert isinstance(after(open_sandbox, script), str)


@pytest.mark.parametrize("damage", ["rm -rf .git/objects", "cd /; rm -rf srv"])
def test_a_damaged_image_is_no_empty_patch(open_sandbox: Opener, damage: str) -> None:
    def damaged() -> Sandbox:
        sandbox = open_sandbox()
        sandbox.run(damage)
        return sandbox

    with open_sandbox() as agent:
        agent.run("sed -i s/one/ONE/ keep.txt")
        with pytest.raises(StoreError, match="damaged"):
            patch_from_upper(agent, damaged, "/srv")


def test_a_missing_workdir_is_no_patch_that_failed(open_sandbox: Opener) -> None:
    def damaged() -> Sandbox:
        sandbox = open_sandbox()
        sandbox.run("cd /; rm -rf srv")
        return sandbox

    patch = after(open_sandbox, "sed -i s/one/ONE/ keep.txt")
    with pytest.raises(StoreError, match="damaged"):
        grade(task(), patch, damaged)
