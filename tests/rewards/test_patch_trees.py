"""Whatever an agent leaves behind, its patch on a fresh image gives the same files."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from skyrl_minisandbox.rewards.apply import apply_patch
from skyrl_minisandbox.rewards.patch import take_patch
from skyrl_minisandbox.sandbox import Sandbox
from tests.rewards.conftest import RECIPE, Opener, sandboxes

WORKDIR = "/srv"
_GIT = "git -c user.name=test -c user.email=test@example.invalid -c protocol.file.allow=always"

# Every file and link that git could see, with what git keeps of it.
LOOK = """
import hashlib, os, sys
found = []
for top, directories, names in os.walk(b"."):
    directories[:] = [name for name in directories if name.lower() != b".git"]
    for name in names + [name for name in directories if os.path.islink(os.path.join(top, name))]:
        path = os.path.join(top, name)
        if os.path.islink(path):
            found.append((path, b"link", os.readlink(path)))
        elif os.path.isfile(path) and name.lower() != b".git":
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest().encode()
            found.append((path, b"x" if os.stat(path).st_mode & 0o100 else b"-", digest))
sys.stdout.buffer.write(b"\\0".join(b"\\t".join(entry) for entry in sorted(found)))
"""

ACT = """
import json, os, shutil, sys
for verb, path, *more in json.load(sys.stdin):
    path, more = path.encode("latin-1"), [word.encode("latin-1") for word in more]
    try:
        if verb == "write":
            with open(path, "wb") as file: file.write(more[0])
        elif verb == "append":
            with open(path, "ab") as file: file.write(more[0])
        elif verb == "remove":
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
        elif verb == "directory": os.makedirs(path)
        elif verb == "link": os.symlink(more[0], path)
        elif verb == "hard": os.link(path, more[0])
        elif verb == "move": os.rename(path, more[0])
        elif verb == "mode": os.chmod(path, int(more[0], 8))
    except OSError:
        pass
"""


@pytest.fixture(scope="module")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    directory = tmp_path_factory.mktemp("trees")
    with sandboxes(RECIPE, directory / "store", directory / "cache") as make:
        yield make


def look(sandbox: Sandbox) -> list[bytes]:
    result = sandbox.run(["python3", "-c", LOOK], cwd=WORKDIR, timeout=60)
    assert result.exit_code == 0, result.output
    return result.stdout.split(b"\0")


def same_tree(opener: Opener, agent: Sandbox) -> str:
    """The patch of an agent's sandbox, after it was seen to give the agent's files."""
    wanted = look(agent)
    taken = take_patch(agent, opener, WORKDIR)
    assert taken.left_out == ""
    with opener() as fresh:
        if taken.patch:
            applied = apply_patch(fresh, taken.patch, WORKDIR)
            assert applied.ok, (applied, taken.patch)
        assert look(fresh) == wanted, taken.patch
    return taken.patch


NAMES = st.sampled_from(
    [
        "keep.txt", "pkg", "pkg/a.py", "pkg/b.py", "pkg/deep", "pkg/deep/c.py", "pkg/deep/new", "link", "link/below",
        "data.bin", "tests/check.sh", "new", "new/er", "new/er/file", "a b", "tab\tquote\"", "new\nline", "caf\xe9",
        "-dash", ":(top)x", "*", "?", "[a]", "\\back", "git~1", ".gitmodules", "x ", "~", "#", "!not", ".gitattributes",
        "pkg/.gitattributes", "\x01\x7f", "a/", "b/keep.txt", "dev/null", "\xff\xfe", ".GITignore", "con", "a:b",
    ]
)  # fmt: skip
CONTENTS = st.one_of(
    st.sampled_from(
        [
            "", "\n", "one\ntwo\nthree\n", "one\ntwo\nthree", "one\r\ntwo\r\nthree\r\n", "one\r\ntwo\nthree\r", "\0\1",
            "caf\xe9\n", "\xff\xfea\0b\0", "\\ No newline at end of file\n", "--- a/x\n+++ b/x\n@@ -1 +1 @@\n",
            "* text eol=crlf ident filter=evil diff=evil working-tree-encoding=UTF-16\n", "* text=auto\n*.py binary\n",
            "$Id$\n$Id: 0123 $\n", "x" * 5000, "GIT binary patch\nliteral 1\n", " \n\t\n \r\n", "-- \n2.39\n",
        ]
    ),
    st.binary(max_size=40).map(lambda data: data.decode("latin-1")),
)  # fmt: skip
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "append"]), NAMES, CONTENTS),
        st.tuples(st.sampled_from(["remove", "directory"]), NAMES),
        st.tuples(st.just("link"), NAMES, st.sampled_from(["keep.txt", "/etc", "..", "nowhere", "caf\xe9", "pkg"])),
        st.tuples(st.sampled_from(["hard", "move"]), NAMES, NAMES),
        st.tuples(st.just("mode"), NAMES, st.sampled_from(["755", "644", "000", "4777"])),
    ),
    max_size=12,
)


@pytest.mark.ci
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(ACTIONS)
@example([("remove", "link"), ("directory", "link"), ("write", "link/below", "x")])
@example([("remove", "pkg"), ("link", "pkg", "/etc")])
@example([("write", ".gitattributes", "* text eol=crlf ident\n"), ("write", "new", "one\n$Id$\r\n")])
@example([("write", "git~1", "x"), ("write", ":(top)x", "y"), ("link", ".gitattributes", "/etc/passwd")])
def test_the_patch_of_any_tree_gives_that_tree(opener: Opener, actions: list[tuple[str, ...]]) -> None:
    with opener() as agent:
        agent.run(["python3", "-c", ACT], input=json.dumps(actions).encode(), cwd=WORKDIR, timeout=60)
        if b"./.gitmodules\tlink" in b"\0".join(look(agent)):
            return  # git refuses such a link, so no patch can bring it
        same_tree(opener, agent)


def test_some_trees_of_every_kind(opener: Opener) -> None:
    """The same promise for the fast tier: one agent that does a bit of all."""
    actions = [
        ("remove", "link"), ("directory", "link"), ("write", "link/below", "x"), ("remove", "pkg/deep"),
        ("link", "pkg/deep", "/etc"), ("write", ".gitattributes", "* text eol=crlf ident filter=evil -diff\n"),
        ("write", "new", "one\n$Id$\r\n"), ("append", "keep.txt", "\r\nno newline"), ("write", "git~1", "x"),
        ("write", ":(top)x", "y"), ("write", "*", ""), ("write", "new\nline\t\"", "z"), ("write", "caf\xe9", "\xe9"),
        ("mode", "pkg/b.py", "755"), ("move", "pkg/a.py", "moved.py"), ("hard", "data.bin", "hard"),
        ("append", "data.bin", "\0\xff"), ("remove", "tests/check.sh"), ("directory", "tests/check.sh"),
        ("write", "tests/check.sh/in", "a"),
    ]  # fmt: skip
    with opener() as agent:
        agent.run(["python3", "-c", ACT], input=json.dumps(actions).encode(), cwd=WORKDIR, timeout=60)
        patch = same_tree(opener, agent)
    assert patch.count("diff --git ") >= 18


_UNTIDY = f"""
printf 'build/\n*.so\n' > .gitignore && git add .gitignore && {_GIT} commit -q -m ignore
mkdir build && echo made > build/out && echo lib > pkg/x.so && echo stray > stray && echo ONE >> keep.txt
printf 'one\r\ntwo\r\n' > crlf.txt && printf 'crlf.txt text\n' > .gitattributes
git init -q /tmp/sub && cd /tmp/sub && echo inner > inner && git add -A && {_GIT} commit -q -m inner
cd /srv && {_GIT} submodule add -q /tmp/sub sub && {_GIT} commit -q -m sub && rm -rf /tmp/sub
"""
UNTIDY = RECIPE.model_copy(update={"commands": (*RECIPE.commands, _UNTIDY)})
"""Its work tree is not its HEAD, as in images of SWE-bench: built files, changed and stray ones, a submodule."""


@pytest.fixture(scope="module")
def untidy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    directory = tmp_path_factory.mktemp("untidy")
    with sandboxes(UNTIDY, directory / "store", directory / "cache") as make:
        yield make


def changed(patch: str) -> list[str]:
    return [line.split(" b/", 1)[-1] for line in patch.splitlines() if line.startswith("diff --git")]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("script", "paths"),
    [
        ("touch keep.txt stray", []),
        ("echo more >> pkg/a.py", ["pkg/a.py"]),
        ("echo more >> keep.txt; echo more >> crlf.txt; echo more >> stray", ["crlf.txt", "keep.txt", "stray"]),
        ("rm stray", ["stray"]),
        ("echo new > sub/inner; echo x > sub/more", ["sub/inner", "sub/more"]),
        ("cd sub && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x; rm .git; git init -q .", []),
        ("rm -rf sub", ["sub/inner"]),
        ("echo new > build/out; echo x > build/more; rm pkg/x.so", []),
        ("echo '!*.so' >> .gitignore; echo '*.log' >> .gitignore; echo new > pkg/x.so; echo x > a.log; echo y > y.so",
         [".gitignore", "pkg/x.so", "y.so"]),
        ("rm -rf build; echo file > build", ["build", "build/out"]),
        ("rm pkg/x.so; mkdir pkg/x.so; echo a > pkg/x.so/a.py; git add -f pkg/x.so", []),
        ("printf 'build/\\n' > .gitignore; rm pkg/x.so; mkdir pkg/x.so; echo a > pkg/x.so/a.py",
         [".gitignore", "pkg/x.so", "pkg/x.so/a.py"]),
    ],
    ids=["nothing", "other", "same", "stray", "submodule", "its-git", "no-submodule", "ignored", "rules", "to-file",
         "to-ignored", "to-directory"],
)  # fmt: skip
def test_an_untidy_image_is_compared_as_it_is(untidy: Opener, script: str, paths: list[str]) -> None:
    with untidy() as agent:
        result = agent.run(script, cwd=WORKDIR, timeout=60)
        assert result.exit_code == 0, result.output
        patch = take_patch(agent, untidy, WORKDIR).patch
    assert changed(patch) == paths
    if patch:
        with untidy() as fresh:
            assert apply_patch(fresh, patch, WORKDIR).ok


EVIL = "#!/bin/sh\ntouch /srv/ran /tmp/ran\ncat\n"


@pytest.mark.ci
@pytest.mark.parametrize(
    "script",
    [
        "printf '*.txt filter=evil diff=evil\\n' > .git/info/attributes; git config filter.evil.clean /srv/e;"
        "git config filter.evil.process /srv/e; git config filter.evil.required true",
        "git config diff.external /srv/e; echo 'GIT_EXTERNAL_DIFF=/srv/e' >> /etc/environment;"
        "echo 'export GIT_EXTERNAL_DIFF=/srv/e' >> /root/.bashrc",
        "git config core.fsmonitor /srv/e; git config core.hooksPath /srv; cp e .git/hooks/post-index-change",
        "printf '[filter \"evil\"]\\nclean = /srv/e\\n[core]\\nfsmonitor = /srv/e\\n' > /root/.gitconfig;"
        "cp /root/.gitconfig /etc/gitconfig; git config include.path /root/.gitconfig",
        "mv .git /tmp/elsewhere; echo 'gitdir: /tmp/elsewhere' > .git",
        "rm -r .git; ln -s /etc .git",
        "rm -rf .git; mkfifo .git",
        "git config core.worktree /etc; git config core.bare true",
        "mkdir -p /tmp/o; echo /tmp/o > .git/objects/info/alternates; rm -rf .git/refs .git/HEAD",
        "git config core.excludesFile /srv/all; git config core.attributesFile /srv/e; mkdir -p /root/.config/git;"
        "echo '*' > /root/.config/git/ignore; echo '*' > .git/info/exclude",
        "git update-index --assume-unchanged keep.txt; git update-index --skip-worktree keep.txt;"
        "git config core.sparseCheckout true; echo '/pkg' > .git/info/sparse-checkout",
        "git add -A; git -c user.name=a -c user.email=a@b commit -q -m mine;"
        "git update-ref refs/replace/$(git rev-parse HEAD:keep.txt) $(git rev-parse HEAD:pkg/a.py)",
        "mkdir -p /usr/local/bin; cp e /usr/local/bin/git; cp e /usr/local/bin/tar; cp e /usr/local/bin/bash",
    ],
    ids=["filter", "external", "monitor", "global", "file", "link", "pipe", "worktree", "alternates", "ignore", "flags",
         "commit", "path"],
)  # fmt: skip
def test_the_agents_repository_has_no_say(opener: Opener, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that it set up runs, and its change is in the patch all the same."""
    found: list[str] = []
    close = Sandbox.close

    def looked(sandbox: Sandbox) -> None:
        if not found:
            found.append(sandbox.run("ls /srv/ran /tmp/ran 2>/dev/null").output)
        close(sandbox)

    def with_the_program() -> Sandbox:
        fresh = opener()
        fresh.write_file("/srv/e", EVIL.encode(), mode=0o755)
        return fresh

    with opener() as agent:
        agent.write_file("/srv/e", EVIL.encode(), mode=0o755)
        agent.run(script, cwd=WORKDIR, timeout=60)
        agent.run(["sed", "-i", "s/one/ONE/", "keep.txt"], cwd=WORKDIR, timeout=60)
        agent.run(["rm", "-f", "ran"], cwd=WORKDIR, timeout=60)
        with monkeypatch.context() as patched:
            patched.setattr(Sandbox, "close", looked)
            patch = take_patch(agent, with_the_program, WORKDIR).patch
    assert changed(patch) == ["keep.txt"]
    assert found == [""]


def test_a_wide_tree_loses_its_largest_untracked_files_and_says_so(opener: Opener) -> None:
    with opener() as agent:
        agent.run("sed -i s/one/ONE/ keep.txt; echo fix > fix.py; mkdir out; truncate -s 40M out/large", cwd=WORKDIR)
        taken = take_patch(agent, opener, WORKDIR)
    assert changed(taken.patch) == ["fix.py", "keep.txt"]
    assert taken.left_out == ("1 untracked file of 40960 KiB, the largest 'out/large': a patch has at most 32 MiB")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    directory = tmp_path_factory.mktemp("roomy")
    with sandboxes(RECIPE, directory / "store", directory / "cache", disk=1 << 30, memory=3 << 30) as make:
        yield make


@pytest.mark.ci
@pytest.mark.parametrize("where", ["build", "out"])
def test_an_untracked_build_directory_of_200_megabytes_does_not_cost_the_fix(roomy: Opener, where: str) -> None:
    """`build/` is ignored by the image, `out/` is not."""
    script = (
        f"mkdir {where}; cd {where}; head -c 80000 /dev/urandom > 0; for i in $(seq 2499); do cp 0 $i; done; cd ..;"
        "sed -i s/one/ONE/ keep.txt; echo fix > fix.py"
    )
    with roomy() as agent:
        assert agent.run(script, cwd=WORKDIR, timeout=120).exit_code == 0
        taken = take_patch(agent, roomy, WORKDIR)
    paths = [path for path in changed(taken.patch) if not path.startswith("out/")]
    assert paths == ["fix.py", "keep.txt"]
    assert (where == "out") == ("untracked files" in taken.left_out)
    assert len(taken.patch) <= 32 << 20
    with roomy() as fresh:
        assert apply_patch(fresh, taken.patch, WORKDIR).ok


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["text", "binary"])
def test_a_patch_of_20_megabytes_comes_through(roomy: Opener, kind: str) -> None:
    make = {
        "text": "base64 -w 80 /dev/urandom | head -c 20M > keep.txt",
        "binary": "head -c 20M /dev/urandom > data.bin",
    }
    with roomy() as agent:
        agent.run(make[kind], cwd=WORKDIR, timeout=120)
        assert len(same_tree(roomy, agent)) > 20 << 20
