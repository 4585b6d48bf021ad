"""Packages of tests/stand_ins, importable one at a time under the names of what they stand in for."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder

from tests.support.files import ROOT

FOLDER = ROOT / "tests" / "stand_ins"


class StandIn:
    """A finder of one package for `sys.meta_path`: the folder on `sys.path` would offer all of them."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(FOLDER)]) if name == self.package else None


def install(package: str) -> None:
    """Make the stand-in for `package` what `import package` finds in this process."""
    sys.meta_path.insert(0, StandIn(package))
