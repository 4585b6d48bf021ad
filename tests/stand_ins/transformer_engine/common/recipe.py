"""Megatron derives a class from this one."""


class DelayedScaling:
    pass
