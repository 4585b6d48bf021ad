"""Megatron enters this context around a layer whose precision a configuration overrides: never here."""


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast() -> None:
    raise AssertionError("8-bit products are not played")


fp8_model_init = fp8_autocast  # imported by Megatron-Core 0.19
