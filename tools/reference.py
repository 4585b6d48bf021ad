"""An independent reference of every number of a step: plain PyTorch and transformers, sequence by sequence.

It imports nothing of align, and no Megatron. Models are transformers' own, their matrices in float64 (norms
and rotary angles are computed in float32 by transformers); losses, advantages and schedules are written out
from the papers. `tools.check` and `tools.conformance` compare runs with it.

In preference losses w is the chosen and l the rejected response, s the logistic function, and
r_w = log pi(w) - log pi_ref(w), r_l = log pi(l) - log pi_ref(l).
"""

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

Model = Any  # of transformers
Numbers = list[float]

# ---- models --------------------------------------------------------------------------------------


def load(
    directory: Path,
    labels: int = 0,
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype = torch.float32,
    seed: int = 1234,
    head_std: float | None = None,
) -> Model:
    """Load a language model, or with `labels` a reward model, from a Hugging Face directory.

    Args:
        dtype: of the computation.
        weights: to which the weights are rounded first, as in the run.
        seed, head_std: of the random weights of a directory without any, and of the new head of a language
            model; None: 1 / sqrt(H + 1) (arXiv 2009.01325).
    """
    config = AutoConfig.from_pretrained(directory)
    fresh = labels and not any("SequenceClassification" in name for name in config.architectures)
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    options: dict[str, Any] = {"num_labels": labels} if labels else {}
    if any([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        options |= {"dtype": weights, "attn_implementation": "eager"}
        model = kind.from_pretrained(directory, **options)
    else:
        model = kind.from_config(config, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            fill(parameter, name, config.initializer_range, seed)
    if fresh:
        std = (config.hidden_size + 1) ** -0.5 if head_std is None else head_std
        fill(model.score.weight, "score.weight", std, seed)
    for parameter in model.parameters():  # not the rotary frequencies, which stay in float32
        parameter.data = parameter.data.to(weights).to(dtype)
    return model.eval()


@torch.no_grad()
def fill(parameter: Tensor, name: str, std: float, seed: int) -> None:
    """Random weights with a generator for each name: matrices normal, norms 1, biases 0."""
    if name.endswith("bias") or parameter.dim() == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def token_logprobs(
    model: Model, ids: Sequence[int], temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """log p(ids[t + 1] | ids[: t + 1]) [n - 1] in nats, of softmax(logits / temperature).

    `vocab_size`: ids from there on have probability 0.
    """
    x = torch.tensor([list(ids)], device=model.device)
    logits = model(x).logits[0, :-1, :vocab_size].double() / temperature
    return logits.log_softmax(-1).gather(1, x[0, 1:, None])[:, 0]


def token_entropies(
    model: Model, ids: Sequence[int], temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """Entropy -sum_v p_v log p_v [n - 1] of each next token's distribution, in nats."""
    x = torch.tensor([list(ids)], device=model.device)
    logprobs = (model(x).logits[0, :-1, :vocab_size].double() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def values(model: Model, ids: Sequence[int]) -> Tensor:
    """A reward model's values [n, A], each read at the hidden state of its token."""
    x = torch.tensor([list(ids)], device=model.device)
    hidden = model.base_model(x).last_hidden_state[0].double()
    return hidden @ model.score.weight.double().T


def sequence_logprob(logprobs: Tensor, trained: Sequence[bool], average: bool = False) -> Tensor:
    """Sum, or mean, of the log-probs [n - 1] of the trained tokens [n] of a sequence."""
    own = logprobs[torch.tensor(list(trained[1:]), device=logprobs.device)]
    return own.mean() if average else own.sum()


def gradients(model: Model) -> dict[str, Tensor]:
    """The gradient of each weight by its name in the Hugging Face directory; 0 where autograd gave none."""
    named = model.named_parameters()
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in named}


# ---- supervised losses ---------------------------------------------------------------------------


def sft(logprobs: Tensor, trained: Sequence[bool]) -> Tensor:
    """Negative log-likelihood of the trained tokens of a sequence, a sum: a step divides by their number."""
    return -sequence_logprob(logprobs, trained)


def ranking(chosen: Tensor, rejected: Tensor, margin: float = 0.0, center: float = 0.0) -> Tensor:
    """-log s(R_w - R_l - m) (arXiv 2203.02155; margin: 2307.09288, eq. 2) + c (R_w + R_l)^2 (2312.09244)."""
    return -log_s(chosen - rejected - margin) + center * (chosen + rejected) ** 2


def regression(scores: Tensor, labels: Sequence[float], missing: float = -100.0) -> Tensor:
    """Squared error over the attributes [A] of a text that are rated (SteerLM, arXiv 2310.05344)."""
    return sum(
        ((x - y) ** 2 for x, y in zip(scores, labels, strict=True) if y != missing), start=0 * scores[0]
    )


# ---- preference losses ---------------------------------------------------------------------------


def log_s(x: Tensor) -> Tensor:
    """log s(x) = -log(1 + exp(-x))."""
    return -torch.logaddexp(torch.zeros_like(x), -x)


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(Bern(s(p)) || Bern(s(q)))."""
    terms = [log_s(sign * p).exp() * (log_s(sign * p) - log_s(sign * q)) for sign in (1, -1)]
    return terms[0] + terms[1]


def dpo(r_w: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """-log s(beta (r_w - r_l)) (arXiv 2305.18290, eq. 7)."""
    return -log_s(beta * (r_w - r_l))


def ipo(r_w: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """(r_w - r_l - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17)."""
    return (r_w - r_l - 0.5 / beta) ** 2


def scale(r_w: Tensor, r_l: Tensor, beta: float, gap: float) -> Tensor:
    """|g| times the loss of DPO (HelpSteer2-Preference, arXiv 2410.01257)."""
    return abs(gap) * dpo(r_w, r_l, beta)


def rpo_bwd_kl(r_w: Tensor, r_l: Tensor, beta: float, gap: float) -> Tensor:
    """KL(Bern(s(g)) || Bern(s(beta (r_w - r_l)))) (arXiv 2406.11704, 2502.00203)."""
    return bernoulli_kl(torch.full_like(r_w, gap), beta * (r_w - r_l))


def rpo_fwd_kl(r_w: Tensor, r_l: Tensor, beta: float, gap: float) -> Tensor:
    """KL(Bern(s(beta (r_w - r_l))) || Bern(s(g))) (arXiv 2502.00203)."""
    return bernoulli_kl(beta * (r_w - r_l), torch.full_like(r_w, gap))


def rpo_sq(r_w: Tensor, r_l: Tensor, beta: float, gap: float) -> Tensor:
    """(beta (r_w - r_l) - g)^2 (arXiv 2502.00203)."""
    return (beta * (r_w - r_l) - gap) ** 2


def cdpo(r_w: Tensor, r_l: Tensor, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """(1 - e) times the loss of DPO + e times that of the swapped pair (ericmitchell.ai/cdpo.pdf)."""
    return (1 - label_smoothing) * dpo(r_w, r_l, beta) + label_smoothing * dpo(r_l, r_w, beta)


def robust(r_w: Tensor, r_l: Tensor, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """[(1 - e) DPO - e DPO of the swapped pair] / (1 - 2 e) (arXiv 2403.00409)."""
    kept, swapped = (1 - label_smoothing) * dpo(r_w, r_l, beta), label_smoothing * dpo(r_l, r_w, beta)
    return (kept - swapped) / (1 - 2 * label_smoothing)


def hinge(r_w: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta (r_w - r_l)) (arXiv 2309.06657)."""
    return (1 - beta * (r_w - r_l)).clamp(min=0)


def kto_pair(r_w: Tensor, r_l: Tensor, beta: float, kl_chosen: float, kl_rejected: float) -> Tensor:
    """[1 - s(beta (r_w - z_l)) + 1 - s(beta (z_w - r_l))] / 2, z the means of the step (arXiv 2402.01306)."""
    return (2 - log_s(beta * (r_w - kl_rejected)).exp() - log_s(beta * (kl_chosen - r_l)).exp()) / 2


def simpo(r_w: Tensor, r_l: Tensor, beta: float, simpo_gamma: float = 0.5) -> Tensor:
    """-log s(beta (log pi(w) / |w| - log pi(l) / |l|) - gamma) (arXiv 2405.14734); here r are these means."""
    return -log_s(beta * (r_w - r_l) - simpo_gamma)


def orpo(r_w: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """-beta log s(log odds(w) - log odds(l)), odds = p / (1 - p), log p = r (arXiv 2403.07691, eq. 7)."""
    odds_w, odds_l = (r - torch.log(1 - r.exp()) for r in (r_w, r_l))
    return -beta * log_s(odds_w - odds_l)


def dpop(r_w: Tensor, r_l: Tensor, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """-log s(beta (r_w - r_l - lambda max(0, -r_w))) (arXiv 2402.13228)."""
    return -log_s(beta * (r_w - r_l - dpop_lambda * (-r_w).clamp(min=0)))


def apo_zero(r_w: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """1 - s(beta r_w) + s(beta r_l) (arXiv 2408.06266, eq. 7)."""
    return 1 - log_s(beta * r_w).exp() + log_s(beta * r_l).exp()


def sppo_hard(r_w: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2 (arXiv 2405.00675)."""
    return (r_w - 0.5 / beta) ** 2 + (r_l + 0.5 / beta) ** 2


def exo_pair(r_w: Tensor, r_l: Tensor, beta: float, label_smoothing: float = 0.001) -> Tensor:
    """KL(Bern(s(beta (r_w - r_l))) || Bern(1 - e)) (arXiv 2402.00856, eq. 16)."""
    target = math.log((1 - label_smoothing) / label_smoothing)
    return bernoulli_kl(beta * (r_w - r_l), torch.full_like(r_w, target))


def nca_pair(r_w: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """-log s(beta r_w) - [log s(-beta r_w) + log s(-beta r_l)] / 2 (arXiv 2402.05369)."""
    return -log_s(beta * r_w) - (log_s(-beta * r_w) + log_s(-beta * r_l)) / 2


PREFERENCE: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(dpo, ipo, scale, rpo_bwd_kl, rpo_fwd_kl, rpo_sq, cdpo, robust, hinge),
        *(kto_pair, simpo, orpo, dpop, apo_zero, sppo_hard, exo_pair, nca_pair),
    )
}
FLAGS = ("label_smoothing", "simpo_gamma", "dpop_lambda")  # of train_dpo.py, arguments of these losses

# ---- reinforcement learning ----------------------------------------------------------------------


def kl(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || pi_ref) by token, of d = log pi - log pi_ref (joschu.net/blog/kl-approx.html)."""
    d = logprobs - ref_logprobs
    return {"k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": torch.expm1(-d) + d}[name]


def token_rewards(score: float, kl: Numbers, kl_coef: float) -> Numbers:
    """Rewards of a response's tokens: -c kl, and the score at the last (arXiv 2203.02155, 3.5)."""
    return [-kl_coef * x + (score if t == len(kl) - 1 else 0.0) for t, x in enumerate(kl)]


def gae(rewards: Numbers, values: Numbers, gamma: float, gae_lambda: float) -> Numbers:
    """Advantages of a response's tokens (arXiv 1506.02438, eq. 16): sum_k (gamma lambda)^k delta_{t+k}."""
    advantages, later, next_value = [0.0] * len(rewards), 0.0, 0.0
    for t in range(len(rewards) - 1, -1, -1):
        delta = rewards[t] + gamma * next_value - values[t]
        later = delta + gamma * gae_lambda * later
        advantages[t], next_value = later, values[t]
    return advantages


def rewards_to_go(rewards: Numbers, gamma: float) -> Numbers:
    """REINFORCE: the discounted sum of a token's reward and the later ones."""
    return [sum(gamma**k * x for k, x in enumerate(rewards[t:])) for t in range(len(rewards))]


def whiten(x: Numbers) -> Numbers:
    """(x - mean) / sqrt(var + 1e-8) over all tokens of a step; 0 if all are equal."""
    mean = math.fsum(x) / len(x)
    variance = math.fsum((y - mean) ** 2 for y in x) / len(x)
    return [0.0 if min(x) == max(x) else (y - mean) / math.sqrt(variance + 1e-8) for y in x]


def grpo(
    returns: Numbers, counted: Sequence[bool], correction: int = 1, divisor: float | None = None
) -> Numbers:
    """(R - mean) / (std + 1e-4) of the counted responses to a prompt (arXiv 2402.03300, 4.1.2), else 0.

    `divisor`: in place of std + 1e-4.
    """
    own = [x for x, is_counted in zip(returns, counted, strict=True) if is_counted]
    if len(own) < 2 or min(own) == max(own):
        return [0.0] * len(returns)
    mean = math.fsum(own) / len(own)
    if divisor is None:
        divisor = math.sqrt(math.fsum((x - mean) ** 2 for x in own) / (len(own) - correction)) + 1e-4
    return [
        (x - mean) / divisor if is_counted else 0.0 for x, is_counted in zip(returns, counted, strict=True)
    ]


def rloo(returns: Numbers, counted: Sequence[bool]) -> Numbers:
    """R - mean of the other counted responses to the prompt (arXiv 2402.14740); 0 where not counted."""
    own = [x for x, is_counted in zip(returns, counted, strict=True) if is_counted]
    if len(own) < 2 or min(own) == max(own):
        return [0.0] * len(returns)
    others = [(math.fsum(own) - x) / (len(own) - 1) for x in returns]
    return [x - y if is_counted else 0.0 for x, y, is_counted in zip(returns, others, counted, strict=True)]


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) [n], r = pi / pi_old (arXiv 1707.06347, eq. 7)."""
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clip(1 - clip, 1 + clip) * advantages)


def reinforce_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi [n]: CISPO (arXiv 2506.13585) where the policy is the one that sampled."""
    return -advantages * logprobs


def sapo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, tau: Sequence[float]) -> Tensor:
    """-A 4 sigmoid(tau (r - 1)) / tau [n] (arXiv 2511.20347); tau: for A > 0, and for the others."""
    ratio, temperature = torch.exp(logprobs - old_logprobs), tau[1] + (advantages > 0) * (tau[0] - tau[1])
    return -advantages * 4 / temperature / (1 + torch.exp(-temperature * (ratio - 1)))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 [n], c = 0: no clip (arXiv 2005.12729)."""
    clipped = old_values + (values - old_values).clip(-clip, clip) if clip else values
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


# ---- optimizer -----------------------------------------------------------------------------------


def learning_rate(peak: float, least: float, warmup: int, constant: int, step: int, total: int) -> float:
    """Linear warm-up over steps 0 ... warmup - 1, half a cosine, constant tail."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = min((step - warmup) / max(total - warmup - constant, 1), 1.0)
    return least + 0.5 * (peak - least) * (1 + math.cos(math.pi * share))
