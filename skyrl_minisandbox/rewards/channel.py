"""A way for results that the tests' output cannot write: a reporter inside the runner, and its file.

The reporter is loaded by the environment's own Python without a change of the task's command: pytest finds an entry
point, the other runners a `.pth` file. The first process that begins a run takes the channel and removes what loads
it, so that a runner which tests start finds nothing.

Whatever can run in that process can also write the file. So everything that is read here is what the tested code
may have made of it, and canaries tell whether it is to be believed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyrl_minisandbox.errors import StoreError
from skyrl_minisandbox.rewards.inside.ledger import worse
from skyrl_minisandbox.rewards.parsers import VERDICTS
from skyrl_minisandbox.sandbox import Sandbox

_INSIDE = Path(__file__).with_name("inside")
# For each runner the programs that make up its reporter, and the line that starts it as module `{module}`.
_REPORTERS = {
    "pytest": (
        ("ledger", "pytest_reporter"),
        "pytest_load_initial_conftests = reporter(Ledger({settings}), {module!r})",
    ),
    "unittest": (
        ("ledger", "import_hook", "unittest_reporter"),
        "after_import({{'unittest.runner': reporter(Ledger({settings}))}})",
    ),
    "sympy": (
        ("ledger", "import_hook", "sympy_reporter"),
        "after_import(dict.fromkeys(('sympy.testing.runtests', 'sympy.utilities.runtests'), "
        "reporter(Ledger({settings}))))",
    ),
}
_REPORTERS["django"] = _REPORTERS["unittest"]

MOST_BYTES = 64 << 20
"""Of a results file; 200 000 tests take about 50 MB."""
_LONGEST_LINE = 1 << 20
_MOST_RECORDS = 2_000_000
_PLACE_TIMEOUT = 60.0

# Where an image has no /opt/env of ours: the environment that published images use, and what the Pythons on PATH say.
_FIND = r"""
shopt -s nullglob
found=(/opt/miniconda3/envs/testbed/lib/python*/site-packages)
for python in python python3; do
  path=$(command -v "$python") || continue
  found+=("$("$path" -I -c 'import site; print(site.getsitepackages()[0])')")
done
printf '%s\n' "${found[@]}"
"""


@dataclasses.dataclass(frozen=True)
class Results:
    """What the channel told; all of it may be the tested code's invention.

    tests: verdict (a word of `parsers.VERDICTS`) by every name that the log may give a test.
    asked: names collected before the first test began; None when that was not told.
    finished: the runner came to its end.
    timed_out: the test that ran longer than it may, "" when none did.
    changed: functions of the runner that were replaced while tests ran.
    """

    tests: dict[str, str] = dataclasses.field(default_factory=dict)
    asked: frozenset[str] | None = None
    finished: bool = False
    timed_out: str = ""
    changed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Channel:
    """A channel in place. path: of the results file inside."""

    path: str

    def read(self, sandbox: Sandbox) -> Results:
        """What was told so far; nothing where nothing can be read. Raises `SandboxGone`."""
        try:
            data = sandbox.read_file(self.path, limit=MOST_BYTES)
        except OSError:  # no run began, or the tests removed it, made it something else or filled it up
            return Results()
        return parse(data)


def place(
    sandbox: Sandbox,
    runner: str,
    *,
    python: str | None,
    workdir: str,
    only: Sequence[str] = (),
    test_timeout: float | None = None,
) -> Channel | None:
    """Have the next run of `runner` in `sandbox` report; None for a runner without a reporter.

    python: the environment's version (`3.9`) where the image names one.
    only: run nothing but the tests of these names. test_timeout: seconds for each test.

    Raises `OSError` as the inside has it where nothing can be written: the patch has filled the disk. Raises
    `StoreError` where the image has no Python, and `SandboxGone`.
    """
    if runner not in _REPORTERS:
        return None
    word = "m" + secrets.token_hex(6)
    path = f"/var/lib/{secrets.token_hex(6)}/{secrets.token_hex(6)}"
    places = _places(sandbox, python)
    loaders = {f"{site}/{name}": text for site in places for name, text in _loader(runner, word).items()}
    modules = [f"{site}/{word}.py" for site in places]
    directories = sorted({str(Path(name).parent) for name in loaders} - set(places))
    settings = {
        "results": path,
        "remove": [*loaders, *modules, *(f"{site}/__pycache__/{word}.*" for site in places)],
        "remove_directories": directories,
        "only": list(only),
        "test_timeout": test_timeout,
        "workdir": workdir,
    }
    text = program(runner, word, settings).encode("ascii", "backslashreplace")
    sandbox.write_file(f"{path}-", b"")  # has its directory made
    for module in modules:
        sandbox.write_file(module, text)
    for name, content in loaders.items():
        sandbox.write_file(name, content.encode())
    return Channel(path)


def _places(sandbox: Sandbox, python: str | None) -> list[str]:
    """The directories for packages of the Python that the tests run on."""
    try:
        described = sandbox.read_file("/opt/env/pyvenv.cfg", limit=1 << 16).decode(errors="replace")
    except OSError:
        described = ""
    if version := re.search(r"^version(?:_info)? *= *(\d+\.\d+)", described, re.MULTILINE):
        return [f"/opt/env/lib/python{version[1]}/site-packages"]
    found = sandbox.run(["bash", "-c", _FIND], cwd="/", timeout=_PLACE_TIMEOUT)
    lines = [line for line in found.stdout.decode(errors="replace").split("\n") if line.startswith("/")]
    places = list(dict.fromkeys(lines))
    if not places:
        raise StoreError(f"the image has no Python for the tests to report from: {found.output.strip()[-300:]}")
    return [place for place in places if f"/python{python}/" in place] or places


def program(runner: str, module: str, settings: dict[str, Any]) -> str:
    """The text of the module that is loaded inside."""
    names, start = _REPORTERS[runner]
    parts = [(_INSIDE / f"{name}.py").read_text("utf-8") for name in names]
    return "\n\n".join([*parts, start.format(settings=ascii(settings), module=module) + "\n"])


def _loader(runner: str, word: str) -> dict[str, str]:
    """What makes Python import the module `word`: texts by file name below a directory for packages."""
    if runner != "pytest":
        return {f"{word}.pth": f"import {word}\n"}
    return {
        f"{word}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {word}\nVersion: 1.0\n",
        f"{word}-1.0.dist-info/entry_points.txt": f"[pytest11]\n{word} = {word}\n",
    }


def parse(data: bytes) -> Results:
    """The records of a results file; what is malformed ends it."""
    # The first of a test's names is its own alone. Several tests may share another: the last has it, as in a log.
    first: dict[str, str] = {}
    owner: dict[str, str] = {}
    asked: set[str] = set()
    changed: dict[str, None] = {}
    collected = finished = False
    timed_out = ""
    for number, line in enumerate(data.split(b"\n")):
        record = _record(line) if number < _MOST_RECORDS and len(line) <= _LONGEST_LINE else None
        if record is None:
            break
        kind, fields = record[0], record[1:]
        if kind == "asked":
            asked.update(fields)
        elif kind == "collected":
            collected = True
        elif kind == "ran" and len(fields) > 1 and fields[0] in VERDICTS:
            verdict, *names = fields
            first[names[0]] = worse(first.get(names[0]), verdict)
            owner.update(dict.fromkeys(names, names[0]))
        elif kind == "timeout" and fields:
            timed_out = timed_out or fields[0]
        elif kind == "changed" and fields:
            changed[fields[0]] = None
        elif kind == "finished":
            finished = True
        else:
            break
    return Results(
        tests={name: first[key] for name, key in owner.items()},
        asked=frozenset(asked) if collected else None,
        finished=finished,
        timed_out=timed_out,
        changed=tuple(changed),
    )


def _record(line: bytes) -> list[str] | None:
    """A list of texts, the first of which is its kind; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, list) and record and all(isinstance(field, str) for field in record):
        return record
    return None
