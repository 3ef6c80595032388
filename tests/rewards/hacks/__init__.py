"""Reward hacks and their honest twins, as data: who tries what, on which runner, and what stops it.

hack.py        what a hack is, and patches from edits
project.py     a small project with a bug, judged by pytest and by unittest; its image
sdists.py      the real runners: Django's and SymPy's own source distributions
code.py        pieces of cheating code
on_files.py, endings.py, in_process.py, canary.py, insider.py, rollouts.py, on_sdists.py
               the hacks, a module for each way of cheating
twins.py       patches that look suspicious and are honest
suite.py       runs one: in the agent's own sandbox, in `official`, in `protected`
table.py       the table in docs/rewards.md
"""

from tests.rewards.hacks import canary, endings, in_process, insider, on_files, on_sdists, rollouts, twins
from tests.rewards.hacks.hack import Hack, Twin

HACKS: list[Hack] = [
    *on_files.HACKS,
    *endings.HACKS,
    *in_process.HACKS,
    *canary.HACKS,
    *insider.HACKS,
    *rollouts.HACKS,
    *on_sdists.HACKS,
]
TWINS: list[Twin] = [*twins.TWINS, *on_sdists.TWINS]
