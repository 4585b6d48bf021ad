"""The KL penalty of PPO and GRPO for leaving the model that training starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from align import flags
from align.errors import UserError
from align.losses import rl

ESTIMATORS = {"k1": rl.kl_k1, "abs": rl.kl_abs, "k2": rl.kl_k2, "k3": rl.kl_k3}


@dataclass(frozen=True)
class KlConfig:
    """KL penalty for leaving the model that training starts from."""

    kl_coef: float = 0.01
    """KL penalty coefficient beta, per nat; 0 loads no reference model"""
    kl_in: Literal["auto", "reward", "loss"] = "auto"
    """place of the KL penalty: subtracted from each token's reward, or added to the loss. auto: loss with
    --advantages grpo, whose division by the spread of rewards would blow it up, else reward"""
    kl: Literal["auto", "k1", "abs", "k2", "k3"] = "auto"
    """KL estimator at a token, of d = log pi - log pi_ref: k1 d, abs |d|, k2 d^2 / 2, k3 exp(-d) - 1 + d.
    auto: k1 in the reward, k3 in the loss"""
    kl_target: float | None = None
    """target KL in nats per token, to which --kl-coef is adapted after each step (default: no adaptation)"""
    kl_horizon: float = 10000.0
    """horizon of the adaptive KL coefficient, in responses; above a fifth of the responses of a step"""

    def __post_init__(self):
        flags.check_ranges(
            self,
            kl_coef=flags.COEFFICIENT,
            kl_target=flags.above(0, 1e6),
            kl_horizon=flags.above(0, 1e12),
        )

    def place(self, auto: str) -> str:
        """--kl-in, with `auto` for "auto"."""
        return auto if self.kl_in == "auto" else self.kl_in

    def estimator(self, place: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Function of log-probs of policy and reference, [N] each, that --kl names."""
        return ESTIMATORS[{"auto": "k3" if place == "loss" else "k1"}.get(self.kl, self.kl)]

    def check(self, place: str, responses_per_step: int, default: "KlConfig") -> None:
        """Raise UserError for flags that do not go together; `default`: the script's."""
        if self.kl_target is not None and self.kl_horizon * 5 <= responses_per_step:
            raise UserError(
                f"--kl-horizon {self.kl_horizon} must be above a fifth of the {responses_per_step} responses "
                "of a step: --kl-coef could fall below 0"
            )
        if place == "loss" and self.kl == "k1":
            raise UserError("--kl k1 in the loss: its gradient averages to 0; give --kl k2 or k3")
        if self.kl_coef == 0:
            why = "with --kl-coef 0: there is no reference"
            flags.refuse_unused(self, default, "kl kl_in kl_target", why)
        if self.kl_target is None:
            flags.refuse_unused(self, default, "kl_horizon", "without --kl-target")

    def coef_after(self, done: int, latest: dict[str, float], responses_per_step: int) -> float:
        """KL penalty coefficient after `done` steps of the policy; `latest`: metrics of the last one."""
        if self.kl_target is None or done < 2:
            return self.kl_coef  # no KL was seen yet: the last policy that sampled was the reference
        kl_coef, kl = (latest[f"train_rollouts/{name}"] for name in ("kl_coef", "init_policy_kl"))
        return rl.adapted_kl_coef(kl_coef, kl, self.kl_target, self.kl_horizon, responses_per_step)
