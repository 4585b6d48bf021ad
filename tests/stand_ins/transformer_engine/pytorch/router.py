"""Megatron imports these for models with experts."""


def fused_topk_with_score_function() -> None:
    raise AssertionError("no experts here")


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function
