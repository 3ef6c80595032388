"""The configuration of the Env, field by field. The Hydra tree in configs/ has the same names and sentences.

No `from __future__ import annotations` here: SkyRL builds nested dataclasses from `field.type`, and
with annotations kept as strings it would silently hand out plain dicts instead.
"""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from skyrl_minisandbox.errors import InputError

if typing.TYPE_CHECKING:
    from skyrl_minisandbox.sandbox.spec import Limits

C = TypeVar("C", bound="Config")

MOST_READY = 64
"""Sandboxes that a worker keeps ready for one image, at most: more than a node of 32 CPUs has slots."""

_SIZE = re.compile(r"(\d+)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _home(name: str) -> str:
    """A directory of ours below the user's cache directory (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "skyrl-minisandbox", name)


def parse_size(text: str, key: str) -> int:
    """Bytes from `4GiB`, `512M` or `1048576`; units are powers of 1024. Raises `InputError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"`{key}={text}` is not a size", hint=f"write a number of bytes or `{key}=4GiB`")
    return int(match[1]) * _FACTOR[(match[2] or "").upper()]


@dataclass
class Config:
    """Base class: leaf types are checked, because neither SkyRL nor a plain call does it."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = _checked(getattr(self, item.name), item.type, item.name)
            object.__setattr__(self, item.name, value)


@dataclass
class ImagesConfig(Config):
    """Where images are.

    store: directory with the built images, shared by all nodes (may be on NFS). Empty: below the
        user's cache directory.
    cache: node-local directory for unpacked layers, ready to mount; must be on a local disk.
        Empty: below the user's cache directory.
    pythons: directories with Python prefixes (`DIR/3.9.18/bin/python3.9`) beside the running
        interpreter; only building images reads them.
    """

    store: str = ""
    cache: str = ""
    pythons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store = _absolute(self.store or _home("store"))
        self.cache = _absolute(self.cache or _home("cache"))
        self.pythons = [_absolute(path) for path in self.pythons]


@dataclass
class TasksConfig(Config):
    """Which tasks; needed where a dataset row carries only a `task_id`.

    name: the dataset family, a short name or a dotted path.
    ids: only these tasks, in this order; empty: all.
    path: file or directory that the family reads; empty: its own default.
    repos: directory with local clones of the repositories; empty: none are needed.
    base: `host` or `debian`, the base of the images.
    python: `3.12`: another interpreter than the tasks' own; empty: theirs.
    validation: `validation.json` of `minisandbox validate`: only the tasks that passed, without their flaky
        tests; empty: all, as the dataset has them.
    """

    name: str = "pypi"
    ids: list[str] = field(default_factory=list)
    path: str = ""
    repos: str = ""
    base: str = "host"
    python: str = ""
    validation: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("path", "repos", "validation"):
            value = getattr(self, name)
            setattr(self, name, _absolute(value) if value else "")


@dataclass
class ScaffoldConfig(Config):
    """The agent program around the model.

    name: a short name or a dotted path.
    options: handed to the scaffold as keyword arguments; the scaffold documents them.
    """

    name: str = "mini"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardConfig(Config):
    """How a TestReport becomes a number.

    name: a short name or a dotted path to `function(report) -> float`.
    options: handed to the reward as keyword arguments; the reward documents them.
    memo: keep verdicts by image and patch, and do not run the tests again for a patch that was graded before.
    """

    name: str = "binary"
    options: dict[str, Any] = field(default_factory=dict)
    memo: bool = False


@dataclass
class GradingConfig(Config):
    """How tests judge a patch.

    mode: `protected`: original tests and runner configuration, results on a channel of their own, canaries. `official`:
        the dataset's own procedure, byte for byte; the patch can forge its log.
    rules: whose rules `official` follows where they differ: SWE-bench `4.1` or `5.0`.
    patch: how it is applied: `strict`; `fuzzy`: context may have moved or changed a little; `three_way`: merged with
        the blobs that it names.
    retries: how often a pass-to-pass test that fails is run again alone before it counts; `protected` only.
    """

    mode: str = "protected"
    rules: str = "4.1"
    patch: str = "strict"
    retries: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in _GRADING.items():
            if getattr(self, name) not in known:
                words = ", ".join(f"`{word}`" for word in known)
                raise InputError(f"`grading.{name}={getattr(self, name)}` must be one of {words}")
        if self.retries < 0:
            raise InputError(f"`grading.retries={self.retries}` must be 0 or above")


_GRADING = {
    "mode": ("protected", "official"),
    "rules": ("4.1", "5.0"),
    "patch": ("strict", "fuzzy", "three_way"),
}


@dataclass
class SandboxConfig(Config):
    """What one sandbox may use, and how it is made. Reaching a limit is told to the agent; the rollout goes on.

    memory: of the whole sandbox, its files included (they are in memory).
    processes: processes and threads in the whole sandbox.
    disk: what may be written; below `memory`, so that a full disk does not look like a lack of memory.
    output: kept of each command's output; the middle of more is cut.
    open_files: files that one process may have open.
    inodes: files, directories and links that may be made.
    core: largest core file of a process that crashes; 0 for none.
    cpu_weight: share of the processors when there are not enough: 1 to 10000, 100 is what everybody else has.
    command_seconds: the deadline of a command for which nobody else sets one; 0: none.
    upper: where what is written goes. `tmpfs`: to memory. `disk`: below `images.cache`, for tasks that write more than
        memory holds; slower, and `disk` is looked at every few seconds.
    pool: sandboxes that each worker keeps ready for each image in use, so that opening one takes a millisecond; each
        takes about 2 MB of memory. 0: none.
    allow_degraded: names of protections that may be missing (`minisandbox doctor` lists them). Each
        one makes the sandbox weaker, so one that is missing and not named is an error.
    """

    memory: str = "4GiB"
    processes: int = 1024
    disk: str = "2GiB"
    output: str = "2MiB"
    open_files: int = 16384
    inodes: int = 500_000
    core: str = "0"
    cpu_weight: int = 100
    command_seconds: float = 0.0
    upper: str = "tmpfs"
    pool: int = 0
    allow_degraded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "sandbox", "processes")
        for name in ("memory", "disk", "output"):
            if parse_size(getattr(self, name), f"sandbox.{name}") <= 0:
                raise InputError(f"`sandbox.{name}` must be above 0")
        if self.upper not in ("tmpfs", "disk"):
            raise InputError(f"`sandbox.upper={self.upper}` must be `tmpfs` or `disk`")
        if not 0 <= self.pool <= MOST_READY:
            raise InputError(f"`sandbox.pool={self.pool}` must be from 0 to {MOST_READY}")
        limits = self.limits()
        if self.upper == "tmpfs" and limits.disk >= limits.memory:
            raise InputError(
                f"`sandbox.disk={self.disk}` must be below `sandbox.memory={self.memory}` while what is written is in "
                "memory, or a full disk would look like running out of it",
                hint="sandbox.upper=disk, or more memory",
            )

    def limits(self) -> "Limits":
        """The same in bytes, as the sandbox wants it. Raises `InputError` for what it does not take."""
        from skyrl_minisandbox.errors import SandboxError
        from skyrl_minisandbox.sandbox.spec import Limits

        try:
            return Limits(
                memory=parse_size(self.memory, "sandbox.memory"),
                processes=self.processes,
                disk=parse_size(self.disk, "sandbox.disk"),
                output=parse_size(self.output, "sandbox.output"),
                open_files=self.open_files,
                inodes=self.inodes,
                core=parse_size(self.core, "sandbox.core"),
                cpu_weight=self.cpu_weight,
                command_seconds=self.command_seconds or None,
            )
        except SandboxError as error:
            raise InputError(error.message.replace("limits.", "sandbox.", 1)) from None


@dataclass
class RolloutConfig(Config):
    """Bounds of one rollout. All times in seconds, on the monotonic clock.

    turns: answers of the policy before the rollout is ended and graded; `extras["max_turns"]`, which
        SkyRL sets from `generator.max_turns`, wins over it. 0: no bound of ours.
    step: what the scaffold may take from one answer to its next question. Above it the rollout ends
        with `ended_by=time` and is graded: a command inside can cause it, so it is scored.
    time: the same for all steps together; the model's own time does not count.
    setup: checkout and sandbox of the rollout. Above it: `infra_error`, as no command inside can cause it.
    grade: what grading may take beside the tests' own time limit; taking the patch has as much. Above it:
        graded once more on another node, then `tests_timeout`; a patch can cause it.
    idle: how long a rollout waits for its next answer before it is given up. It must be above the
        longest pause of the trainer (a weight update); it frees what a crashed driver left open.
    """

    turns: int = 50
    step: float = 600.0
    time: float = 3600.0
    setup: float = 600.0
    grade: float = 300.0
    idle: float = 7200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "rollout", "step", "time", "setup", "grade", "idle")
        if self.turns < 0:
            raise InputError(f"`rollout.turns={self.turns}` must be 0 (no bound) or above")


@dataclass
class ClusterConfig(Config):
    """Where rollouts run.

    kind: `ray`: on the nodes of a running Ray, else of one that is started for this run. `local`: in
        worker processes of this machine, without Ray.
    nodes: at most so many nodes, this machine first; 0: all.
    workers: worker processes per node. More of them: less is lost when one dies, more memory (60 MB each).
    slots: rollouts that a node should run at once; 0: two per CPU, as they mostly wait for the model.
    address: of a running Ray; empty: RAY_ADDRESS, else one is started.
    """

    kind: str = "ray"
    nodes: int = 0
    workers: int = 2
    slots: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "cluster", "workers")
        if self.kind not in ("ray", "local"):
            raise InputError(f"`cluster.kind={self.kind}` must be `ray` or `local`")
        if self.nodes < 0 or self.slots < 0:
            raise InputError("`cluster.nodes` and `cluster.slots` must be 0 or above")


@dataclass
class TrainingConfig(Config):
    """What our generator does beside SkyRL's own; the stock generator reads none of it.

    running: rollouts at once, on all nodes together; the others wait in order. 0: as many as the nodes have slots.
    starting: of these, set up at the same time; it is what loads a machine most. 0: half of those running.
    grading: of these, graded at the same time. 0: half of those running.
    time: seconds of one rollout, the model's time included. Above it the rollout ends with `ended_by=time` and is
        graded. 0: no such bound.
    retries: how often a row that ended as `infra_error` is run again, on another node where there is one.
    failed_group_policy: what becomes of a group of which a row failed for good. `mask_group`: the whole group is kept
        out of the loss. `mean`: that row alone is, and its reward slot holds the mean of the others.
    max_infra_error_fraction: above it, of the last rows, the step ends with an error that counts the causes.
    """

    running: int = 0
    starting: int = 0
    grading: int = 0
    time: float = 7200.0
    retries: int = 2
    failed_group_policy: str = "mask_group"
    max_infra_error_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("running", "starting", "grading", "time", "retries"):
            if getattr(self, name) < 0:
                raise InputError(f"`training.{name}={getattr(self, name)}` must be 0 or above")
        if self.failed_group_policy not in ("mask_group", "mean"):
            raise InputError(
                f"`training.failed_group_policy={self.failed_group_policy}` must be `mask_group` or `mean`"
            )
        if not 0 <= self.max_infra_error_fraction <= 1:
            raise InputError(
                f"`training.max_infra_error_fraction={self.max_infra_error_fraction}` must be from 0 to 1"
            )


@dataclass
class EnvConfig(Config):
    """All that the Env needs.

    out: run directory; the logs of nodes and workers and our own Ray's temporary files go below it.
        Empty: below the cache, removed at the end.
    """

    images: ImagesConfig = field(default_factory=ImagesConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    scaffold: ScaffoldConfig = field(default_factory=ScaffoldConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    out: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.out = _absolute(self.out) if self.out else ""


def make_config(given: Any) -> EnvConfig:
    """The config from what SkyRL, Hydra or a caller has: EnvConfig, dataclass, DictConfig, dict or None.

    Where a section has a `name`, `kind` or `mode`, that alone may stand for it (`scaffold: gold`). Raises
    `InputError` that names an unknown key, and near or known ones.
    """
    return given if isinstance(given, EnvConfig) else build(EnvConfig, given, "")


def build(cls: type[C], given: Any, path: str) -> C:
    """An instance of `cls` from a mapping-like; `path` is the key that it stands under, for messages."""
    if isinstance(given, cls):
        return given
    names = [item.name for item in dataclasses.fields(cls)]
    if isinstance(given, str) and names[0] in ("name", "kind", "mode"):
        given = {names[0]: given}
    data = _mapping(given, path)
    for key in data:
        if key not in names:
            raise InputError(f"unknown key `{_join(path, key)}`", hint=_suggest(str(key), names))
    hints = {item.name: item.type for item in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        kind = hints[key]
        if isinstance(kind, type) and issubclass(kind, Config):
            values[key] = build(kind, value, _join(path, key))
        else:
            values[key] = _checked(value, kind, _join(path, key))
    return cls(**values)


def _mapping(given: Any, path: str) -> dict[str, Any]:
    """A plain dict from whatever holds the keys; omegaconf is looked at only if it is loaded at all."""
    omegaconf = sys.modules.get("omegaconf")
    if given is None:
        return {}
    if omegaconf is not None and omegaconf.OmegaConf.is_config(given):
        given = omegaconf.OmegaConf.to_container(given, resolve=True)
    elif dataclasses.is_dataclass(given) and not isinstance(given, type):
        given = {item.name: getattr(given, item.name) for item in dataclasses.fields(given)}
    if not isinstance(given, Mapping):
        raise InputError(f"`{path or 'config'}` must have keys of its own, but is {given!r}")
    return dict(given)


def _checked(value: Any, kind: Any, key: str) -> Any:
    """`value` as a `kind`. Only what a command line makes of numbers is converted."""
    origin = typing.get_origin(kind) if isinstance(kind, types.GenericAlias) else kind
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and value is None:
        return ""
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if origin is list and isinstance(value, tuple | list):
        return [_checked(each, typing.get_args(kind)[0], key) for each in value]
    if isinstance(value, origin) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise InputError(f"`{key}={value}` must be {_SAID.get(origin, origin.__name__)}")


_SAID = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list, `[a,b]`",
    dict: "a mapping, `{a: b}`",
}


def _suggest(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    known = f"known here: {', '.join(names)}"
    return f"did you mean `{near[0]}`? {known}" if near else known


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _positive(config: Config, section: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:  # nor is NaN
            raise InputError(f"`{section}.{name}={getattr(config, name)}` must be above 0")
