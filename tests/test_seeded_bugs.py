"""The usual silent bugs of such code, seeded one by one: the audit stops the run, or a named test fails.

What the audit is to catch is in seeded_bugs_worker.py. It compares log-probs, so it is blind to rewards and
losses, to gradients, and to a sampler that draws other tokens than its log-probs say: those are the tests'.
"""

import json
import re
import shutil
from collections.abc import Callable

import pytest
import torch
import transformers

from align.data import toy
from align.generation import audit
from align.losses import rl
from align.training import offload
from tests import test_data, test_logprobs, test_losses_ppo, test_offload, test_sampling
from tests.conftest import ROOT, SIZES, fork_ranks
from tests.seeded_bugs_worker import (
    CASES,
    COLLATE,
    FLAGS,
    POSITIONS,
    PROCESSES,
    UNSTOPPED,
    Bug,
    mutant,
    seeded,
)

MESSAGES = {
    "sampler": r"RuntimeError: audit: token \d+ of response [01] to row \d+ was sampled with log-prob .*, "
    r"training computes .*: the sampler and the trainer do not compute the same model",
    "ratio": r"RuntimeError: audit: at the first update of a rollout the policy's ratio is off 1 by .*",
    # not the audit's words, but the run stops
    "lengths": r"RuntimeError: split_with_sizes expects split_sizes to sum exactly to .*",
    "ends": r"RuntimeError: audit: response \d+ to row \d+ ended, but its last token \d+ is none that .*",
}
Ran = dict[int, list[dict[str, dict]]]

# ---- by the audit of a run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """How all runs end: by number of processes, rank and case."""
    given, found = tmp_path_factory.mktemp("given"), {}
    toy.write(given, num_train=16, num_val=1)
    shutil.copytree(ROOT / "assets" / "tiny", given / "model")
    torch.manual_seed(0)  # large random weights: each token matters to those after it, as in a trained model
    sizes = SIZES | dict(vocab_size=264, num_hidden_layers=2, bos_token_id=257, eos_token_id=258)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(given / "model")
    for processes in (1, 2):
        output = tmp_path_factory.mktemp(f"on{processes}")
        fork_ranks(processes, "tests/seeded_bugs_worker.py", given, output)
        ranks = [output / f"rank{rank}.json" for rank in range(processes)]
        found[processes] = [json.loads(rank.read_text()) for rank in ranks]
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_run_with_this_bug_is_stopped(name, ran):
    """On every rank, by the right check, at the first step that the bug can show in."""
    case = CASES[name]
    for found in ran[PROCESSES[case.flags]]:
        message = found[name]["message"]
        assert message and re.fullmatch(MESSAGES[case.caught], message), message
        assert [step["step"] for step in found[name]["steps"]] == [1, 2][: case.after]


@pytest.mark.parametrize("flags", FLAGS)
def test_the_same_run_without_a_bug_ends_well(flags, ran):
    mean, largest, _ = audit.BOUNDS[torch.float32]
    for found in ran[PROCESSES[flags]]:
        assert found[f"{flags} alone"]["message"] is None
        steps = found[f"{flags} alone"]["steps"]
        assert [step["step"] for step in steps] == [1, 2]
        for step in steps:
            assert step["audit/logprob_error"] < mean / 5
            assert step["audit/logprob_error_max"] < largest / 5
            assert step["audit/ratio_error"] == 0.0


@pytest.mark.parametrize("name", UNSTOPPED)
def test_a_wrong_gradient_shows_beside_one_process(name, ran):
    """The audit sees no gradient; test_ppo_invariance.py compares layouts, by numbers such as this norm."""
    [one], bugged = ran[1], ran[PROCESSES[UNSTOPPED[name].flags]]

    def norm(run: dict) -> float:
        assert run["message"] is None
        return run["steps"][0]["train_optim/grad_norm"]

    for found in bugged:
        for layout in ("tp 2 alone", "dp 2 alone"):
            assert norm(found[layout]) == pytest.approx(norm(one["usual alone"]), rel=1e-5)
        assert norm(found[name]) != pytest.approx(norm(one["usual alone"]), rel=0.1)


# ---- by a named test -------------------------------------------------------------------------------

LOSSES, LENT = "align.losses.rl", "align.training.offload.Weights.swapped_into"
OF_NEXT, CLIPPED = "F.pad(value, (0, 1))[:, 1:]", "clamp(old_values - value_clip, old_values + value_clip)"
Test = Callable[[], None]


def ppo(name: str) -> Test:
    """A test of test_losses_ppo.py."""
    return getattr(test_losses_ppo, f"test_{name}")


def lent_weights() -> None:
    test_offload.test_lent_weights_compute_and_leave_no_trace(offload.HostStore())


def gradients_at_a_temperature() -> None:
    test_logprobs.test_values_and_gradients(5, 0.7, False)


OF_LOSSES: dict[str, tuple[str, str, str, Test]] = {  # function, words, others, test
    "the score stands one token early": (
        "token_rewards",
        ".cumsum(0) - 1]",
        ".cumsum(0) - 2]",
        ppo("the_score_is_on_the_last_token_and_nowhere_else"),
    ),
    "KL is rewarded": ("token_rewards", "-kl_coef * kl", "kl_coef * kl", ppo("ppo_golden_vector")),
    "KL has the wrong sign": (
        "kl_k1",
        "return logprobs - ref_logprobs",
        "return ref_logprobs - logprobs",
        ppo("kl_estimators_by_hand"),
    ),
    "k3 has its ratio upside down": (
        "kl_k3",
        "torch.expm1(-d) + d",
        "torch.expm1(d) - d",
        ppo("kl_estimators_by_hand"),
    ),
    "the KL coefficient moves the wrong way": (
        "adapted_kl_coef",
        "1 + error",
        "1 - error",
        ppo("adapted_kl_coef_by_hand"),
    ),
    "gae: this token's value in place of the next one's": ("gae", OF_NEXT, "value", ppo("gae_golden_vector")),
    "gae: after an answer comes the next answer's value": (
        "gae",
        OF_NEXT,
        "pad_sequence(values.roll(-1).split(lengths), batch_first=True)",
        ppo("gae_does_not_look_across_answers"),
    ),
    "gae: lambda is left out": (
        "gae",
        "gamma * gae_lambda * later",
        "gamma * later",
        ppo("gae_against_its_sum"),
    ),
    "whitening leaves the mean": (
        "whiten",
        "(x - x.mean())",
        "x",
        ppo("whiten_has_mean_zero_and_variance_one"),
    ),
    "rloo: an answer is in its own baseline": (
        "rloo",
        "- own) / (number - 1).clamp(min=1)",
        ") / number.clamp(min=1)",
        ppo("rloo_golden_vector"),
    ),
    "rloo: answers left out are in the baseline": (
        "rloo",
        "torch.where(counted, returns, 0.0)",
        "returns",
        ppo("rloo_by_hand"),
    ),
    "grpo: the mean is over prompts": (
        "grpo",
        "returns, 0.0).sum(1,",
        "returns, 0.0).sum(0,",
        ppo("grpo_by_hand"),
    ),
    "policy: answers left out are trained": (
        "policy_loss",
        "mask.bool()",
        "torch.ones_like(mask).bool()",
        ppo("policy_loss_does_not_look_at_masked_tokens"),
    ),
    "policy: the ratio is upside down": (
        "policy_loss",
        "(logprobs - old_logprobs).exp()",
        "(old_logprobs - logprobs).exp()",
        ppo("policy_loss_four_cases_by_hand"),
    ),
    "policy: the clip is on the wrong side": (
        "policy_loss",
        "torch.maximum",
        "torch.minimum",
        ppo("policy_loss_four_cases_by_hand"),
    ),
    "policy: the clip is on one side": (
        "policy_loss",
        "clamp(1 - clip, 1 + clip)",
        "clamp(max=1 + clip)",
        ppo("policy_loss_four_cases_by_hand"),
    ),
    "policy: a mean in place of the sum": (
        "policy_loss",
        "clipped_loss).sum(), statistics",
        "clipped_loss).mean(), statistics",
        ppo("policy_loss_is_a_sum"),
    ),
    "critic: the smaller of the two errors": (
        "value_loss",
        "torch.maximum",
        "torch.minimum",
        ppo("value_loss_four_cases_by_hand"),
    ),
    "critic: clipped around the returns": (
        "value_loss",
        CLIPPED,
        CLIPPED.replace("old_values", "returns"),
        ppo("value_loss_against_a_loop"),
    ),
}
NAMED: dict[str, tuple[Bug, Test]] = {
    **{
        name: ({f"{LOSSES}.{function}": [(words, others)]}, test)
        for name, (function, words, others, test) in OF_LOSSES.items()
    },
    "policy: answers left out are multiplied by 0, which of infinity is NaN": (
        {
            f"{LOSSES}.policy_loss": [
                ("mask.bool()", "torch.ones_like(mask).bool()"),
                ("torch.maximum(", "(mask * torch.maximum("),
                ("clipped_loss).sum(), statistics", "clipped_loss)).sum(), statistics"),
            ]
        },
        ppo("policy_loss_does_not_look_at_masked_tokens"),
    ),
    "the gradient forgets the temperature": (
        {"align.model.logprobs.TargetLogProbs.backward": [("grad = grad / ctx.temperature", "pass")]},
        gradients_at_a_temperature,
    ),
    "the likeliest token is drawn": (
        {
            "align.generation.sampling._draw": [
                ("return block * BLOCK + column,", "return weights.argmax(-1),")
            ]
        },
        test_sampling.test_draws_by_hand,
    ),
    "the reference is the policy": (
        {LENT: [("parameter.data = self.held[name]", "_ = self.held[name]")]},
        lent_weights,
    ),
    "the reference's weights stay in the policy": (
        {LENT: [("parameter.data = own[name]", "pass")]},
        lent_weights,
    ),
    "every position is one too high": (  # rotations tell distances only: no log-prob shows it
        {COLLATE: [(POSITIONS, f"{POSITIONS} + 1")]},
        test_data.test_collate_by_hand,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_fails_with_this_bug(name):
    bug, test = NAMED[name]
    test()
    with seeded(bug), pytest.raises(AssertionError):
        test()
    test()


def test_a_bug_whose_words_are_gone_is_an_error():
    """Else its case would try nothing."""
    for words, times in (("no such words", 0), ("x.", 2)):
        with pytest.raises(LookupError, match=f"whiten has '{words}' {times} times"):
            mutant(rl.whiten, [(words, "")])
