"""The README's first command from a clean clone, twice, as root and as an ordinary user."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.night.test_wheel_matrix import account
from tests.support import REPOSITORY, needs, require

pytestmark = [pytest.mark.night, needs("userns", "overlay", "network", "git")]


@pytest.mark.parametrize("who", ["root", "user"])
def test_quickstart_goes_from_a_clean_clone_to_rewards_and_reuses_what_it_built(who: str) -> None:
    require("rootless" if who == "user" else "root")
    with account(who, "3.11") as (someone, python):
        clone = someone.home / "clone"
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(REPOSITORY), str(clone)], check=True, timeout=120)
        if who == "user":
            owner = someone.home.owner()
            subprocess.run(["chown", "-R", f"{owner}:", str(clone)], check=True, timeout=60)
        command: list[str | Path] = [
            "env",
            "-C",
            someone.home,
            f"PYTHON={python}",
            "bash",
            clone / "scripts" / "quickstart",
        ]
        for _ in range(2):
            printed = someone.call(command, timeout=900)
            assert "mean reward 1.000 over" in printed
            assert printed.splitlines()[-1].startswith(f"run directory: {clone}/runs/")
        assert len(list((clone / "runs").iterdir())) == 2
        found = subprocess.run(
            ["git", "-c", "safe.directory=*", "-C", str(clone), "status", "--porcelain"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert found.stdout == ""
