"""Puts our models into timm's registry as soon as timm is there, without importing it for that.

timm takes longer to import than a checkpoint takes to be read, and most work with a model needs none of it. So when
this package is imported before timm, a hook waits for `timm.models` and registers the models after it; when timm is
there already, they are registered at once. Either way `timm.create_model("visformer_small_v2")` works.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AWAITED = "timm.models"


def register_with_timm() -> None:
    """Register now if timm is imported, else when it will be; doing it twice changes nothing."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    from visformer.models.timm_models import register

    register()


class _Waiting(MetaPathFinder):
    """Finds `timm.models` as the others would, once, with a loader that registers our models after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of `timm.models`; None for all other modules, which leaves them to the other finders."""
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """A loader that does what another does, and then registers our models."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other does; the module then has the other's loader again, as resources and reloading want it."""
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        _register()
