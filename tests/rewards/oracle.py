"""The graders of SWE-bench 4.1.0 and 5.0.2 themselves, each in a process of the venv that `scripts/oracles` makes.

Run as a program by that venv's Python, this file is the process: a JSON line with a question on stdin, one with the
answer on stdout. The grader reads the log from the file that the question names, as it does in its own harness.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARSERS = {
    "swebench-django": "parse_log_django",
    "swebench-matplotlib": "parse_log_matplotlib",
    "swebench-pytest": "parse_log_pytest",
    "swebench-pytest-options": "parse_log_pytest_options",
    "swebench-pytest-v2": "parse_log_pytest_v2",
    "swebench-seaborn": "parse_log_seaborn",
    "swebench-sympy": "parse_log_sympy",
}


class Oracle:
    """One grader. rules: `4.1` or `5.0`. python: its interpreter. Call `close` at the end."""

    def __init__(self, rules: str, python: Path, directory: Path) -> None:
        self.rules = rules
        self._log = directory / f"log-{rules}"
        self._process = subprocess.Popen(
            [str(python), "-I", __file__, rules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def grade(self, parser: str, log: str, fail_to_pass: Sequence[str], pass_to_pass: Sequence[str]) -> dict[str, Any]:
        """`tests`, `resolved` and the lists of successes and failures. log: the whole, with the harness's marks."""
        self._log.write_bytes(log.encode())
        question = {
            "parser": PARSERS[parser],
            "log": str(self._log),
            "fail_to_pass": list(fail_to_pass),
            "pass_to_pass": list(pass_to_pass),
        }
        answer: dict[str, Any] = self._ask(question)
        return answer

    def parsers(self) -> dict[str, str]:
        """Its parser of each repository; only 4.1 has that table."""
        answer: dict[str, str] = self._ask({"table": True})
        return {repo: ours for repo, name in answer.items() for ours, theirs in PARSERS.items() if name == theirs}

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the grader of {self.rules} ended"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _serve(rules: str) -> None:
    # Its packages import containers, clouds and datasets as soon as they are named; the modules of the grader do not.
    import importlib.util

    spec = importlib.util.find_spec("swebench")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for name, path in {"swebench": root, "swebench.harness": root / "harness"}.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    # What only the harness itself and the graders of other languages use.
    stand_ins: dict[str, dict[str, Any]] = {
        "swebench.utils": {"ansi_escape": str},
        "swebench.types": {"TestSpec": object},
        "swebench.harness.utils": {"ansi_escape": str},
        "swebench.harness.test_spec": {},
        "swebench.harness.test_spec.test_spec": {"TestSpec": object},
    }
    for name, attributes in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    from swebench.harness import grading  # type: ignore[import-not-found]

    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(_table() if "table" in question else _grade(grading, rules, question)), flush=True)


def _table() -> dict[str, str]:
    from swebench.harness.log_parsers.python import MAP_REPO_TO_PARSER_PY  # type: ignore[import-not-found]

    return {repo: parser.__name__ for repo, parser in MAP_REPO_TO_PARSER_PY.items()}


def _grade(grading: Any, rules: str, question: dict[str, Any]) -> dict[str, Any]:
    spec = types.SimpleNamespace(
        instance_id="one",
        FAIL_TO_PASS=question["fail_to_pass"],
        PASS_TO_PASS=question["pass_to_pass"],
        log_parser=question["parser"],
        eval_type="pass_and_fail",
    )
    if rules == "4.1":
        spec.repo, spec.version = _repository(grading, question["parser"])
    prediction = {"instance_id": "one", "model_name_or_path": "x", "model_patch": "x"}
    try:
        tests, _ = grading.get_logs_eval(spec, question["log"])
        report = grading.get_eval_report(spec, prediction, question["log"], True)["one"]
    except Exception as error:  # in its harness the instance is an error then, and not resolved
        return {"error": type(error).__name__, "tests": {}, "resolved": False}
    return {"tests": tests, **report}


def _repository(grading: Any, parser: str) -> tuple[str, str]:
    """Some repository and version that 4.1 reads with that parser."""
    repo = next(repo for repo, function in grading.MAP_REPO_TO_PARSER.items() if function.__name__ == parser)
    return repo, next(iter(grading.MAP_REPO_VERSION_TO_SPECS[repo]))


if __name__ == "__main__":
    _serve(sys.argv[1])
