"""Lets timm import where torchvision is absent: names only, for models that use none of them.

Run as a module it starts pytest on its arguments with the names in place, so that no other test in
this process sees a torchvision.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import sys
import types

from torch import nn


class _Names(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            modes = "nearest bilinear bicubic box hamming lanczos"
            return enum.Enum(name, {mode.upper(): mode for mode in modes.split()})
        return type(name, (nn.Module,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Names(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


if __name__ == "__main__":
    sys.meta_path.insert(0, _Finder())
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
