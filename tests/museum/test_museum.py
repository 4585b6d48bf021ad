"""The museum of silent bugs: each exhibit is caught by the guard that it names, and by none without its bug.

Guards are the audits of a run, tests of one function, and the first step of another layout. The audits see
neither a reward that is another response's nor a wrong gradient: those are the tests'. docs/museum.md has the
table.
"""

import inspect
import json
import pkgutil
import re
import shutil
from collections.abc import Callable

import pytest
import torch
import transformers

from align.data import toy
from align.generation import audit
from align.losses import rl
from tests.museum import page
from tests.museum.exhibit import PROCESSES, RUNS
from tests.museum.exhibits import OWN
from tests.museum.public import PUBLIC
from tests.support.files import ROOT
from tests.support.launch import fork_ranks
from tests.support.rewards import reward
from tests.support.seeded_bugs import assert_fails_with, mutant
from tools.conformance.models import SIZES

EXHIBITS = OWN | PUBLIC
OTHER_MODEL = "the sampler and the trainer do not compute the same model"
MESSAGES = {
    "sampler": rf"RuntimeError: audit: token \d+ of response \d to row \d+ was sampled .*: {OTHER_MODEL}",
    "bias": rf"RuntimeError: audit: sampling log-probs are \S+ nats off training's on .*: {OTHER_MODEL}",
    "surprise": r"RuntimeError: audit: sampled tokens have -log p of \S+ nats beside the entropy of .*",
    "ratio": r"RuntimeError: audit: at the first update of a rollout the policy's ratio is off 1 by .*",
    "update": r"RuntimeError: audit: the first update of a rollout has the loss \S+, its advantages .*",
    "groups": r"RuntimeError: audit: the advantages of the responses to row \d+ add up to \S+, not to 0: .*",
    "replicas": r"RuntimeError: audit: \S+ differs between (tensor|data) parallel ranks, .*",
    "tokens": r"RuntimeError: audit: response \d+ to row \d+ was sampled with \d+ tokens, training has \d+",
    "ends": r"RuntimeError: audit: response \d+ to row \d+ ended, but its last token \d+ is none that .*",
    "start": r"RuntimeError: before the first update the policy is the reference, but their log-probs .*",
    "ledger": r"RuntimeError: ledger: step \d+: .*",
    # not an audit's words, but the run stops
    "lengths": r"RuntimeError: split_with_sizes expects split_sizes to sum exactly to .*",
    "two BOS": r"UserError: .*two BOS at the start: .*",
}
SAMPLES = "samples"  # a guard: the rewards in samples.jsonl
Ran = dict[str, list[dict[str, dict]]]  # by precision, results of each rank of all numbers of processes

# ---- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Results of all runs by precision: for each rank of 1 and of 2 processes, by name."""
    folder = tmp_path_factory.mktemp("given")
    toy.write(folder, num_train=64, num_val=1)
    toy.write_comparisons(folder, num_train=64, num_val=1)
    shutil.copytree(ROOT / "assets" / "tiny", folder / "model")
    torch.manual_seed(0)  # large random weights: each token matters to those after it, as in a trained model
    sizes = SIZES | dict(vocab_size=264, num_hidden_layers=2, bos_token_id=257, eos_token_id=258)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder / "model")
    results: Ran = {"fp32": [], "bf16": []}
    for processes in (1, 2):
        output = tmp_path_factory.mktemp(f"on{processes}")
        fork_ranks(processes, "tests/museum/worker.py", folder, output, timeout_s=600)
        for rank in range(processes):
            of_rank = json.loads((output / f"rank{rank}.json").read_text())
            for precision in results:
                results[precision].append(of_rank[precision])
    return results


def of_ranks(ran: Ran, precision: str, name: str) -> list[dict]:
    """Results of a run on each of its ranks."""
    by_rank = [results[name] for results in ran[precision] if name in results]
    assert by_rank, name
    return by_rank


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in EXHIBITS if EXHIBITS[name].caught])
def test_a_run_with_this_bug_is_stopped(name, precision, ran):
    """On every rank, by the right check, at the first step that the bug can show in."""
    exhibit = EXHIBITS[name]
    for result in of_ranks(ran, precision, name):
        if caught := exhibit.caught_in(precision):
            assert result["message"] and re.fullmatch(MESSAGES[caught], result["message"]), result["message"]
            assert [step["step"] for step in result["steps"]] == [1, 2][: exhibit.after]
        else:
            assert result["message"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXHIBITS if not EXHIBITS[name].caught])
def test_no_audit_sees_this_bug(name, ran):
    """So the table says, and the wider bounds of bf16 see no more."""
    for result in of_ranks(ran, "fp32", name):
        assert result["message"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "run"),
    [("fp32", run) for run in RUNS]
    + [("bf16", run) for run in RUNS if any(x.run == run and x.caught for x in EXHIBITS.values())],
)
def test_the_same_run_without_a_bug_ends_well(precision, run, ran):
    mean, largest, _ = audit.BOUNDS[torch.float32 if precision == "fp32" else torch.bfloat16]
    for result in of_ranks(ran, precision, f"{run} alone"):
        assert result["message"] is None
        assert result["steps"]
        for step in result["steps"] if "audit/logprob_error" in result["steps"][0] else ():
            assert step["audit/logprob_error"] < mean / (5 if precision == "fp32" else 3)
            assert step["audit/logprob_error_max"] < largest / (5 if precision == "fp32" else 3)
            assert abs(step["audit/logprob_bias"]) < audit.BIAS_SHARE * mean / 3
            assert step["audit/ratio_error"] == 0.0 and step["audit/loss_error"] < 1e-12


# ---- other layouts ---------------------------------------------------------------------------------


def first_step(results: list[dict]) -> tuple[float, float]:
    """Loss and gradient norm of the first step, equal on all ranks."""
    steps = [result["steps"][0] for result in results]
    for group in ("train", "train_optim"):
        if f"{group}/loss" in steps[0]:
            [values] = {(step[f"{group}/loss"], step[f"{group}/grad_norm"]) for step in steps}
            return values
    raise AssertionError(f"no loss in {list(steps[0])}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXHIBITS if EXHIBITS[name].beside])
def test_this_bug_shows_beside_another_layout(name, ran):
    """Without it loss and gradient norm of the first step are equal in both, as in test_invariance.py."""
    exhibit = EXHIBITS[name]
    right = [first_step(of_ranks(ran, "fp32", f"{run} alone")) for run in (exhibit.run, exhibit.beside)]
    assert right[0] == pytest.approx(right[1], rel=1e-5, abs=1e-7)
    wrong = [first_step(of_ranks(ran, "fp32", run)) for run in (name, f"{name} beside")]
    assert wrong[0] != pytest.approx(wrong[1], rel=1e-3)


# ---- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EXHIBITS if EXHIBITS[name].test not in ("", SAMPLES)])
def test_a_named_test_fails_with_this_bug(name, request):
    exhibit = EXHIBITS[name]
    test: Callable = pkgutil.resolve_name(exhibit.test)
    values = dict(exhibit.arguments)
    for parameter in inspect.signature(test).parameters:
        if parameter not in values:
            values[parameter] = request.getfixturevalue(parameter)
    assert_fails_with(exhibit.bug, lambda: test(**values))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXHIBITS if EXHIBITS[name].test == SAMPLES])
def test_rewards_of_samples_tell(name, ran):
    """Each sample of a run's first step has the reward of its own text; with the bug it has another's."""

    def is_right(run: str) -> bool:
        samples = of_ranks(ran, "fp32", run)[0]["samples"]
        assert samples
        return all(
            sample["reward"] == pytest.approx(reward(sample["prompt"], sample["response"], {}))
            for sample in samples
        )

    assert is_right(f"{EXHIBITS[name].run} alone") and not is_right(name)


def test_a_bug_whose_words_are_gone_is_an_error():
    """Else its exhibit would try nothing."""
    for words, times in (("no such words", 0), ("x.", 2)):
        with pytest.raises(LookupError, match=f"whiten has '{words}' {times} times"):
            mutant(rl.whiten, [(words, "")])


# ---- the page --------------------------------------------------------------------------------------


def test_every_exhibit_has_a_guard():
    assert len(OWN) == 55 and len(PUBLIC) >= 20 and not OWN.keys() & PUBLIC.keys()
    assert all(exhibit.origin for exhibit in PUBLIC.values())
    for name, exhibit in EXHIBITS.items():
        assert exhibit.caught or exhibit.test or exhibit.beside, name
        assert exhibit.run in RUNS and (not exhibit.beside or exhibit.beside in RUNS), name
        assert {exhibit.caught, exhibit.in_bf16 or ""} <= {"", *MESSAGES}, name
        assert PROCESSES[exhibit.run] in (1, 2)


def test_the_page_has_the_exhibits():
    """`python -m tests.museum.page` writes it."""
    assert (ROOT / "docs" / "museum.md").read_text(encoding="utf-8") == page.text()
