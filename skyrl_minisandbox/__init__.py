"""SkyRL environments for software-engineering agents, in namespace sandboxes instead of containers.

Importing this package imports neither Ray, torch nor skyrl_gym, prints nothing and makes nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "register"]


def register() -> None:
    """Make `skyrl_gym.make("minisandbox", ...)` known. Call it in the process that runs the generator.

    Calling it again changes nothing.
    """
    from skyrl_minisandbox.env import register as register_env

    register_env()
