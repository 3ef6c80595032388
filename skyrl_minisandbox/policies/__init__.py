"""What answers a scaffold: the trainer's texts, an endpoint, a script.

The scaffold always talks to an `InvertedPolicy`; `script` and `openai` answer in the driver's loop.
"""

from __future__ import annotations

from typing import Any

from skyrl_minisandbox.plugins import load_plugin, make_plugin
from skyrl_minisandbox.policies.inverted import InvertedPolicy
from skyrl_minisandbox.policies.policy import Message, Policy, PolicyStopped

__all__ = ["InvertedPolicy", "Message", "Policy", "PolicyStopped", "load_policy"]

POLICIES = {
    "inverted": "skyrl_minisandbox.policies.inverted:InvertedPolicy",
    "script": "skyrl_minisandbox.policies.script:ScriptPolicy",
    "openai": "skyrl_minisandbox.policies.openai:OpenAIPolicy",
}


def load_policy(name: str, *, task_id: str = "", **config: Any) -> Policy:
    """Make the policy of one conversation.

    name: a key of `POLICIES`, or a dotted path to a class with `query`, whose keyword arguments are
    `config` and `task_id`. Raises `PluginError` for an unknown name, `InputError` for an unknown or missing
    key.
    """
    factory = load_plugin("policy", name, POLICIES, export="a class with `query(messages) -> str`")
    if name != "inverted":
        config = {**config, "task_id": task_id}
    policy: Policy = make_plugin("policy", name, factory, config)
    return policy
