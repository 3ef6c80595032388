"""Building an image from a recipe: step by step, each step's overlay upper its layer, no prefix built twice.

Keys are chained: a step's key covers its own words and everything below it, so recipes that begin the same share
their layers. Two builds of one recipe, or of one step, at the same time: one builds, the other waits and reuses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from skyrl_minisandbox.errors import BuildError, CorruptLayer, InputError
from skyrl_minisandbox.images import debian, host, interpreters, steps
from skyrl_minisandbox.images.access import Access, host_access
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.image import Image
from skyrl_minisandbox.images.interpreters import Interpreter
from skyrl_minisandbox.images.layer import Layer, LayerWriter, pack_tree
from skyrl_minisandbox.images.locks import disk_room, full_disk
from skyrl_minisandbox.images.recipe import GitCommit, Recipe
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.images.store import BlobMissing, Store
from skyrl_minisandbox.sandbox.spec import GIB, MIB, Bind, CommandResult, Limits

if TYPE_CHECKING:
    from skyrl_minisandbox.sandbox import Sandbox

VERSION = 1
"""Of what builds do; part of every key, so that a change here rebuilds."""
LIMITS = Limits(memory=8 * GIB, processes=4096, disk=32 * GIB, inodes=4_000_000, output=32 * MIB)
"""A compiler needs more than an agent."""
STEP_TIMEOUT = 3600.0
"""Seconds for one step; scikit-learn compiles for a quarter of that on two cores."""
PATH = f"{steps.ENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MIN_FREE = 64 * MIB


def build_image(
    recipe: Recipe,
    *,
    store: Store,
    cache: Cache,
    pythons: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    name: str = "",
    sources: Sources | None = None,
) -> Image:
    """The image of a recipe: the stored one if there is one, else built now.

    pythons: prefixes, or directories of prefixes, to look for interpreters in.
    progress: called with a few words when something begins (`packages`, `command 1/3`).
    name: for messages and logs. sources: where downloads go; default: below the cache.

    Raises `BuildError` (a step failed; its log is named), `InputError` (no such base, Python, package, commit),
    `MachineError` (the machine lacks something, an index does not answer, a disk is full).
    """
    _check(recipe)
    tell = progress or (lambda words: None)
    base = host.facts() if recipe.base == "host" else None
    base_digest = host.facts_digest(base) if base is not None else ""
    digest = recipe.digest()
    if found := store.find(digest, base=base_digest):
        return found
    cache.check_upper()
    with store.lock(f"recipe-{digest[:32]}"):
        if found := store.find(digest, base=base_digest):
            return found
        build = _Build(recipe, store, cache, pythons, tell, name, sources or Sources(cache.path / "sources"))
        try:
            image = build.run()
        except (CorruptLayer, BlobMissing):
            # A layer that a step had left was damaged; it is out of the store now, so this time it is made anew.
            image = _Build(recipe, store, cache, pythons, tell, name, build.sources).run()
        return store.add(image, base=base_digest)


def _check(recipe: Recipe) -> None:
    if recipe.base not in ("host", "debian"):
        raise InputError(f"there is no base `{recipe.base}`", hint="bases: host, debian")
    if recipe.base == "host" and recipe.system_packages:
        raise InputError(
            f"base `host` cannot hold system packages ({', '.join(recipe.system_packages)})",
            hint="use base `debian`",
        )
    for pin in (*recipe.packages, *recipe.build_packages):
        if pin.startswith("-") or "\n" in pin:
            raise InputError(f"`{pin}` is not a package pin", hint="write pins as `pytest==8.3.5`")


class _Build:
    """One build. `layers` and `key` grow with each step."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        cache: Cache,
        pythons: Sequence[str],
        tell: Callable[[str], None],
        name: str,
        sources: Sources,
    ) -> None:
        self.recipe, self.store, self.cache = recipe, store, cache
        self.pythons, self.tell, self.sources = pythons, tell, sources
        self.name = name or recipe.digest()[:12]
        self.layers: list[Layer] = []
        self.key = hashlib.sha256(f"skyrl-minisandbox {VERSION} {platform.machine()}".encode()).hexdigest()
        self.binds: tuple[tuple[str, str], ...] = ()
        self.keep: tuple[str, ...] = ()
        self.base: dict[str, str] = {}
        self.lock: dict[str, Any] = {"index_cutoff": recipe.index_cutoff}

    def run(self) -> Image:
        recipe = self.recipe
        self._base()
        if self._has_python():
            python, version = self._python()
            self._environment(python, version)
        self._repository()
        for number, command in enumerate(recipe.commands, 1):
            self._command(command, f"command {number}/{len(recipe.commands)}")
        return Image(
            digest="",
            layers=tuple(self.layers),
            env=self._image_env(),
            workdir=recipe.workdir if recipe.repository is not None or recipe.commands else "/",
            binds=self.binds,
            keep=self.keep,
            base=self.base,
            recipe=recipe.digest(),
            name=self.name,
            lock={**self.lock, "base": self.base},
        )

    def _has_python(self) -> bool:
        """Whether there is an /opt/env at all: not for a recipe that names neither a Python nor a package."""
        return bool(self.recipe.python or self.recipe.packages or self.recipe.build_packages)

    def _image_env(self) -> dict[str, str]:
        env = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
        if self._has_python():
            env["VIRTUAL_ENV"] = steps.ENV
        return {**env, **self.recipe.env}

    # the steps, bottom up

    def _base(self) -> None:
        if self.recipe.base == "host":
            self.base = host.facts()
            with self.cache.upper() as place:
                place.mkdir()
                self.binds, self.keep = host.make_root(place)
                words = ["host", json.dumps(self.base, sort_keys=True), json.dumps([self.binds, self.keep])]
                self._step("base host", words, lambda: (self._pack(place), {}))
            return
        packages = list(self.recipe.system_packages) + (
            ["python3"] if not self.recipe.python and self._has_python() else []
        )
        words = debian.step_words(packages)
        self.base = {"kind": "debian", "suite": words[1], "machine": platform.machine()}

        def make() -> tuple[Layer, dict[str, Any]]:
            with self.cache.upper() as place:
                place.mkdir()
                return self.store.put_layer(
                    lambda sink: debian.make_root(_binary(sink), packages, place), "base debian"
                ), {}

        self._step("base debian", words, make)

    def _python(self) -> tuple[str, str]:
        """Where the interpreter is inside, and its version `3.11`."""
        if self.recipe.python is None:
            return self._python_of_base()
        found = interpreters.find(self.recipe.python, self.pythons)
        self.lock["python"] = found.version
        if self.recipe.base == "host" and found.of_base:
            return f"/usr/bin/python{found.short}", found.short
        label = f"python {found.short}"
        words = ["python", *interpreters.identity(found), self.recipe.base]
        self._step(label, words, lambda: (self._copy_python(found, label), {}))
        return f"{interpreters.HOME}/{found.short}/bin/python{found.short}", found.short

    def _python_of_base(self) -> tuple[str, str]:
        with self._sandbox() as sandbox:
            result = sandbox.run(
                ["/usr/bin/python3", "-I", "-c", "import sys; print('.'.join(map(str, sys.version_info[:3])))"],
                cwd="/",
                timeout=60,
            )
        version = result.stdout.decode().strip()
        if result.exit_code or not version.startswith("3."):
            raise InputError(
                f"base `{self.recipe.base}` has no Python of its own at /usr/bin/python3",
                hint="name a version in the recipe: python: '3.11'",
            )
        self.lock["python"] = version
        short = ".".join(version.split(".")[:2])
        return f"/usr/bin/python{short}", short

    def _copy_python(self, found: Interpreter, label: str) -> Layer:
        with self.cache.upper() as place:
            place.mkdir()
            interpreters.copy_prefix(found, place, host_usr=self.recipe.base == "host")
            place.chmod(0o755)
            home = f"{interpreters.HOME[1:]}/{found.short}"
            with self._archive(place, home) as archive, self._sandbox() as sandbox:
                self._run(sandbox, label, "tar -x --no-same-owner -C / -f -", input=archive, cwd="/")
                self._run(sandbox, label, steps.python_script(found.short), cwd="/")
                return self._export(sandbox, label)

    @contextlib.contextmanager
    def _archive(self, directory: Path, prefix: str) -> Iterator[IO[bytes]]:
        """A host directory as a tar to read from."""
        path = directory.parent / "archive.tar"
        with open(path, "wb") as sink:
            pack_tree(directory, sink, prefix)
        with open(path, "rb") as archive:
            yield archive

    def _environment(self, python: str, version: str) -> None:
        recipe = self.recipe
        pip = next(
            (pin.partition("==")[2] for pin in recipe.packages if pin.startswith("pip==")), steps.pip_version(version)
        )
        words = ["environment", python, self.lock["python"], pip, recipe.index_cutoff]
        words += [json.dumps([list(recipe.build_packages), list(recipe.packages)])]

        def make() -> tuple[Layer, dict[str, Any]]:
            wheel = self.sources.wheel("pip", pip)
            groups = (recipe.build_packages, recipe.packages)
            script = steps.environment_script(python, version, wheel.name, groups)
            access = self._access()
            bind = Bind(str(wheel.resolve()), f"{steps.PIP_WHEEL_DIRECTORY}/{wheel.name}")
            with self._sandbox(access, binds=(bind,)) as sandbox:
                self._run(sandbox, "packages", script, cwd="/", access=access)
                freeze = self._run(
                    sandbox, "packages", f"{steps.ENV}/bin/python -m pip freeze --all", cwd="/", access=access
                )
                return self._export(sandbox, "packages"), {"packages": freeze.stdout.decode().split()}

        self.lock["packages"] = self._step("packages", words, make).get("packages", [])

    def _repository(self) -> None:
        repository = self.recipe.repository
        if repository is None:
            return
        words = ["repository", repository.model_dump_json(), self.recipe.workdir]

        def make() -> tuple[Layer, dict[str, Any]]:
            with self.cache.upper() as place:
                place.mkdir()
                if isinstance(repository, GitCommit):
                    script = steps.git_script(repository.commit, self.recipe.workdir)
                    source = steps.fetch_commit(repository, place)
                else:
                    archive = self.sources.sdist(
                        repository.package, repository.version, repository.sha256, repository.filename
                    )
                    script = steps.sdist_script(archive.name, self.recipe.workdir)
                    source = open(archive, "rb")
                with source, self._sandbox() as sandbox:
                    self._run(sandbox, "repository", script, input=source, cwd="/")
                    return self._export(sandbox, "repository"), {}

        self._step("repository", words, make)
        self.lock["repository"] = dict(steps.repository_words(repository))

    def _command(self, command: str, label: str) -> None:
        words = ["command", command, self.recipe.workdir, json.dumps(self.recipe.env, sort_keys=True)]

        def make() -> tuple[Layer, dict[str, Any]]:
            access = self._access()
            with self._sandbox(access) as sandbox:
                self._run(sandbox, label, f"mkdir -p {shlex.quote(self.recipe.workdir)}", cwd="/")
                self._run(sandbox, label, command, cwd=self.recipe.workdir, access=access)
                return self._export(sandbox, label), {}

        self._step(label, words, make)

    # how a step is done

    def _step(
        self, label: str, words: Sequence[str], make: Callable[[], tuple[Layer, dict[str, Any]]]
    ) -> dict[str, Any]:
        """Add the layer of a step: the remembered one, or what `make` gives. Returns the step's facts."""
        self.key = hashlib.sha256("\0".join([self.key, *words]).encode()).hexdigest()
        known = self.store.step(self.key)
        if known is None:
            with self.store.lock(f"step-{self.key[:32]}"):
                known = self.store.step(self.key)
                if known is None:
                    self.tell(label)
                    with disk_room(self.cache.path):
                        layer, facts = make()
                    self.store.put_step(self.key, layer, facts)
                    known = layer, facts
        self.layers.append(dataclasses.replace(known[0], name=label))
        return known[1]

    def _pack(self, directory: Path) -> Layer:
        """The root file system of base `host`; everything is root's but the user's home."""

        def owner(inside: str, found: os.stat_result) -> tuple[int, int]:
            return (1000, 1000) if inside == "home/user" else (0, 0)

        return self.store.put_layer(lambda sink: pack_tree(directory, _binary(sink), owner=owner), "base host")

    def _access(self) -> Access:
        return host_access(self.sources.config)

    @contextlib.contextmanager
    def _sandbox(self, access: Access | None = None, binds: tuple[Bind, ...] = ()) -> Iterator[Sandbox]:
        """A sandbox over the layers so far, its upper on the cache's disk; with network where `access` is given."""
        from skyrl_minisandbox.sandbox import Sandbox

        image = Image(
            digest="",
            layers=tuple(self.layers),
            env=self._image_env(),
            workdir="/",
            binds=self.binds,
            keep=self.keep,
            base=self.base,
            name=self.name,
        )
        with self.cache.checkout(image, self.store) as checkout, self.cache.upper() as upper:
            spec = checkout.sandbox_spec(
                limits=LIMITS,
                network="host" if access else "none",
                upper=upper,
                binds=(*(access.binds if access else ()), *binds),
                private_tmp=True,
            )
            with Sandbox(spec) as sandbox:
                yield sandbox

    def _run(
        self,
        sandbox: Sandbox,
        label: str,
        script: str,
        *,
        cwd: str,
        input: IO[bytes] | None = None,
        access: Access | None = None,
    ) -> CommandResult:
        env: Mapping[str, str] = {**access.env, **self.recipe.env} if access else {}
        result = sandbox.run(script, input=input, cwd=cwd, env=env, timeout=STEP_TIMEOUT)
        if result.exit_code == 0 and not result.timed_out:
            return result
        raise self._failed(label, script, result, access)

    def _failed(self, label: str, script: str, result: CommandResult, access: Access | None) -> Exception:
        if result.disk_full and _free(self.cache.path) < _MIN_FREE:
            return full_disk(self.cache.path)
        output = access.scrub(result.output) if access else result.output
        log = self.store.log_path(f"{self.name}-{label.replace(' ', '-').replace('/', '-of-')}")
        log.write_text(f"# image {self.name}, step {label}, exit code {result.exit_code}\n# {script}\n{output}")
        why = f"exit code {result.exit_code}"
        if result.timed_out:
            why = f"not done after {STEP_TIMEOUT:.0f} s"
        elif result.oom_killed:
            why = f"killed for using more than {LIMITS.memory // GIB} GiB of memory"
        elif result.disk_full:
            why = f"it wrote more than {LIMITS.disk // GIB} GiB"
        last = [line for line in output.splitlines() if line.strip()][-5:]
        text = f"building image {self.name}: step `{label}` failed ({why})"
        return BuildError("\n  ".join([text, *last]), hint=f"the whole log is {log}")

    def _export(self, sandbox: Sandbox, label: str) -> Layer:
        return self.store.put_layer(lambda sink: sandbox.export_layer(_binary(sink)), label)


def _binary(sink: LayerWriter) -> Any:
    """A LayerWriter as what typing calls a BinaryIO."""
    return sink


def _free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
