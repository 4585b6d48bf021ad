"""The metrics that rounding may change from layout to layout, and by how much."""

import pytest

# near 0 the differences of log-probs, and means of numbers of both signs, have the rounding of what they are
# made of
SELF_REWARD_CANCELS = {
    *("rewards_chosen_mean", "rewards_rejected_mean", "rewards_margin_mean", "rewards_all_mean"),
    *("rewards_all_std", "logratio_abs_mean"),
}
SELF_REWARD_ROUNDED = {
    *("loss", "preference_loss", "sft_loss", "data_loss", "grad_norm"),
    *("logprobs_chosen_mean", "logprobs_rejected_mean"),
}


def close_self_reward(name: str, value: float) -> object:
    """Tolerance of a metric: counts of responses, scores or tokens are exact, the rest to 1e-5.

    The audit's errors are nothing but rounding, which each layout has of its own.
    """
    kind = name.partition("/")[2]
    if name.startswith("audit/"):
        return pytest.approx(0.0, abs=1e-5)
    if kind in SELF_REWARD_CANCELS:
        return pytest.approx(value, rel=1e-5, abs=1e-5)
    return pytest.approx(value, rel=1e-5) if kind in SELF_REWARD_ROUNDED else value


# Means of numbers of about unit size that have both signs, such as whitened advantages, or that are the
# differences of such numbers, as in all kinds of KL: near 0 they have the rounding of what they are made of.
# The same goes for explained variance, 1 minus a share, and gradients, in which tokens of both signs meet.
PPO_CANCELS = {
    "audit/surprise",
    *(f"train_rollouts/{name}_mean" for name in ("advantages", "values", "returns")),
    *(f"train_rollouts/{name}" for name in ("init_policy_kl", "rewards_with_kl", "explained_variance")),
    *(
        f"train_optim/{name}"
        for name in ("loss", "approx_kl", "ratio_error", "grad_norm", "critic_grad_norm")
    ),
}
