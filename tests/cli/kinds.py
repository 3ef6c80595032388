"""Tasks of every kind that a validation must tell apart: shell scripts on base `host`, built in a second each.

`tasks=tests.cli.kinds.family` in a command. Each has a program `answer.sh` and hidden tests, lines of a shell script
that prints what pytest does; its images need no network.
"""

from __future__ import annotations

from collections.abc import Mapping

from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.tasks.family import FamilyOptions, TaskMaker
from skyrl_minisandbox.tasks.task import Task, Tests

FAMILY = f"{__name__}.family"

_GIT = "git -c user.name=test -c user.email=test@example.invalid"

ANSWER = "check.sh::answer"
OTHER = "check.sh::other"
TESTS = {
    ANSWER: '[ "$(sh answer.sh)" = right ]',
    OTHER: '[ "$(cat other.txt)" = kept ]',
}

GOLD = """\
diff --git a/answer.sh b/answer.sh
--- a/answer.sh
+++ b/answer.sh
@@ -1,3 +1,3 @@
 # The answer to everything.
-if false; then echo right; else echo wrong; fi
+if true; then echo right; else echo wrong; fi
 # Nothing comes after it.
"""


def recipe(*, answer: str = "false", commands: tuple[str, ...] = ()) -> Recipe:
    """answer: the condition under which the program is right; `false` in the release with the bug."""
    decision = f"if {answer}; then echo right; else echo wrong; fi"
    program = f"# The answer to everything.\\n{decision}\\n# Nothing comes after it.\\n"
    return Recipe(
        base="host",
        workdir="/srv",
        commands=(
            f"printf '{program}' > answer.sh && printf 'kept\\n' > other.txt && git init -q . "
            f"&& git add -A && {_GIT} commit -q -m base",
            *commands,
        ),
    )


def task(
    task_id: str,
    *,
    tests: Mapping[str, str] = TESTS,
    setup: str = "true",
    timeout: float = 30.0,
    gold: str = GOLD,
    made: Recipe | None = None,
    fail_to_pass: tuple[str, ...] = (ANSWER,),
) -> Task:
    """tests: name -> shell condition. setup: a command before the tests."""
    lines = [setup, 'echo "=== short test summary info ==="']
    for name, condition in tests.items():
        lines.append(f'if {condition}; then echo "PASSED {name}"; else echo "FAILED {name}"; fi')
    added = "".join(f"+{line}\n" for line in lines)
    return Task(
        id=task_id,
        problem_statement="`sh answer.sh` prints `wrong`; it should print `right`.",
        recipe=made or recipe(),
        tests=Tests(
            patch=f"diff --git a/check.sh b/check.sh\nnew file mode 100644\n--- /dev/null\n+++ b/check.sh\n"
            f"@@ -0,0 +1,{len(lines)} @@\n{added}",
            files=("check.sh",),
            command="bash check.sh",
            runner="command",
            fail_to_pass=fail_to_pass,
            pass_to_pass=tuple(name for name in tests if name not in fail_to_pass),
            timeout=timeout,
        ),
        gold_patch=gold,
        source="kinds",
    )


def tasks() -> list[Task]:
    """One of each kind."""
    later = recipe(
        commands=(
            f"sed -i s/false/true/ answer.sh && {_GIT} commit -q -a -m 'the fix' && git reset -q --hard HEAD^ "
            "&& git reflog expire --expire=all --all",
        )
    )
    return [
        task("good"),
        task("already-solved", made=recipe(answer="true"), gold=_useless("true")),
        task("gold-fails", gold=_useless("false")),
        task("hangs", setup="grep -q true answer.sh && sleep 60", timeout=1.0),
        task("has-a-future", made=later),
        task("not-built", made=recipe(commands=("echo there is no such compiler >&2; exit 3",))),
    ]


def _useless(answer: str) -> str:
    """A patch that changes nothing of how the program answers."""
    changed = GOLD.replace("-if false", f"-if {answer}").replace("+if true", f"+if {answer} && {answer}")
    return changed


def family(options: FamilyOptions) -> Mapping[str, TaskMaker]:
    """The family, for `tasks=`."""

    def maker(one: Task) -> TaskMaker:
        return lambda: one

    return {one.id: maker(one) for one in tasks()}
