"""The usual silent bugs of such code, seeded one by one: the audit stops the run, or a named test fails.

What the audit is to catch is in workers/seeded_bugs.py. It compares log-probs, so it is blind to rewards and
losses, to gradients, and to a sampler that draws other tokens than its log-probs say: those are the tests'.
"""

import json
import re
import shutil

import pytest
import torch
import transformers

from align.data import toy
from align.generation import audit
from align.losses import rl
from tests.support.files import ROOT
from tests.support.launch import fork_ranks
from tests.support.models import SIZES
from tests.support.seeded_bugs import mutant
from tests.workers.seeded_bugs import CASES, FLAGS, PROCESSES, UNSTOPPED

MESSAGES = {
    "sampler": r"RuntimeError: audit: token \d+ of response [01] to row \d+ was sampled with log-prob .*, "
    r"training computes .*: the sampler and the trainer do not compute the same model",
    "ratio": r"RuntimeError: audit: at the first update of a rollout the policy's ratio is off 1 by .*",
    # not the audit's words, but the run stops
    "lengths": r"RuntimeError: split_with_sizes expects split_sizes to sum exactly to .*",
    "tokens": r"RuntimeError: audit: response \d+ to row \d+ was sampled with \d+ tokens, training has \d+",
    "ends": r"RuntimeError: audit: response \d+ to row \d+ ended, but its last token \d+ is none that .*",
}
Ran = dict[int, list[dict[str, dict]]]

# ---- by the audit of a run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Results of all runs by number of processes, rank and case."""
    folder, results = tmp_path_factory.mktemp("given"), {}
    toy.write(folder, num_train=16, num_val=1)
    shutil.copytree(ROOT / "assets" / "tiny", folder / "model")
    torch.manual_seed(0)  # large random weights: each token matters to those after it, as in a trained model
    sizes = SIZES | dict(vocab_size=264, num_hidden_layers=2, bos_token_id=257, eos_token_id=258)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder / "model")
    for processes in (1, 2):
        output = tmp_path_factory.mktemp(f"on{processes}")
        fork_ranks(processes, "tests/workers/seeded_bugs.py", folder, output)
        ranks = [output / f"rank{rank}.json" for rank in range(processes)]
        results[processes] = [json.loads(rank.read_text()) for rank in ranks]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_with_this_bug_is_stopped(name, ran):
    """On every rank, by the right check, at the first step that the bug can show in."""
    case = CASES[name]
    for results in ran[PROCESSES[case.flags]]:
        message = results[name]["message"]
        assert message and re.fullmatch(MESSAGES[case.caught], message), message
        assert [step["step"] for step in results[name]["steps"]] == [1, 2][: case.after]


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_the_same_run_without_a_bug_ends_well(flags, ran):
    mean, largest, _ = audit.BOUNDS[torch.float32]
    for results in ran[PROCESSES[flags]]:
        assert results[f"{flags} alone"]["message"] is None
        steps = results[f"{flags} alone"]["steps"]
        assert [step["step"] for step in steps] == [1, 2]
        for step in steps:
            assert step["audit/logprob_error"] < mean / 5
            assert step["audit/logprob_error_max"] < largest / 5
            assert step["audit/ratio_error"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSTOPPED)
def test_a_wrong_gradient_shows_beside_one_process(name, ran):
    """The audit sees no gradient; test_ppo_invariance.py compares layouts, by numbers such as this norm."""
    [one], bugged = ran[1], ran[PROCESSES[UNSTOPPED[name].flags]]

    def norm(run: dict) -> float:
        assert run["message"] is None
        return run["steps"][0]["train_optim/grad_norm"]

    for results in bugged:
        for layout in ("tp 2 alone", "dp 2 alone"):
            assert norm(results[layout]) == pytest.approx(norm(one["usual alone"]), rel=1e-5)
        assert norm(results[name]) != pytest.approx(norm(one["usual alone"]), rel=0.1)


def test_a_bug_whose_words_are_gone_is_an_error():
    """Else its case would try nothing."""
    for words, times in (("no such words", 0), ("x.", 2)):
        with pytest.raises(LookupError, match=f"whiten has '{words}' {times} times"):
            mutant(rl.whiten, [(words, "")])
