"""A recipe becomes an image: each step once, nothing of the building machine in it, and failures say where."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from skyrl_minisandbox.errors import BuildError, InputError, MachineError
from skyrl_minisandbox.images.build import build_image
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.image import Image
from skyrl_minisandbox.images.pip_config import PipConfig
from skyrl_minisandbox.images.recipe import GitCommit, Recipe
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.images.store import Store
from tests.images.conftest import Local, local_recipe, output
from tests.support import needs

pytestmark = needs("overlay", "git")


def test_a_recipe_becomes_an_image_that_works(local: Local, tmp_path: Path) -> None:
    local = dataclasses.replace(local, store=Store(tmp_path / "store"), cache=Cache(tmp_path / "cache"))
    recipe = local_recipe(local.index, "echo built > made.txt && python -c 'import tinylib'")
    told: list[str] = []
    image = local.build(recipe, progress=told.append, name="tiny-1")
    assert [word for word in told if not word.startswith("python")] == [
        "base host",
        "packages",
        "repository",
        "command 1/1",
    ]
    assert image.name == "tiny-1" and image.workdir == "/testbed" and image.recipe == recipe.digest()
    assert local.output(image, "pwd; cat made.txt; python -c 'import tinydep; print(tinydep.ANSWER)'") == (
        "/testbed\nbuilt\n42\n"
    )
    assert local.output(image, "command -v python pip").split() == ["/opt/env/bin/python", "/opt/env/bin/pip"]
    unchecked = (
        "import glob; print({open(p, 'rb').read(8)[4] for p in glob.glob('/opt/env/lib/**/*.pyc', recursive=True)})"
    )
    assert local.output(image, f'python -c "{unchecked}"') == "{1}\n"
    assert local.output(image, "find / -xdev -name '*.pyc' -path '*testbed*'; ls -A /root /tmp /run") == (
        "/root:\n\n/run:\n\n/tmp:\n"
    )
    assert "tinydep==1.0" in image.lock["packages"] and image.lock["repository"]["version"] == "0.1"
    assert image.lock["base"]["kind"] == "host" and image.lock["python"].startswith("3.")

    told.clear()
    asked = len(local.index.seen)
    assert local.build(recipe, progress=told.append) == image
    assert told == [] and len(local.index.seen) == asked


def test_the_repository_is_one_commit_without_remotes_tags_or_reflogs(local: Local) -> None:
    image = local.build(local_recipe(local.index))
    told = local.output(
        image,
        "git rev-list --all --count; git status --porcelain; git remote; git tag; ls .git; git fsck --unreachable; "
        "git log --format='%an %ad' --date=iso; git reflog; stat -c '%u %g %Y' tinylib.py; git ls-files",
    ).splitlines()
    assert told[0] == "1" and "logs" not in told and "hooks" not in told
    assert "minisandbox 2020-01-01 00:00:00 +0000" in told and "0 0 1577836800" in told
    assert [name for name in told if name in ("tinylib.py", ".gitignore", "PKG-INFO")] == [
        ".gitignore",
        "PKG-INFO",
        "tinylib.py",
    ]


def test_an_unchanged_prefix_is_not_built_again(local: Local) -> None:
    one = local.build(local_recipe(local.index, "echo 1 > a"))
    told: list[str] = []
    asked = len(local.index.seen)
    two = local.build(
        local_recipe(local.index, "echo 1 > a", "echo 2 > b"),
        progress=told.append,
    )
    assert told == ["command 2/2"] and two.layers[:-1] == tuple(
        layer.__class__(layer.digest, layer.diff_id, layer.size, other.name)
        for layer, other in zip(one.layers, two.layers, strict=False)
    )
    assert len(local.index.seen) == asked


def test_a_build_is_reproducible_and_holds_nothing_of_where_it_was_built(local: Local, tmp_path: Path) -> None:
    recipe = local_recipe(local.index, "date > /tmp/x; mkdir -p d && echo text > d/file")
    elsewhere = dataclasses.replace(local, store=Store(tmp_path / "store"), cache=Cache(tmp_path / "cache"))
    one, two = local.build(recipe, name="tiny"), elsewhere.build(recipe, name="tiny")
    assert [layer.diff_id for layer in one.layers] == [layer.diff_id for layer in two.layers]
    assert one.digest == two.digest
    for layer in two.layers:
        data = zstandard.ZstdDecompressor().decompressobj().decompress(elsewhere.store.blob(layer).read_bytes())
        assert str(tmp_path).encode() not in data and local.index.url.encode() not in data


def test_a_failing_step_is_named_and_its_log_is_kept(local: Local) -> None:
    recipe = local_recipe(local.index, "true", "echo one; echo the reason >&2; exit 7")
    with pytest.raises(BuildError) as caught:
        local.build(recipe, name="tiny-1")
    assert caught.value.message == "building image tiny-1: step `command 2/2` failed (exit code 7)\n  one\n  the reason"
    log = Path(caught.value.hint.removeprefix("the whole log is "))
    assert log.parent == local.store.path / "logs" and "the reason" in log.read_text()
    assert local.store.find(recipe.digest()) is None
    assert list((local.cache.path / "aside").iterdir()) == [] and list((local.store.path / "aside").iterdir()) == []


def test_a_package_version_that_does_not_exist_is_told_with_its_log(local: Local) -> None:
    recipe = local_recipe(local.index)
    recipe = recipe.model_copy(update={"packages": (*recipe.packages[1:], "tinydep==9.9")})
    with pytest.raises(BuildError, match=r"step `packages` failed") as caught:
        local.build(recipe)
    assert "No matching distribution found for tinydep==9.9" in caught.value.message


def test_credentials_of_the_index_are_in_no_log_no_layer_and_no_argument(local: Local, tmp_path: Path) -> None:
    url = local.index.url.replace("http://", "http://someone:hunter2secret@")
    private = Sources(tmp_path / "private", PipConfig(index_urls=(url,)))
    local = dataclasses.replace(
        local, store=Store(tmp_path / "store"), cache=Cache(tmp_path / "cache"), sources=private
    )
    recipe = local_recipe(local.index, "echo $PIP_INDEX_URL; tr '\\0' ' ' < /proc/self/cmdline; pip -v download x-y")
    with pytest.raises(BuildError) as caught:
        local.build(recipe)
    assert any(header for _, header in local.index.seen)  # it was used
    assert "hunter2secret" not in caught.value.render()
    kept = [path for path in [*local.store.path.rglob("*"), *(local.cache.path / "l").rglob("*")] if path.is_file()]
    for path in kept:
        data = path.read_bytes()
        if data[:4] == b"\x28\xb5\x2f\xfd":
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        assert b"hunter2secret" not in data, path


def test_an_image_can_be_built_without_any_python(store: Store, cache: Cache) -> None:
    image = build_image(Recipe(commands=("echo hello > greeting",)), store=store, cache=cache)
    assert output(image, store, cache, "cat /testbed/greeting; ls /opt") == "hello\n"
    assert [layer.name for layer in image.layers] == ["base host", "command 1/1"]


def test_an_unknown_base_and_system_packages_on_the_host_are_the_users_input(store: Store, cache: Cache) -> None:
    with pytest.raises(InputError, match="no base `arch`"):
        build_image(Recipe(base="arch"), store=store, cache=cache)
    with pytest.raises(InputError, match="cannot hold system packages"):
        build_image(Recipe(system_packages=("graphviz",)), store=store, cache=cache)


def test_two_threads_build_one_recipe_once(local: Local) -> None:
    recipe = Recipe(commands=("sleep 0.3; date > /tmp/x; echo threads > made",))
    images: list[Image] = []
    told: list[str] = []
    threads = [
        threading.Thread(target=lambda: images.append(local.build(recipe, progress=told.append))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(images) == 2 and images[0] == images[1]
    assert len(told) == len(set(told)) and "command 1/1" in told


BUILD = """
import sys
from skyrl_minisandbox.images.build import build_image
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.images.store import Store
recipe = Recipe(commands=("sleep 0.5; echo hello > greeting",))
store, cache = Store(sys.argv[1]), Cache(sys.argv[2])
image = build_image(recipe, store=store, cache=cache, progress=lambda word: print(word, flush=True))
print(image.digest)
"""


def test_two_processes_build_one_recipe_once(store: Store, cache: Cache) -> None:
    command = [sys.executable, "-c", BUILD, str(store.path), str(cache.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert sorted(map(len, outputs)) == [1, 3] and outputs[0][-1] == outputs[1][-1]


def test_a_layer_that_rotted_in_the_store_is_made_anew_by_the_next_build(store: Store, tmp_path: Path) -> None:
    recipe = Recipe(commands=("echo 1 > a", "echo 2 > b"))
    image = build_image(recipe, store=store, cache=Cache(tmp_path / "one"))
    rotten = store.blob(image.layers[1])
    rotten.write_bytes(rotten.read_bytes()[:-2] + b"xx")
    store.drop_blob(image.layers[2].digest)  # so that the build has to stand on the rotten one
    again = build_image(recipe, store=store, cache=Cache(tmp_path / "two"))
    assert again == image
    assert output(again, store, Cache(tmp_path / "two"), "cat /testbed/a /testbed/b") == "1\n2\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with a past, a future, a tag, and traps for whoever exports it."""
    path = tmp_path / "clones/owner__project"
    path.mkdir(parents=True)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.invalid", "-c", "init.defaultBranch=main"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=path, check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    git("init", "-q")
    for number, text in enumerate(("past", "present", "future")):
        (path / "file.txt").write_text(text)
        (path / ".gitignore").write_text("ignored.txt\n")
        (path / ".gitattributes").write_text("file.txt export-ignore\nsmudged.txt filter=trap\n")
        (path / "ignored.txt").write_text("tracked all the same")
        (path / "smudged.txt").write_text("plain")
        git("add", "-f", "-A")
        git("commit", "-q", "-m", text)
        git("tag", f"v{number}")
    trap = tmp_path / "trapped"
    git("config", "filter.trap.smudge", f"touch {trap}; cat")
    for hook in ("post-checkout", "pre-commit", "post-index-change"):
        (path / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch {trap}\n")
        (path / ".git/hooks" / hook).chmod(0o755)
    return path


def test_a_commit_of_a_clone_comes_whole_and_without_past_future_or_traps(
    clone: Path, store: Store, cache: Cache, tmp_path: Path
) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "v1"], cwd=clone, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
    recipe = Recipe(repository=GitCommit(repo="owner/project", commit=commit, clone=str(clone)))
    image = build_image(recipe, store=store, cache=cache)
    told = output(
        image,
        store,
        cache,
        "cat file.txt; echo; git ls-files; git status --porcelain; git rev-list --all --count; git tag; git branch -r; "
        "git cat-file --batch-all-objects --batch-check='%(objecttype)' | sort | uniq -c | tr -s ' '",
    ).splitlines()
    assert told == [
        "present",
        ".gitattributes",
        ".gitignore",
        "file.txt",
        "ignored.txt",
        "smudged.txt",
        "1",
        " 5 blob",
        " 1 commit",
        " 1 tree",
    ]
    assert not (tmp_path / "trapped").exists()
    assert json.dumps(image.lock["repository"], sort_keys=True) == json.dumps(
        {"commit": commit, "git": "owner/project"}
    )


def test_a_clone_that_is_missing_or_lacks_the_commit_is_the_users_input(
    clone: Path, store: Store, cache: Cache, tmp_path: Path
) -> None:
    recipe = Recipe(repository=GitCommit(repo="owner/project", commit="0" * 40, clone=str(clone)))
    with pytest.raises(InputError, match=rf"{clone} of owner/project cannot give commit 0000"):
        build_image(recipe, store=store, cache=cache)
    recipe = Recipe(repository=GitCommit(repo="owner/project", commit="0" * 40, clone=str(tmp_path / "none")))
    with pytest.raises(InputError, match="no local clone") as caught:
        build_image(recipe, store=store, cache=cache)
    assert "tasks.repos=DIR" in caught.value.hint


@needs("root")
def test_a_disk_that_fills_up_while_a_step_runs_is_the_machines_fault(
    mounted: Callable[..., Path], store: Store
) -> None:
    cache = Cache(mounted("tmpfs", "size=24m") / "cache")
    recipe = Recipe(commands=("head -c 64M /dev/zero > /testbed/big",))
    with pytest.raises(MachineError, match="no room left") as caught:
        build_image(recipe, store=store, cache=cache)
    assert str(cache.path) in caught.value.message and "images.cache=DIR" in caught.value.hint
    assert list((cache.path / "aside").iterdir()) == []


@pytest.mark.ci
@needs("root", "mmdebstrap", "network")
def test_base_debian_holds_a_real_interpreter_and_packages(store: Store, cache: Cache) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    recipe = Recipe(base="debian", python=version, packages=("iniconfig==2.0.0",))
    image = build_image(recipe, store=store, cache=cache)
    assert image.binds == () and image.lock["base"]["kind"] == "debian"
    told = output(
        image,
        store,
        cache,
        "python -c 'import iniconfig, ssl, sys; print(sys.version_info[1])'; git --version; "
        "cat /etc/hostname; wc -c < /etc/resolv.conf; id -un",
    )
    assert told.splitlines()[0] == version.split(".")[1] and told.splitlines()[2:] == ["sandbox", "0", "root"]


def test_base_debian_without_its_program_says_how_to_get_it(
    store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.check_upper()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MachineError, match="mmdebstrap") as caught:
        build_image(Recipe(base="debian"), store=store, cache=cache)
    assert "apt-get install mmdebstrap" in caught.value.hint
