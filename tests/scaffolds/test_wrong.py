"""How a gold patch is spoilt."""

from __future__ import annotations

import pytest
from unidiff import PatchSet

from skyrl_minisandbox.scaffolds.wrong import wrong_patch


def diff(path: str, *hunks: str) -> str:
    return f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n" + "".join(hunks)


LOGIC = "@@ -1,3 +1,4 @@\n def f(x):\n+    if x > 1:\n+        return 2\n-    y = 1\n     return x\n"
LATER = "@@ -20,2 +21,3 @@ def g(name):\n def g(name):\n+    name = name.strip()\n     return name\n"
VERSION = '@@ -40,2 +42,2 @@\n-__version__ = "1.0"\n+__version__ = "1.1"\n # end\n'


def changed(patch: str) -> list[str]:
    return [str(line).rstrip("\n") for file in PatchSet(patch) for h in file for line in h if not line.is_context]


def test_only_hunks_without_logic_stay() -> None:
    gold = diff("CHANGES.rst", "@@ -1 +1,2 @@\n a\n+fixed\n") + diff("src/a.py", LOGIC, LATER, VERSION)
    wrong = wrong_patch(gold)
    assert changed(wrong) == ["+fixed", '-__version__ = "1.0"', '+__version__ = "1.1"']
    # Numbered as if it were the first hunk of its file: nothing before it has moved.
    assert "@@ -40,2 +40,2 @@" in wrong


def test_else_the_hunk_stays_that_has_least_to_do_with_the_tests_and_is_spoilt() -> None:
    wrong = wrong_patch(diff("a.py", LOGIC, LATER), asked="def test_g(): assert g(name=' a ').strip() == 'a'")
    assert changed(wrong) == ["+    if not (x > 1):", "+        return 2", "-    y = 1"]
    wrong = wrong_patch(diff("a.py", LOGIC, LATER), asked="return if y x > 1 returns")
    assert changed(wrong) == ["+    name = None"]


@pytest.mark.parametrize(
    ("line", "contrary"),
    [
        ("    if a and b:", "    if not (a and b):"),
        ("    if a[':']:  # a: comment", "    if not (a[':']):"),
        ("    elif not x:", "    elif not (not x):"),
        ("    while x == {1: 2}[1]:", "    while not (x == {1: 2}[1]):"),
        ("    return f'#{x}'  # why", "    return not (f'#{x}')"),
        ("    self.x = [1, 2]", "    self.x = None"),
    ],
)
def test_a_single_hunk_has_its_condition_or_value_inverted(line: str, contrary: str) -> None:
    wrong = wrong_patch(diff("a.py", f"@@ -1 +1,2 @@\n a\n+{line}\n"))
    assert changed(wrong) == [f"+{contrary}"]


def test_a_condition_goes_before_a_value() -> None:
    wrong = wrong_patch(diff("a.py", "@@ -1 +1,4 @@\n a\n+x = 1\n+if x:\n+    pass\n"))
    assert changed(wrong) == ["+x = 1", "+if not (x):", "+    pass"]


def test_a_hunk_without_either_is_undone_but_for_a_comment() -> None:
    wrong = wrong_patch(diff("a.py", "@@ -1,3 +1,4 @@\n x = [\n-    1,\n+    2,\n+    3,\n ]\n"))
    assert changed(wrong) == ["+    # unchanged"]
    assert "@@ -1,3 +1,4 @@" in wrong
    assert "     1,\n" in wrong


def test_line_endings_and_a_missing_last_newline_are_kept() -> None:
    gold = diff(
        "a.py",
        "@@ -1,2 +1,2 @@\n a\r\n-return 1\n\\ No newline at end of file\n+return 2\n\\ No newline at end of file\n",
    )
    wrong = wrong_patch(gold)
    assert " a\r\n" in wrong
    assert wrong.endswith("+return not (2)\n\\ No newline at end of file\n")


@pytest.mark.parametrize("gold", ["", "no diff", diff("a.py"), "diff --git a/x b/x\nBinary files a/x and b/x differ\n"])
def test_what_cannot_be_spoilt_is_refused(gold: str) -> None:
    with pytest.raises(ValueError, match=r"no hunk|not a unified diff"):
        wrong_patch(gold)
