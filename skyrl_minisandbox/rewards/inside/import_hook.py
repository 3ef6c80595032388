# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""Do something to a module as soon as it has been imported, for reporters that a `.pth` file loads.

That file is read by every Python process, so nothing is imported here.
"""


def after_import(actions):
    """actions: function of the module by module name; each runs once. Returns a function that ends the waiting."""
    import sys

    meta_path = sys.meta_path

    class Finder:
        def find_spec(self, name, path=None, target=None):
            action = actions.get(name)
            if action is None:
                return None
            for finder in list(meta_path):
                find = None if finder is self else getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find is not None else None
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec, action)
                    return spec
            return None

    finder = Finder()
    meta_path.insert(0, finder)

    def end():
        if finder in meta_path:
            meta_path.remove(finder)

    return end


class _Loader:
    """Stands in for the module's own loader until it has run."""

    def __init__(self, spec, action):
        self._spec = spec
        self._loader = spec.loader
        self._action = action

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        create = getattr(self._loader, "create_module", None)
        return create(spec) if create is not None else None

    def exec_module(self, module):
        self._spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._action(module)
