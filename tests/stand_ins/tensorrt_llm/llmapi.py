"""The part of tensorrt_llm.llmapi that the stand-in has. See the package."""

import typing
from dataclasses import dataclass
from types import UnionType


def checked(options: object) -> None:
    """Raise TypeError where a field of a dataclass is not of the type that it is declared with."""
    for name, kind in typing.get_type_hints(type(options)).items():
        kinds = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
        value = getattr(options, name)
        if type(value) not in {typing.get_origin(one) or one for one in kinds}:
            raise TypeError(f"{type(options).__name__}: {name} is {value!r}, not {kind}")


@dataclass
class KvCacheConfig:
    """The memory of keys and values."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = 0.9

    def __post_init__(self) -> None:
        checked(self)


@dataclass
class CudaGraphConfig:
    """For which batch sizes CUDA graphs are made."""

    batch_sizes: list[int] | None = None
    max_batch_size: int = 0
    enable_padding: bool = False

    def __post_init__(self) -> None:
        checked(self)
