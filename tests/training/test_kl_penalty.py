"""Flags of the KL penalty: the estimator, the adapted coefficient, and what is refused."""

import pytest

from align.errors import UserError
from align.losses import rl
from align.training.kl_penalty import KlConfig


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.11, 0.02 * (1 + 0.1 * 64 / 1000)),
        (0.5, 0.02 * (1 + 0.2 * 64 / 1000)),  # the error is clipped to 0.2
        (0.09, 0.02 * (1 - 0.1 * 64 / 1000)),
        (-0.01, 0.02 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_coefficient_is_adapted(kl, expected):
    """From the coefficient of the step before, not from --kl-coef, and by the 64 responses of a step."""
    config = KlConfig(kl_target=0.1, kl_horizon=1000.0)
    latest = {"train_rollouts/kl_coef": 0.02, "train_rollouts/init_policy_kl": kl}
    for done in (2, 7):
        assert config.coef_after(done, latest, 64) == pytest.approx(expected, rel=1e-12)


def test_coefficient_before_a_kl_was_seen():
    """The flag's, without --kl-target and as long as the policy that sampled was the reference."""
    latest = {"train_rollouts/kl_coef": 0.02, "train_rollouts/init_policy_kl": 0.0}
    assert KlConfig(kl_coef=0.03).coef_after(9, latest, 64) == 0.03
    adapted = KlConfig(kl_coef=0.03, kl_target=0.1)
    assert adapted.coef_after(0, {"val_rollouts/rewards": 1.0}, 64) == 0.03
    assert [adapted.coef_after(done, latest, 64) for done in range(-4, 2)] == [0.03] * 6  # PPO's warm-up


def test_place_and_estimator():
    """k1 in the reward, k3 in the loss; flags win."""
    for config, auto, place, estimator in (
        (KlConfig(), "reward", "reward", rl.kl_k1),
        (KlConfig(), "loss", "loss", rl.kl_k3),
        (KlConfig(kl="abs"), "reward", "reward", rl.kl_abs),
        (KlConfig(kl="k2"), "loss", "loss", rl.kl_k2),
        (KlConfig(kl_in="loss"), "reward", "loss", rl.kl_k3),
        (KlConfig(kl_in="reward"), "loss", "reward", rl.kl_k1),
    ):
        assert (config.place(auto), config.estimator(config.place(auto))) == (place, estimator), config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kl_coef": 0.0, "kl": "k2"}, "--kl k2 has no effect with --kl-coef 0: there is no reference"),
        ({"kl_coef": 0.0, "kl_in": "loss"}, "--kl-in loss has no effect with --kl-coef 0"),
        ({"kl_coef": 0.0, "kl_target": 0.1}, "--kl-target 0.1 has no effect with --kl-coef 0"),
        ({"kl_horizon": 99.0}, "--kl-horizon 99.0 has no effect without --kl-target"),
    ],
)
def test_flags_without_effect_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        KlConfig(**flags).check("reward", 64, KlConfig())
