"""Preference losses: numbers worked by hand, gradients, the papers' equations, and what TRL computes."""

import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from align.errors import UserError
from align.losses import preference
from align.losses.statistics import log_ratio_statistics, pair_statistics
from tests.support.tensors import f64

# Sequence log-probabilities


def test_sequence_logprobs_by_hand():
    """Three sequences of 3, 0 and 2 places, then two of padding, one of which a wrong mask would let in."""
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0])
    mask = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    sums = preference.sequence_logprobs(logprobs, mask, [3, 0, 2])
    assert sums.dtype == torch.float64
    assert sums.tolist() == [-6.0, 0.0, -8.0]  # -2 - 4; nothing; -8
    assert preference.sequence_logprobs(logprobs, mask, [3, 0, 2], average=True).tolist() == [-3.0, 0.0, -8.0]


def test_sequence_logprobs_without_trained_tokens_is_zero():
    logprobs, mask = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.0, 0.0, 1.0])
    for average in (False, True):
        assert preference.sequence_logprobs(logprobs, mask, [2, 1], average).tolist() == [0.0, -3.0]


def test_sequence_logprobs_of_a_batch_of_padding_is_empty_and_differentiable():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    for average in (False, True):
        sums = preference.sequence_logprobs(logprobs, torch.zeros(2), [], average)
        assert sums.shape == (0,)
        sums.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_sequence_logprobs_gradient():
    """d sum / d logprob = mask; of a mean, mask / trained tokens. Weights 3 and 5 on two sequences."""
    mask, weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, 5.0]).double()
    for average, expected in ((False, [3.0, 0.0, 3.0, 5.0, 0.0]), (True, [1.5, 0.0, 1.5, 5.0, 0.0])):
        logprobs = torch.randn(5, requires_grad=True)
        (preference.sequence_logprobs(logprobs, mask, [3, 1], average) * weights).sum().backward()
        assert logprobs.grad.tolist() == expected  # the fifth place is padding, whatever the mask says of it


def test_sequence_logprobs_gradcheck():
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    for average in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, average=average: preference.sequence_logprobs(x, mask, [2, 0, 3], average),
            torch.randn(6, dtype=torch.float64, requires_grad=True),
        )


def test_sequence_logprobs_sums_in_float64():
    """2^24 + 1 is the first integer that float32 does not hold: its sum of these two loses the 1."""
    logprobs = torch.tensor([-(2.0**24), -1.0])
    assert logprobs.sum().item() == -(2.0**24)
    assert preference.sequence_logprobs(logprobs, torch.ones(2), [2]).item() == -(2.0**24) - 1


# Preference losses: the oracle. Each paper's equation, literally in probabilities, in decimals of 100 digits,
# which overflow nowhere here. Arguments: log-probabilities of the pair, of the policy (c, r) and of the
# reference (u, v).


def s(x: Decimal) -> Decimal:
    """The logistic function."""
    return 1 / (1 + (-x).exp())


def ratio(x: Decimal, y: Decimal) -> Decimal:
    """log of pi / pi_ref, from the probabilities."""
    return (x.exp() / y.exp()).ln()


def kl(p: Decimal, not_p: Decimal, q: Decimal, not_q: Decimal) -> Decimal:
    """KL divergence of two Bernoulli distributions."""
    return p * (p / q).ln() + not_p * (not_p / not_q).ln()


def h(c: Decimal, r: Decimal, u: Decimal, v: Decimal) -> Decimal:
    """h of the module's docstring, with the four probabilities in one fraction."""
    return (c.exp() * v.exp() / (u.exp() * r.exp())).ln()


def smoothed_dpo(
    c: Decimal, r: Decimal, u: Decimal, v: Decimal, b: Decimal, e: Decimal, sign: int
) -> Decimal:
    """-(1 - e) log s(b h) - sign e log s(-b h)."""
    x = b * h(c, r, u, v)
    return -(1 - e) * s(x).ln() - sign * e * s(-x).ln()


def bernoulli(x: Decimal) -> tuple[Decimal, Decimal]:
    """The two probabilities of a Bernoulli distribution with logit x."""
    return s(x), s(-x)


ORACLES = {
    "dpo": lambda c, r, u, v, b: -s(b * ratio(c, u) - b * ratio(r, v)).ln(),
    "cdpo": lambda c, r, u, v, b, label_smoothing: smoothed_dpo(c, r, u, v, b, label_smoothing, 1),
    "robust": lambda c, r, u, v, b, label_smoothing: (
        smoothed_dpo(c, r, u, v, b, label_smoothing, -1) / (1 - 2 * label_smoothing)
    ),
    "ipo": lambda c, r, u, v, b: (h(c, r, u, v) - 1 / b / 2) ** 2,
    "hinge": lambda c, r, u, v, b: max(Decimal(0), 1 - b * h(c, r, u, v)),
    "scale": lambda c, r, u, v, b, gap: abs(gap) * -s(b * h(c, r, u, v)).ln(),
    "rpo_bwd_kl": lambda c, r, u, v, b, gap: kl(*bernoulli(gap), *bernoulli(b * h(c, r, u, v))),
    "rpo_fwd_kl": lambda c, r, u, v, b, gap: kl(*bernoulli(b * h(c, r, u, v)), *bernoulli(gap)),
    "rpo_sq": lambda c, r, u, v, b, gap: (b * h(c, r, u, v) - gap) ** 2,
    "kto_pair": lambda c, r, u, v, b, kl_chosen, kl_rejected: (
        (1 - s(b * (ratio(c, u) - kl_rejected)) + 1 - s(b * (kl_chosen - ratio(r, v)))) / 2
    ),
    "simpo": lambda c, r, u, v, b, simpo_gamma: -s(b * c - b * r - simpo_gamma).ln(),
    "orpo": lambda c, r, u, v, b: -b * s(((c.exp() / (1 - c.exp())) / (r.exp() / (1 - r.exp()))).ln()).ln(),
    "dpop": lambda c, r, u, v, b, dpop_lambda: (
        -s(b * (h(c, r, u, v) - dpop_lambda * max(Decimal(0), ratio(u, c)))).ln()
    ),
    "apo_zero": lambda c, r, u, v, b: 1 - s(b * ratio(c, u)) + s(b * ratio(r, v)),
    "sppo_hard": lambda c, r, u, v, b: (ratio(c, u) - 1 / b / 2) ** 2 + (ratio(r, v) + 1 / b / 2) ** 2,
    "exo_pair": lambda c, r, u, v, b, label_smoothing: kl(
        *bernoulli(b * h(c, r, u, v)), 1 - label_smoothing, label_smoothing
    ),
    "nca_pair": lambda c, r, u, v, b: (
        -s(b * ratio(c, u)).ln() - (s(-b * ratio(c, u)).ln() + s(-b * ratio(r, v)).ln()) / 2
    ),
}
DEFAULTS = {
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "simpo": {"simpo_gamma": 0.5},
    "dpop": {"dpop_lambda": 50.0},
    "exo_pair": {"label_smoothing": 0.001},
}
REWARD_AWARE = ("scale", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
AVERAGED = ("simpo", "orpo")


def random_pairs() -> list[torch.Tensor]:
    """Four [12] tensors of log-probabilities: ordinary answers, then averages per token that are near 0."""
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(4, 12, generator=generator, dtype=torch.float64)
    return list(-draws * torch.tensor([60.0] * 4 + [5.0] * 4 + [0.01] * 4))


def extreme_pairs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Four [16] tensors: every mixture of a log-probability near 0 (-1e-6, ...) with one of -1e4.

    The small ones differ, so that no argument of a maximum is exactly 0.
    """
    return list(
        torch.tensor(
            [
                [-1e4 - 3.0 * k if far else -1e-6 * (k + 1) for k, far in enumerate(pair)]
                for pair in itertools.product((False, True), repeat=4)
            ],
            dtype=dtype,
        ).T.contiguous()
    )


def own_parameters(name: str, pairs: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Arguments of a loss besides the log-probabilities and beta."""
    if name in REWARD_AWARE:
        return {"gap": torch.linspace(-3.0, 4.0, pairs, dtype=torch.float64).to(dtype)}
    if name == "kto_pair":
        return {"kl_chosen": torch.tensor(2.5, dtype=dtype), "kl_rejected": torch.tensor(0.75, dtype=dtype)}
    return {}


def oracle(
    name: str, inputs: list[torch.Tensor], beta: float, own: dict, shift: tuple = (0, 0, 0, 0)
) -> list:
    """[P] decimals: the paper's equation at every pair, with `shift` added to the four log-probabilities."""
    values = []
    for i, quadruple in enumerate(zip(*(tensor.tolist() for tensor in inputs), strict=True)):
        parameters = {k: t[i].item() if t.dim() else t.item() for k, t in own.items()} | DEFAULTS.get(
            name, {}
        )
        numbers = [Decimal(x) + dx for x, dx in zip(quadruple, shift, strict=True)]
        values.append(
            ORACLES[name](*numbers, Decimal(beta), **{k: Decimal(x) for k, x in parameters.items()})
        )
    return values


def oracle_gradient(name: str, inputs: list[torch.Tensor], beta: float, own: dict) -> list[list[float]]:
    """[4][P]: central differences of the oracle. A step of 1e-30 leaves an error of about 1e-60."""
    step = Decimal(10) ** -30
    gradients = []
    for argument in range(4):
        at = [tuple(sign * step * (argument == k) for k in range(4)) for sign in (1, -1)]
        up, down = (oracle(name, inputs, beta, own, shift) for shift in at)
        gradients.append([float((a - b) / (2 * step)) for a, b in zip(up, down, strict=True)])
    return gradients


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("make", [random_pairs, extreme_pairs])
@pytest.mark.parametrize("name", ORACLES)
def test_preference_loss_and_gradient_against_the_paper(name, make, beta):
    """Values and all four gradients, also at log-ratios of 1e4, against the equation in 100 digits."""
    inputs = [tensor.requires_grad_() for tensor in make()]
    own = own_parameters(name, len(inputs[0]))
    value = getattr(preference, name)(*inputs, beta, **own)
    gradient = torch.autograd.grad(value.sum(), inputs, materialize_grads=True, allow_unused=True)
    with localcontext() as context:
        context.prec = 100
        expected = [float(x) for x in oracle(name, inputs, beta, own)]
        expected_gradient = oracle_gradient(name, inputs, beta, own)
    assert value.shape == inputs[0].shape and value.dtype == torch.float64
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-10, atol=1e-13)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ORACLES)
def test_preference_loss_gradcheck(name):
    inputs = [tensor[:8].detach().requires_grad_() for tensor in random_pairs()]
    own = own_parameters(name, 8)
    assert torch.autograd.gradcheck(
        lambda *logprobs: getattr(preference, name)(*logprobs, 0.3, **own), inputs
    )


@pytest.mark.parametrize("name", ORACLES)
def test_preference_loss_is_finite_in_float32(name):
    """The reference or the rewards may be float32: no branch may give inf or NaN there either."""
    inputs = [tensor.requires_grad_() for tensor in extreme_pairs(torch.float32)]
    value = getattr(preference, name)(*inputs, 0.5, **own_parameters(name, 16, torch.float32))
    gradient = torch.autograd.grad(value.sum(), inputs, materialize_grads=True, allow_unused=True)
    assert value.isfinite().all() and all(part.isfinite().all() for part in gradient)


# Preference losses: worked by hand


def test_golden_vectors():
    """h = [2, -1], R_w - R_l = [3, 2], beta 0.1, eta 1; the means, as printed to seven decimals.

    The squares by hand: ipo ((2 - 5)^2 + (-1 - 5)^2) / 2 = 22.5; rpo_sq (2.8^2 + 2.1^2) / 2 = 6.125.
    """
    logprobs = [
        torch.tensor(x, dtype=torch.float64) for x in ([-3.0, -6.0], [-4.0, -5.0], [-4.0, -7.0], [-3.0, -7.0])
    ]
    own = {"gap": torch.tensor([3.0, 2.0], dtype=torch.float64)}
    golden = {
        "dpo": 0.6712678,
        "ipo": 22.5,
        "rpo_bwd_kl": 0.3919508,
        "rpo_fwd_kl": 0.5979505,
        "rpo_sq": 6.125,
        "scale": 1.6416050,
    }
    for name, printed in golden.items():
        value = getattr(preference, name)(*logprobs, 0.1, **(own if name in REWARD_AWARE else {}))
        assert abs(value.mean().item() - printed) < 1e-7, name


def one(*numbers: float) -> list[torch.Tensor]:
    """Each number as a float64 tensor of one pair."""
    return [torch.tensor([number], dtype=torch.float64) for number in numbers]


def test_dpo_by_hand():
    """r_w = -1 - -2 = 1, r_l = -5 - -4 = -1, h = 2; with beta = ln(3) / 2, s(ln 3) = 3/4: L = ln(4/3)."""
    value = preference.dpo(*one(-1.0, -5.0, -2.0, -4.0), math.log(3) / 2)
    np.testing.assert_allclose(value.item(), math.log(4 / 3), rtol=1e-14)


def test_other_losses_by_hand():
    """The same pair, r_w = 1, r_l = -1, h = 2, with beta = ln 3: s(beta r_w) = 3/4, s(beta h) = 9/10."""
    logprobs, beta, ln = one(-1.0, -5.0, -2.0, -4.0), math.log(3), math.log
    zero, unit = torch.tensor(0.0).double(), torch.tensor(1.0).double()
    by_hand = {
        "cdpo": -0.9 * ln(0.9) - 0.1 * ln(0.1),
        "robust": (-0.9 * ln(0.9) + 0.1 * ln(0.1)) / 0.8,
        "apo_zero": 1 - 3 / 4 + 1 / 4,
        "nca_pair": -ln(3 / 4) - (ln(1 / 4) + ln(3 / 4)) / 2,
        "exo_pair": 0.9 * ln(0.9 / 0.999) + 0.1 * ln(0.1 / 0.001),
        "dpop": -ln(0.9),  # the chosen response is above its reference: no penalty
        "sppo_hard": 2 * (1 - 1 / (2 * beta)) ** 2,
        "ipo": (2 - 1 / (2 * beta)) ** 2,
        "hinge": 0.0,  # 1 - 2 ln 3 < 0
    }
    for name, value in by_hand.items():
        np.testing.assert_allclose(
            getattr(preference, name)(*logprobs, beta).item(), value, rtol=1e-13, err_msg=name
        )
    # z_w = 1 moves the rejected half to s(beta (-1 - 1)) = 1/10; the chosen half stays at 1 - 3/4
    kto = preference.kto_pair(*logprobs, beta, kl_chosen=unit, kl_rejected=zero)
    np.testing.assert_allclose(kto.item(), (1 / 4 + 1 / 10) / 2, rtol=1e-13)


def test_dpop_penalty_by_hand():
    """r_w = -1, r_l = -3, h = 2; lambda 5: h - 5 * 1 = -3; beta = ln(2) / 3: s(-ln 2) = 1/3, L = ln 3."""
    value = preference.dpop(*one(-3.0, -7.0, -2.0, -4.0), math.log(2) / 3, dpop_lambda=5.0)
    np.testing.assert_allclose(value.item(), math.log(3), rtol=1e-13)


def test_simpo_and_orpo_by_hand_without_a_reference():
    """Probabilities 3/4 and 1/2 per token: odds 3 and 1, so orpo = -beta ln(3 / (3 + 1)).

    simpo, beta 2 and gamma ln(2): 2 (ln(3/4) - ln(1/2)) - ln(2) = ln(9/4 / 2), s = 9/17.
    """
    chosen, rejected = one(math.log(3 / 4), math.log(1 / 2))
    orpo = preference.orpo(chosen, rejected, None, None, 0.25)
    np.testing.assert_allclose(orpo.item(), -0.25 * math.log(3 / 4), rtol=1e-13)
    simpo = preference.simpo(chosen, rejected, None, None, 2.0, simpo_gamma=math.log(2))
    np.testing.assert_allclose(simpo.item(), math.log(17 / 9), rtol=1e-13)


def test_orpo_next_to_a_probability_of_one_is_accurate():
    """log pi(w) = -x with x = 1e-12: odds 1/x; pi(l) = 1/2: odds 1; L = ln(1 + x) = x, each to 12 digits.

    1 - exp(-x) by subtraction would be wrong in the fifth digit.
    """
    value = preference.orpo(*one(-1e-12, math.log(0.5)), None, None, 1.0).item()
    np.testing.assert_allclose(value, 1e-12, rtol=1e-11)


def test_orpo_with_a_probability_of_one_stays_finite():
    """A log-probability that rounds to 0 has infinite odds; the other response still gets its gradient."""
    for dtype in (torch.float32, torch.float64):
        chosen = torch.tensor([0.0, -1.0, 0.0], dtype=dtype, requires_grad=True)
        rejected = torch.tensor([-1.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
        value = preference.orpo(chosen, rejected, None, None, 1.0)
        value.sum().backward()
        assert value.isfinite().all() and value[0] < 1e-6 and value[1] > 10 and value[2] == math.log(2)
        assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
        assert chosen.grad[1] < -0.5  # -s(log odds(l) - log odds(w)) / (1 - exp(-1)) = -1.58


def test_losses_at_the_reference():
    """policy == reference: h = r_w = r_l = 0. DPO is ln 2 to the last bit."""
    policy, beta, ln2 = [tensor.detach() for tensor in random_pairs()[:2]], 0.1, math.log(2)
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert (preference.dpo(*policy, *policy, beta) == ln2).all()
    at_reference = {
        "cdpo": ln2,
        "robust": ln2,
        "dpop": ln2,
        "nca_pair": 2 * ln2,
        "ipo": 25.0,  # 1 / (2 beta) = 5
        "sppo_hard": 50.0,
        "hinge": 1.0,
        "apo_zero": 1.0,
        "exo_pair": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    }
    for name, value in at_reference.items():
        ours = getattr(preference, name)(*policy, *policy, beta).numpy()
        np.testing.assert_allclose(ours, value, rtol=1e-14, err_msg=name)
    assert (preference.kto_pair(*policy, *policy, beta, zero, zero) == 0.5).all()


# Preference losses: symmetries


def swapped(logprobs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same pairs with the labels the wrong way round."""
    c, r, u, v = logprobs
    return [r, c, v, u]


def test_swapping_the_responses():
    logprobs, beta = random_pairs(), 0.3
    flip, h = swapped(logprobs), (logprobs[0] - logprobs[2]) - (logprobs[1] - logprobs[3])
    close = torch.testing.assert_close
    close(preference.dpo(*flip, beta) - preference.dpo(*logprobs, beta), beta * h)  # log s(x) - log s(-x) = x
    close(preference.apo_zero(*flip, beta) + preference.apo_zero(*logprobs, beta), torch.full_like(h, 2.0))
    z = torch.tensor([2.5, 0.75], dtype=torch.float64)
    close(
        preference.kto_pair(*flip, beta, z[1], z[0]) + preference.kto_pair(*logprobs, beta, z[0], z[1]),
        torch.ones_like(h),
    )
    close(
        preference.orpo(*flip, 1.0) - preference.orpo(*logprobs, 1.0),
        torch.logit(logprobs[0].exp()) - torch.logit(logprobs[1].exp()),
    )


def test_swapping_the_responses_and_their_rewards_changes_nothing():
    logprobs, gap = random_pairs(), own_parameters("scale", 12)["gap"]
    for name in ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"):
        loss = getattr(preference, name)
        torch.testing.assert_close(loss(*swapped(logprobs), 0.3, -gap), loss(*logprobs, 0.3, gap))
    assert torch.equal(preference.scale(*logprobs, 0.3, -gap), preference.scale(*logprobs, 0.3, gap))


def test_rpo_is_zero_where_the_policy_has_the_gap_of_the_rewards():
    logprobs = random_pairs()
    gap = 0.3 * ((logprobs[0] - logprobs[2]) - (logprobs[1] - logprobs[3]))
    for name in ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"):
        value = getattr(preference, name)(*logprobs, 0.3, gap)
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-15, rtol=0)


def test_robust_is_unbiased_under_flipped_labels():
    """(1 - e) robust(pair) + e robust(flipped pair) = dpo(pair): hence the divisor 1 - 2 e."""
    logprobs = random_pairs()
    mean = 0.8 * preference.robust(*logprobs, 0.3, 0.2) + 0.2 * preference.robust(
        *swapped(logprobs), 0.3, 0.2
    )
    torch.testing.assert_close(mean, preference.dpo(*logprobs, 0.3))


def test_label_smoothing_zero_is_dpo():
    logprobs = random_pairs()
    for loss in (preference.cdpo, preference.robust):
        assert torch.equal(loss(*logprobs, 0.3, 0.0), preference.dpo(*logprobs, 0.3))


@pytest.mark.parametrize(
    "name, value", [("cdpo", 0.5), ("cdpo", -0.1), ("robust", 0.5), ("exo_pair", 0.0), ("exo_pair", math.nan)]
)
def test_label_smoothing_out_of_range_is_refused(name, value):
    with pytest.raises(UserError, match=rf"--label-smoothing {value}: must be in [\[(]0, 0.5\)"):
        getattr(preference, name)(*random_pairs(), 0.1, label_smoothing=value)


# Preference losses: what TRL gives. Recorded from TRL's own functions on the pairs below, with float64 as
# torch's default type:
#   1.16.0: DPOTrainer._compute_loss with one token a response, CPOTrainer.cpo_loss,
#           ORPOTrainer.odds_ratio_loss
#   0.11.4: DPOTrainer.dpo_loss ("sigmoid" with label_smoothing is cdpo; 1.16.0 has no cdpo)
#   0.8.6:  DPOTrainer.dpo_loss (0.11.4 has no kto_pair)
# label_smoothing 0.1 for cdpo and robust, 0.001 for exo_pair; simpo_gamma 0.5. What differs from ours:
#   ipo: TRL 1.16.0 divides each log-ratio by its number of tokens, which eq. 17 does not do; with averages as
#     its arguments ours is the same.
#   kto_pair: TRL returns 2 P values, chosen then rejected, and lets gradients through the two KL means, which
#     the paper does not; ours is half of the sum of a pair.
#   orpo: TRL returns beta log s(.), to be subtracted, and computes it in float32: hence the tolerance.

TRL_FOUR = (
    [-10.0, -25.5, -7.25, -40.0, -12.0],
    [-14.0, -21.0, -7.75, -90.0, -3.0],
    [-11.5, -24.0, -7.25, -60.0, -9.0],
    [-12.5, -22.5, -7.25, -55.0, -8.5],
)
TRL_AVERAGES = ([-0.2, -1.5, -0.01, -3.0, -0.7], [-0.9, -1.1, -0.6, -0.05, -0.7])
TRL = [  # name, version, relative tolerance, values with beta 0.1, with beta 0.5
    (
        "dpo",
        "1.16.0, 0.11.4",
        1e-12,
        [
            0.5543552444685271,
            0.8543552444685272,
            0.6684596480132863,
            0.0040784432705707205,
            1.2058650684421959,
        ],
        [
            0.2014132779827524,
            1.7014132779827524,
            0.5759394198788436,
            1.1399918530437055e-12,
            4.264163456931505,
        ],
    ),
    (
        "robust",
        "1.16.0, 0.11.4",
        1e-12,
        [0.5168552444685272, 0.8918552444685272, 0.6622096480132862, -0.6834215567294294, 1.3121150684421958],
        [0.013913277982752388, 1.8889132779827524, 0.5446894198788435, -3.43749999999886, 4.795413456931505],
    ),
    ("ipo", "1.16.0, 0.11.4", 1e-12, [4.0, 64.0, 20.25, 2500.0, 182.25], [4.0, 16.0, 0.25, 2916.0, 90.25]),
    ("hinge", "1.16.0, 0.11.4", 1e-12, [0.7, 1.3, 0.95, 0.0, 1.85], [0.0, 2.5, 0.75, 0.0, 5.25]),
    (
        "apo_zero",
        "1.16.0, 0.11.4",
        1e-12,
        [0.9251403093125008, 1.0748596906874992, 0.9875026035157897, 0.148515152773474, 1.2085781078224596],
        [0.641642601649214, 1.358357398350786, 0.9378234991142019, 4.5422978693317306e-05, 1.757487826019636],
    ),
    (
        "sppo_hard",
        "1.16.0, 0.11.4",
        1e-12,
        [24.5, 84.5, 45.25, 1125.0, 174.25],
        [0.5, 12.5, 1.25, 1517.0, 58.25],
    ),
    (
        "exo_pair",
        "1.16.0, 0.11.4",
        1e-12,
        [2.25819919150928, 3.286511608956382, 2.6752266585807987, 0.002647742744607396, 4.229262962040539],
        [0.7859172949383137, 5.172735356992834, 2.3395447503878346, 0.00100050030896741, 6.736687383830771],
    ),
    (
        "nca_pair",
        "1.16.0, 0.11.4",
        1e-12,
        [1.3169140955790641, 1.466914095579064, 1.3739505948465611, 1.205267225700769, 1.6342791074344598],
        [1.1487420122297998, 1.8987420122297998, 1.3276904807793397, 5.000068110903821, 3.208103711475728],
    ),
    (
        "cdpo",
        "0.11.4",
        1e-12,
        [0.5843552444685272, 0.8243552444685273, 0.6734596480132863, 0.5540784432705708, 1.120865068442196],
        [0.35141327798275246, 1.5514132779827523, 0.6009394198788436, 2.75000000000114, 3.839163456931505],
    ),
    (
        "kto_pair",
        "0.8.6",
        1e-12,
        [
            0.4625701546562504,
            0.5374298453437496,
            0.5,
            0.11920292202211769,
            0.5744425168116589,
            0.37989356765690985,
            0.45264238185691064,
            0.4037173007032121,
            0.021041347020468337,
            0.5523079095743252,
        ],
        [
            0.320821300824607,
            0.679178699175393,
            0.5,
            4.5397868702390376e-05,
            0.8175744761936437,
            0.07943854918397841,
            0.27888482197713693,
            0.12455335818741642,
            4.5871817455633845e-09,
            0.740774899182154,
        ],
    ),
    (
        "simpo",
        "1.16.0",
        1e-12,
        [0.9310837825796714, 0.9991627362708936, 0.9377628284942445, 1.1676534691049882, 0.9740769841801067],
        [0.7709570477895321, 1.103186048885458, 0.80089113280824, 2.1049411034552743, 0.9740769841801067],
    ),
    (
        "orpo",
        "1.16.0",
        1e-06,
        [
            0.014122781343758106,
            0.10069449245929718,
            0.0012150591937825084,
            0.59222412109375,
            0.06931471824645996,
        ],
        [0.07061390578746796, 0.5034724473953247, 0.006075296085327864, 2.96112060546875, 0.3465735912322998],
    ),
]


@pytest.mark.parametrize("name, version, rtol, tenth, half", TRL, ids=[f"{row[0]}-{row[1]}" for row in TRL])
def test_preference_loss_equals_trl(name, version, rtol, tenth, half):
    logprobs = [torch.tensor(x, dtype=torch.float64) for x in TRL_FOUR]
    if name in AVERAGED:
        logprobs = [*(torch.tensor(x, dtype=torch.float64) for x in TRL_AVERAGES), None, None]
    own = {}
    if name == "kto_pair":  # TRL's own estimates: max(0, mean r_w) = 17 / 5, max(0, mean r_l) = max(0, -6)
        own = {"kl_chosen": torch.tensor(3.4, dtype=torch.float64), "kl_rejected": torch.tensor(0.0)}
    for beta, recorded in ((0.1, tenth), (0.5, half)):
        if name == "kto_pair":
            recorded = [(a + b) / 2 for a, b in zip(recorded[:5], recorded[5:], strict=True)]
        value = getattr(preference, name)(*logprobs, beta, **own)
        np.testing.assert_allclose(value.numpy(), recorded, rtol=rtol)


# ---- what is logged of pairs -------------------------------------------------------------------------------


def test_pair_statistics_by_hand():
    """Rewards (2, 1), (0, 0), (-1, 3): one right, one tie, which is a mistake, one wrong."""
    statistics = pair_statistics(f64(2, 0, -1), f64(1, 0, 3))
    assert {name: value.item() for name, value in statistics.items()} == {
        "acc": 1.0,
        "rewards_chosen_mean": 1.0,
        "rewards_rejected_mean": 4.0,
        "rewards_margin_mean": -3.0,
        "rewards_all_mean": 2.5,
        "rewards_all_square": 7.5,  # (4 + 0 + 1 + 1 + 0 + 9) / 2
    }


def test_log_ratio_statistics_by_hand():
    """Log-ratios 2 and -1 of chosen, 1 and 3 of rejected answers, beta 0.5."""
    statistics = log_ratio_statistics(f64(-8, -6), f64(-4, -2), f64(-10, -5), f64(-5, -5), beta=0.5)
    assert statistics["acc"].item() == 1.0
    assert statistics["rewards_chosen_mean"].item() == 0.5
    assert statistics["rewards_rejected_mean"].item() == 2.0
    assert statistics["logprobs_chosen_mean"].item() == -14.0
    assert statistics["logprobs_rejected_mean"].item() == -6.0
    assert statistics["logratio_abs_mean"].item() == 3.5  # (2 + 1 + 1 + 3) / 2


def test_statistics_of_no_pairs_are_zero():
    statistics = log_ratio_statistics(*[f64()] * 4, beta=0.1)
    assert all(value.item() == 0.0 for value in statistics.values())
