"""The 80 probes in their order: `python3 -m inside.probes`. Prints a JSON line `[id, verdict, detail]` for each."""

from __future__ import annotations

from . import rows_calls, rows_files, rows_limits, rows_processes  # noqa: F401  (they register their rows)
from .common import ROWS, facts, run

GROUPS = "pfknishlr"


def order() -> list[str]:
    """Row names by group, then by number, as the table has them."""
    return sorted((name for name in ROWS if name[0] in GROUPS), key=lambda name: (GROUPS.index(name[0]), name))


if __name__ == "__main__":
    wanted = facts().get("rows")
    run([name for name in order() if not wanted or name in wanted])
