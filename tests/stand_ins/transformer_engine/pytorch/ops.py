"""Megatron names these in annotations."""


class Sequential:
    pass


class FusibleOperation:
    pass
