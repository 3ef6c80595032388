"""A patch goes in whole, or it is told which of its hunks does not fit and why."""

from __future__ import annotations

import base64
import dataclasses
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.rewards.apply import Applied, apply_patch
from skyrl_minisandbox.rewards.hunks import files
from skyrl_minisandbox.sandbox import Sandbox
from tests.rewards.conftest import Opener
from tests.rewards.test_grade import GOLD

pytestmark = pytest.mark.ci  # the fast tier has five minutes for all rooms

NUMBERS = "".join(f"line {number}\n" for number in range(1, 41))


def new_file(path: str, text: str = "x\n", mode: str = "100644") -> str:
    lines = text.splitlines()
    body = "".join(f"+{line}\n" for line in lines)
    return (
        f"diff --git a/{path} b/{path}\nnew file mode {mode}\n--- /dev/null\n+++ b/{path}\n"
        f"@@ -0,0 +1,{len(lines)} @@\n{body}"
    )


def new_link(path: str, target: str) -> str:
    return new_file(path, target, "120000") + "\\ No newline at end of file\n"


def seen(sandbox: Sandbox, script: str) -> str:
    return sandbox.run(script, cwd="/srv", timeout=60).output


@pytest.fixture
def box(open_sandbox: Opener) -> Sandbox:
    sandbox = open_sandbox()
    sandbox.write_file("/srv/numbers.txt", NUMBERS.encode())
    return sandbox


def applied(sandbox: Sandbox, patch: str, how: str = "strict") -> Applied:
    return apply_patch(sandbox, patch, "/srv", how)


def refused(sandbox: Sandbox, patch: str, how: str = "strict") -> str:
    """Why a patch does not go in; nothing of it may be there then."""
    look = (
        "find . -path ./.git -prune -o -type f -exec sha256sum {} + | sort; find . -path ./.git -prune -o -type l -ls"
    )
    before = seen(sandbox, look)
    result = applied(sandbox, patch, how)
    assert (result.ok, result.started) == (False, True)
    assert seen(sandbox, look) == before
    assert "\n" not in result.error
    return result.error


def edited(tmp_path: Path, before: dict[str, bytes], after: dict[str, bytes], *options: str) -> str:
    """What `git diff` says between two trees."""
    for name, tree in (("old", before), ("new", after)):
        for path, data in tree.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(data)
    result = subprocess.run(
        ["git", "-c", "core.autocrlf=false", "diff", "--no-index", *options, "old", "new"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    text = result.stdout.decode("utf-8", "surrogateescape")
    return text.replace("a/old/", "a/").replace("b/new/", "b/") if "--no-prefix" not in options else text


class TestGoesIn:
    def test_a_fix_and_nothing_is_left_beside_it(self, box: Sandbox) -> None:
        before = seen(box, "ls -A /tmp .git; cat .git/index | sha256sum")
        assert applied(box, GOLD) == Applied(ok=True, started=True, error="", log="")
        assert seen(box, "head -1 keep.txt") == "ONE\n"
        assert seen(box, "ls -A /tmp .git; cat .git/index | sha256sum") == before

    @pytest.mark.parametrize(
        ("patch", "look", "result"),
        [
            (GOLD[:-1], "head -1 keep.txt", "ONE\n"),
            (GOLD.replace("@@ -1,3 +1,3", "@@ -7,3 +7,3"), "head -1 keep.txt", "ONE\n"),
            (new_file("a/b/c.py", "x"), "cat a/b/c.py", "x\n"),
            ("diff --git a/no b/no\nnew file mode 100644\nindex 0000000..e69de29\n", "wc -c < no", "0\n"),
            (new_link("abroad", "/etc/passwd"), "readlink abroad", "/etc/passwd\n"),
            (
                "diff --git a/keep.txt b/keep.txt\nold mode 100644\nnew mode 100755\n",
                "stat -c %A keep.txt",
                "-rwxr-xr-x\n",
            ),
            (
                "diff --git a/keep.txt b/deep/kept.txt\nsimilarity index 100%\nrename from keep.txt\n"
                "rename to deep/kept.txt\n",
                "cat deep/kept.txt; ls keep.txt 2>&1 | wc -l; ls -d keep.txt",
                "one\ntwo\nthree\n1\nls: cannot access 'keep.txt': No such file or directory\n",
            ),
            (
                "diff --git a/link b/link\ndeleted file mode 120000\n--- a/link\n+++ /dev/null\n"
                "@@ -1 +0,0 @@\n-keep.txt\n\\ No newline at end of file\n",
                "ls link 2>&1",
                "ls: cannot access 'link': No such file or directory\n",
            ),
            (
                GOLD.replace("diff --git a/keep.txt b/keep.txt\n", "").replace(
                    "keep.txt\n", "keep.txt\t2024-01-01 10:00\n"
                ),
                "head -1 keep.txt",
                "ONE\n",
            ),
            (
                new_file('"a/caf\\303\\251 \\377"', "x").replace('a/"a/', '"a/').replace('b/"a/', '"b/'),
                "ls | grep -a caf | od -An -tx1",
                " 63 61 66 c3 a9 20 ff 0a\n",
            ),
            (
                "diff --git a/sub b/sub\nnew file mode 160000\nindex 0000000..1234567\n--- /dev/null\n+++ b/sub\n"
                f"@@ -0,0 +1 @@\n+Subproject commit {'12345678' * 5}\n" + GOLD,
                "head -1 keep.txt",
                "ONE\n",
            ),
        ],
        ids=[
            "no-last-newline",
            "moved",
            "new",
            "empty",
            "link",
            "mode",
            "rename",
            "no-link",
            "diff-u",
            "bytes",
            "submodule",
        ],
    )
    def test_every_kind_of_change(self, box: Sandbox, patch: str, look: str, result: str) -> None:
        outcome = applied(box, patch)
        assert outcome.ok, outcome
        assert seen(box, look) == result

    def test_binary_content_even_without_its_last_empty_line(self, box: Sandbox, tmp_path: Path) -> None:
        old, new = b"\0\1binary", bytes(range(256)) * 40
        patch = edited(tmp_path, {"data.bin": old}, {"data.bin": new}, "--binary", "--full-index")
        assert "GIT binary patch" in patch
        assert applied(box, patch.rstrip()).ok
        assert box.read_file("/srv/data.bin") == new

    def test_line_ends_and_attributes_do_not_change_its_bytes(self, box: Sandbox, tmp_path: Path) -> None:
        """A .gitattributes of the image or of the patch itself has no say."""
        box.write_file("/srv/.gitattributes", b"* text eol=crlf ident filter=evil working-tree-encoding=UTF-16\n")
        seen(box, "git config filter.evil.smudge 'touch /srv/ran; cat'; git config filter.evil.required true")
        old, new = b"one\r\ntwo\n$Id$\n" * 3, b"one\r\n2\r\n$Id$\nlast"
        box.write_file("/srv/mixed", old)
        patch = edited(tmp_path, {"mixed": old}, {"mixed": new, "fresh": b"\r\n\n$Id$\n"})
        assert applied(box, patch).ok
        assert (box.read_file("/srv/mixed"), box.read_file("/srv/fresh")) == (new, b"\r\n\n$Id$\n")
        assert seen(box, "ls ran 2>/dev/null") == ""

    def test_a_diff_with_the_line_ends_of_the_repository(self, box: Sandbox) -> None:
        """As `git diff` gives it where .gitattributes says that work tree files have CRLF."""
        box.write_file("/srv/.gitattributes", b"*.txt text eol=crlf\n")
        box.write_file("/srv/keep.txt", b"one\r\ntwo\r\nthree\r\n")
        assert applied(box, GOLD).ok
        assert box.read_file("/srv/keep.txt") == b"ONE\r\ntwo\r\nthree\r\n"

    @pytest.mark.ci
    def test_a_patch_of_20_megabytes(self, box: Sandbox) -> None:
        text = "".join(f"{number:0>63}\n" for number in range(20 << 14))
        assert applied(box, new_file("large", text)).ok
        assert seen(box, "wc -c < large") == f"{20 << 20}\n"


class TestIsRefused:
    @pytest.mark.parametrize(
        ("patch", "error"),
        [
            (
                GOLD.replace("-one", "-uno"),
                "keep.txt: hunk 1 of 1 (@@ -1,3 +1,3 @@) does not apply: line 1 of the file is 'one', "
                "the hunk expects 'uno'",
            ),
            (
                GOLD.replace(" three\n", " three\n four\n").replace("1,3", "1,4"),
                "keep.txt: hunk 1 of 1 (@@ -1,4 +1,4 @@) does not apply: the file ends at line 3, "
                "the hunk expects line 4: 'four'",
            ),
            (
                GOLD.replace("two", "two "),
                "keep.txt: hunk 1 of 1 (@@ -1,3 +1,3 @@) does not apply: line 2 differs in white space: 'two', "
                "not 'two '",
            ),
            (
                GOLD.replace("\n", "\r\n"),
                "keep.txt: hunk 1 of 1 (@@ -1,3 +1,3 @@) does not apply: line 1 ends in LF in the file and in CRLF in "
                "the patch; all its lines end in CRLF",
            ),
            (
                GOLD.replace("-one", "-ONE").replace("+ONE", "+one"),
                "keep.txt: hunk 1 of 1 (@@ -1,3 +1,3 @@) does not apply: the file has its new lines already",
            ),
            (
                GOLD[: -len(" three\n")],
                "corrupt patch at line 8 (keep.txt: hunk 1 (@@ -1,3 +1,3 @@) promises 3 old and 3 new lines and has "
                "2 and 2)",
            ),
            (GOLD.replace("keep.txt", "nowhere.txt"), "nowhere.txt: No such file or directory"),
            (new_file("keep.txt"), "keep.txt: already exists in working directory"),
            (new_file("link", "x"), "link: already exists in working directory"),
            ("this is no patch", "No valid patches in input"),
            ("@@ -1 +1 @@\n-one\n+ONE\n", "patch fragment without header at line 1: @@ -1 +1 @@"),
            (
                GOLD.replace("a/keep", "pkg/a").replace("b/keep", "pkg/a").replace("pkg/a.txt", "pkg/a.py"),
                "a.py: No such file or directory; its paths lack the prefixes a/ and b/",
            ),
            ("diff --git a/data.bin b/data.bin\nindex 1234567..89abcde 100644\n"
             "Binary files a/data.bin and b/data.bin differ\n",
             "cannot apply binary patch to 'data.bin' without full index line"),
        ],
        ids=["context", "end", "blank", "crlf", "twice", "cut", "no-file", "exists", "link", "no-patch", "no-header",
             "no-prefix", "binary-told-only"],
    )  # fmt: skip
    def test_with_its_file_its_hunk_and_the_reason(self, box: Sandbox, patch: str, error: str) -> None:
        assert refused(box, patch).startswith(error)

    def test_of_several_hunks_and_files_the_one_that_does_not_fit(self, box: Sandbox, tmp_path: Path) -> None:
        new = NUMBERS.replace("line 5\n", "five\n").replace("line 20\n", "twenty\n").replace("line 35\n", "x\n")
        patch = edited(tmp_path, {"numbers.txt": NUMBERS.encode()}, {"numbers.txt": new.encode()})
        wrong = GOLD + patch.replace(" line 22\n", " line twenty-two\n")
        assert refused(box, wrong) == (
            "numbers.txt: hunk 2 of 3 (@@ -17,7 +17,7 @@) does not apply: line 22 of the file is 'line 22', "
            "the hunk expects 'line twenty-two'"
        )

    def test_lf_lines_for_a_file_with_crlf(self, box: Sandbox) -> None:
        box.write_file("/srv/keep.txt", b"one\r\ntwo\r\nthree\r\n")
        assert "line 1 ends in CRLF in the file and in LF in the patch" in refused(box, GOLD)

    @pytest.mark.ci
    @pytest.mark.parametrize(
        ("patch", "error"),
        [
            (new_file("../../etc/evil"), "invalid path '../../etc/evil'"),
            (new_file("pkg/../../etc/evil"), "invalid path 'pkg/../../etc/evil'"),
            (new_file("/etc/evil"), "invalid path '/etc/evil'"),
            (new_file(".git/hooks/post-checkout", mode="100755"), "invalid path '.git/hooks/post-checkout'"),
            (new_file(".GIT/config"), "invalid path '.GIT/config'"),
            (new_file("sub/.git/config"), "invalid path 'sub/.git/config'"),
            (new_file(".git"), "invalid path '.git'"),
            (new_link(".git", "/tmp"), "invalid path '.git'"),
            (new_link("out", "/etc") + new_file("out/evil"), "affected file 'out/evil' is beyond a symbolic link"),
            (new_link("out", "..") + new_link("in", "out") + new_file("in/etc/evil"), "affected file 'in/etc/evil'"),
            (new_file("abroad/evil"), "affected file 'abroad/evil' is beyond a symbolic link"),
            (
                "diff --git a/keep.txt b/../../etc/evil\nsimilarity index 100%\nrename from keep.txt\n"
                "rename to ../../etc/evil\n",
                "invalid path '../../etc/evil'",
            ),
            (
                "diff --git a/../../etc/passwd b/taken\nsimilarity index 100%\ncopy from ../../etc/passwd\n"
                "copy to taken\n",
                "invalid path '../../etc/passwd'",
            ),
        ],
    )  # fmt: skip
    def test_what_leaves_the_workdir_or_enters_its_repository(self, box: Sandbox, patch: str, error: str) -> None:
        seen(box, "ln -s /etc abroad")
        for how in ("strict", "fuzzy", "three_way"):
            assert error in refused(box, patch, how)
        assert seen(box, "ls -d /etc/evil /tmp/* .git/hooks/post-checkout 2>/dev/null") == ""

    @pytest.mark.ci
    def test_a_binary_hunk_that_unpacks_to_more_than_there_is(self, box: Sandbox) -> None:
        """The reason is the patch's, whichever limit it runs into: never an exception, never git's fault."""
        packed = zlib.compressobj(9)
        raw = b"".join(packed.compress(bytes(1 << 20)) for _ in range(700)) + packed.flush()
        lines = []
        for start in range(0, len(raw), 52):
            piece = raw[start : start + 52]
            size = chr(ord("A") + len(piece) - 1) if len(piece) <= 26 else chr(ord("a") + len(piece) - 27)
            lines.append(size + base64.b85encode(piece, pad=True).decode())
        patch = (
            "diff --git a/bomb b/bomb\nnew file mode 100644\n"
            f"index {'0' * 40}..{'1' * 40}\nGIT binary patch\nliteral {700 << 20}\n" + "\n".join(lines) + "\n\n"
        )
        result = applied(box, patch)
        assert (result.ok, result.started) == (False, True)
        assert (
            result.error in ("git was killed for memory", "the disk of the sandbox is full") or "memory" in result.error
        )

    @pytest.mark.parametrize(
        "damage",
        ["mkdir -p /usr/local/bin; echo '#!/no' > /usr/local/bin/git; chmod +x /usr/local/bin/git", "rm -rf /srv"],
        ids=["git", "workdir"],
    )
    def test_but_git_that_cannot_be_run_is_not_the_patchs_doing(self, box: Sandbox, damage: str) -> None:
        seen(box, damage)
        for how in ("strict", "fuzzy", "three_way"):
            result = applied(box, GOLD, how)
            assert (result.ok, result.started) == (False, False)
            assert result.error


@pytest.mark.ci
class TestFuzzy:
    def test_is_asked_only_where_strict_fails(self, box: Sandbox) -> None:
        assert applied(box, GOLD, "fuzzy").used == ""

    @pytest.mark.parametrize(
        ("change", "used"),
        [
            (lambda patch: patch.replace("\n", "\r\n"), "with the line ends that the files have"),
            (lambda patch: patch.replace(" line 18\n", " line eighteen\n"), "with one line of context"),
            (lambda patch: patch.replace(" line 19\n", " line  19\n"), "white space ignored"),
            (lambda patch: patch.replace(",7 +", ",9 +"), "with the lines of each hunk counted anew"),
            (lambda patch: patch.replace(" line 19\n", " line nineteen\n"), "by `patch --fuzz=5`"),
        ],
        ids=["crlf", "far-context", "blank", "counts", "near-context"],
    )  # fmt: skip
    def test_takes_what_is_nearly_right_and_says_how(
        self, box: Sandbox, tmp_path: Path, change: Callable[[str], str], used: str
    ) -> None:
        new = NUMBERS.replace("line 20\n", "twenty\n")
        patch = change(edited(tmp_path, {"numbers.txt": NUMBERS.encode()}, {"numbers.txt": new.encode()}))
        refused(box, patch)
        result = applied(box, patch, "fuzzy")
        assert result.ok, result
        assert used in result.used
        assert box.read_file("/srv/numbers.txt").decode() == new

    def test_takes_paths_without_prefixes(self, box: Sandbox) -> None:
        patch = GOLD.replace("a/keep.txt", "pkg/a.py").replace("b/keep.txt", "pkg/a.py")
        patch = patch.replace("-one\n+ONE\n two\n three\n", "-a = 1\n+a = 2\n").replace("1,3", "1")
        assert "lack the prefixes" in refused(box, patch)
        assert applied(box, patch, "fuzzy").used == "with paths as they stand"
        assert seen(box, "cat pkg/a.py") == "a = 2\n"

    def test_keeps_the_line_ends_of_a_file_with_crlf(self, box: Sandbox) -> None:
        box.write_file("/srv/keep.txt", b"one\r\ntwo\r\nthree\r\n")
        assert applied(box, GOLD + new_file("fresh"), "fuzzy").ok
        assert (box.read_file("/srv/keep.txt"), box.read_file("/srv/fresh")) == (b"ONE\r\ntwo\r\nthree\r\n", b"x\n")

    def test_does_not_take_what_is_wrong(self, box: Sandbox) -> None:
        wrong = GOLD.replace("-one", "-uno").replace(" two", " due").replace(" three", " tre")
        assert "line 1 of the file is 'one'" in refused(box, wrong + new_file("fresh"), "fuzzy")

    def test_tells_the_program_patch_nothing_but_what_was_understood(self, box: Sandbox) -> None:
        """GNU patch would believe `Index:` lines, `ed` scripts and names below `.git`."""
        ed = "Index: .git/hooks/post-checkout\n--- a/keep.txt\n+++ b/keep.txt\n0a\ntouch /srv/ran\n.\n!touch /srv/ran\n"
        refused(box, ed, "fuzzy")
        sly = GOLD.replace("-one", "-uno").replace("diff", "Index: .git/config\ndiff", 1)
        applied(box, sly, "fuzzy")
        assert seen(box, "ls ran .git/hooks/post-checkout 2>/dev/null; git status --short .git") == ""

    def test_does_without_the_program_patch(self, box: Sandbox) -> None:
        seen(box, "mkdir -p /usr/local/bin; echo '#!/no' > /usr/local/bin/patch; chmod +x /usr/local/bin/patch")
        assert "line 1 of the file is 'one'" in refused(box, GOLD.replace("-one", "-uno"), "fuzzy")


@pytest.mark.ci
class TestThreeWay:
    def patch(self, box: Sandbox) -> str:
        """A fix of the file as the image has it."""
        return seen(box, "sed -i s/one/ONE/ keep.txt; git diff --full-index; git checkout -q keep.txt")

    def test_merges_with_the_blobs_of_the_image(self, box: Sandbox) -> None:
        patch = self.patch(box)
        box.write_file("/srv/keep.txt", b"one\ntwo\nTHREE\n")
        assert "hunk 1" in refused(box, patch)
        before = seen(box, "sha256sum .git/index")
        result = applied(box, patch, "three_way")
        assert (result.ok, result.used) == (True, "merged with the blobs that it names"), result
        assert seen(box, "cat keep.txt") == "ONE\ntwo\nTHREE\n"
        assert seen(box, "sha256sum .git/index; ls -A /tmp") == before

    def test_a_conflict_changes_nothing(self, box: Sandbox) -> None:
        patch = self.patch(box)
        box.write_file("/srv/keep.txt", b"uno\ntwo\nthree\n")
        assert "the merge of keep.txt has conflicts" in refused(box, patch + new_file("fresh"), "three_way")

    def test_blobs_that_the_image_does_not_have_are_a_refusal(self, box: Sandbox) -> None:
        patch = self.patch(box)
        index = next(line for line in patch.splitlines() if line.startswith("index "))
        patch = patch.replace(index, f"index {'12' * 20}..{'34' * 20} 100644")
        box.write_file("/srv/keep.txt", b"uno\ntwo\nthree\n")
        assert "hunk 1 of 1" in refused(box, patch, "three_way")


def test_a_patch_is_read_file_by_file() -> None:
    patch = (
        "From: someone\n\n" + GOLD + new_link("l", "t") + "--- old.c\t2020\n+++ new.c\t2021\n@@ -1 +1,2 @@\n \n+--- x\n"
        'diff --git "a/caf\\303\\251" "b/caf\\303\\251"\n--- "a/caf\\303\\251"\n+++ "b/caf\\303\\251"\n'
        "@@ -3,2 +3 @@ def f\n x\n--- a\n-- \n2.1\n"
    )  # fmt: skip
    found = files(patch)
    assert [file.path() for file in found] == ["keep.txt", "l", "new.c", "café"]
    assert [len(file.hunks) for file in found] == [1, 1, 1, 1]
    assert found[2].hunks[0].lines == [" ", "+--- x"]
    assert found[3].hunks[0].lines == [" x", "--- a"]
    assert [file.bare for file in found] == [False, False, True, False]
    assert dataclasses.asdict(found[0].hunks[0])["header"] == "@@ -1,3 +1,3 @@"
