"""Imports of a command that only prints its help: empty stand-ins for the libraries that take seconds.

Megatron, transformers and their kin take most of the CPU time of a script's imports, and its flags need none
of them. Sphinx's `autodoc_mock_imports` does the same for documentation.
"""

import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

LIBRARIES = (
    *("huggingface_hub", "megatron", "safetensors", "sentencepiece", "tokenizers", "transformers", "triton"),
    "torch.distributed.checkpoint",
    "torch.nn.attention.varlen",  # imports torch's compiler
)


def only_help(arguments: Sequence[str]) -> bool:
    """True if a command line ends in --help and has no other flag: it can only print its help and end."""
    *others, last = ("", *arguments)
    return last in ("-h", "--help") and not any(word.startswith("-") for word in others)


class StandIn(type):
    """A class that has every attribute, takes every subscript, and is returned by every call of it."""

    def __getattr__(cls, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name, (), {})

    def __getitem__(cls, _: Any) -> "StandIn":
        return cls

    def __call__(cls, *_: Any, **__: Any) -> "StandIn":
        return cls


class Library(types.ModuleType):
    """A module whose every name is a stand-in."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> StandIn:
        return StandIn("", (), {}).__getattr__(name)


class Finder(MetaPathFinder, Loader):
    """Importer of stand-ins for LIBRARIES and their submodules."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        heavy = any(fullname == name or fullname.startswith(f"{name}.") for name in LIBRARIES)
        return ModuleSpec(fullname, self, is_package=True) if heavy else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Library(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""
