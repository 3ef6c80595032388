"""Recipes, building, the store and the node cache. Knows nothing of agents or tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_minisandbox.images.build import build_image as build_image
    from skyrl_minisandbox.images.cache import Cache as Cache
    from skyrl_minisandbox.images.cache import Checkout as Checkout
    from skyrl_minisandbox.images.image import Image as Image
    from skyrl_minisandbox.images.recipe import Recipe as Recipe
    from skyrl_minisandbox.images.sources import Sources as Sources
    from skyrl_minisandbox.images.store import Store as Store

__all__ = ["Cache", "Checkout", "Image", "Recipe", "Sources", "Store", "build_image"]

_WHERE = {
    "Cache": "cache",
    "Checkout": "cache",
    "Image": "image",
    "Recipe": "recipe",
    "Sources": "sources",
    "Store": "store",
    "build_image": "build",
}


def __getattr__(name: str) -> Any:
    # On use, not on import: tasks reads recipes and sources, and needs neither zstandard nor a store for it.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
