"""SkyRL's own tests of its generator, with ours in its place. They are read from a checkout of SkyRL:

    MINISANDBOX_SKYRL_CHECKOUT=DIR scripts/test night tests/skyrl/test_upstream.py
"""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.skyrl.environment import trainer_python
from tests.support import REPOSITORY, needs

CHECKOUT = os.environ.get("MINISANDBOX_SKYRL_CHECKOUT", "")

pytestmark = [
    pytest.mark.night,
    needs("network"),
    pytest.mark.skipif(not CHECKOUT, reason="MINISANDBOX_SKYRL_CHECKOUT names no checkout of SkyRL"),
]

FILES = ("test_skyrl_gym_generator.py", "test_skyrl_gym_generator_chat_templating.py", "test_generator_output_utils.py")

INSTEAD = """
from skyrl.train.generators import skyrl_gym_generator
from skyrl_minisandbox.training.generator import MiniSandboxGenerator

skyrl_gym_generator.SkyRLGymGenerator = MiniSandboxGenerator
"""


def passed(directory: Path, *options: str) -> set[str]:
    """The tests that pass, in the checkout and with its SkyRL."""
    report = directory / "report.xml"
    found = [path for path in (Path(CHECKOUT) / "tests" / "train" / "generators").glob("test_*") if path.name in FILES]
    assert found, f"no tests of the generator below {CHECKOUT}"
    # Ours must be no package there: both have one named `tests`. The checkout stands first, this repository last.
    subprocess.run(
        [str(trainer_python()), "-m", "pytest", "-q", f"--junitxml={report}", *options, *map(str, found)],
        cwd=CHECKOUT,
        # What wants a tokenizer from a hub fails at once, with either; HF_HUB_OFFLINE=0 runs it.
        env={"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{directory}"},
        timeout=1200,
        check=False,
    )
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}.{case.get('name')}" for case in cases if len(case) == 0}


def test_skyrls_own_tests_pass_with_our_generator(tmp_path: Path) -> None:
    assert REPOSITORY not in Path(CHECKOUT).resolve().parents
    stock = passed(tmp_path)
    assert len(stock) >= 40  # without an asynchronous plug-in of pytest's or a network most fail
    (tmp_path / "minisandbox_instead.py").write_text(INSTEAD)
    ours = passed(tmp_path, "-p", "minisandbox_instead")
    assert stock - ours == set()
