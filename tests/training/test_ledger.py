"""The ledger: fates of tokens and uses of prompts by hand, and runs from which a row is lost."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from align.data import packing
from align.data.packing import data_order
from align.data.prompts import Prompt
from align.generation.rollout import Rollout, Sample, response_example
from align.judging import tokens
from align.judging.judge import Judged
from align.judging.pairs import Buffer, SampledPair
from align.judging.self_judge import JudgedResponses
from align.training import ledger
from align.training.ledger import Ledger, Prompts, checksum, count_trained, per_token
from tests.support.files import read_jsonl
from tests.support.launch import fork_ranks
from train_rs import Config, select_step

# ---- tokens, by hand -------------------------------------------------------------------------------


def sample(*ids: int, ended: bool = True) -> Sample:
    zeros = np.zeros(len(ids), np.float32)
    return Sample(np.array(ids, np.int32), zeros, zeros, "stop" if ended else "length")


def prompt(size: int) -> Prompt:
    return Prompt(np.arange(1, size + 1, dtype=np.int32), {})


def test_fates_by_hand():
    """Two responses: 5, 6 after two prompt tokens and 7, 8, 9 after one; of two fates the first counts."""
    responses = [(2, np.array([5, 6], np.int32)), (1, np.array([7, 8, 9], np.int32))]
    fates = {
        "truncated": np.array([1, 1, 0, 0, 0], bool),
        "flat": torch.tensor([True, False, True, False, False]),
    }
    book = Ledger(responses, fates)
    assert (book.sampled, book.counts) == (5, {"truncated": 2, "flat": 1})
    assert book.to_train == (2, (8 + 1) * (1 + 1) + (9 + 1) * (2 + 1))  # ids at places 1 and 2
    everything = Ledger(responses, {"warm-up": torch.tensor(True)})
    assert (everything.counts, everything.to_train) == ({"warm-up": 5}, (0, 0))
    assert Ledger([], {}).to_train == (0, 0)
    assert Ledger(responses, {}).to_train == (5, 6 * 2 + 7 * 3 + 8 * 1 + 9 * 2 + 10 * 3)


def test_fates_of_responses_are_those_of_their_tokens():
    responses = [(1, np.arange(2)), (1, np.arange(1)), (1, np.arange(3))]
    fates = per_token(["a", "", "b"], responses, ("a", "b", "c"))
    assert {name: where.astype(int).tolist() for name, where in fates.items()} == {
        "a": [1, 1, 0, 0, 0, 0],
        "b": [0, 0, 0, 1, 1, 1],
        "c": [0] * 6,
    }


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_micro_batch_counts_what_the_ledger_expects(multiple):
    """Two prompts, one with two responses, which share its places; padding counts nothing."""
    first, second = prompt(3), prompt(2)
    samples = [(first, sample(7, 8)), (first, sample(9)), (second, sample(5, 6, 4))]
    rows = [[response_example(*pair) for pair in part] for part in (samples[:2], samples[2:])]
    batch = packing.collate(rows, multiple)
    responses = [(len(p.ids), s.ids) for p, s in samples]
    assert tuple(count_trained(batch, ()).tolist()) == Ledger(responses, {}).to_train
    batch.extra["counted"] = torch.tensor([1, 1, 0, 1, 1, 1.0])
    batch.extra["advantages"] = torch.tensor([0.5, 0, 1, -1, 2, 0.0])
    fates = {"masked": batch.extra["counted"] == 0, "flat": batch.extra["advantages"] == 0}
    book = Ledger(responses, fates)
    assert book.counts == {"masked": 1, "flat": 2}
    assert tuple(count_trained(batch, ("counted", "advantages")).tolist()) == book.to_train


@pytest.mark.parametrize(
    ("counted", "what"),
    [((4, 70), "2 lost"), ((8, 70), "2 too many"), ((6, 71), "other tokens"), ((0, 0), "6 lost")],
)
def test_check_names_the_numbers(counted, what):
    """3 tokens in 2 passes, of 9 sampled."""
    message = (
        "ledger: step 4: 9 tokens sampled = 3 to train + 5 truncated + 1 without signal; in 2 pass(es) "
        f"training must count 6 tokens, and counted {counted[0]}: {what}"
    )
    fates = {"truncated": 5, "without_signal": 1}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        ledger.check("step 4", 9, fates, (3, 35), counted, 2)
    ledger.check("step 4", 9, fates, (3, 35), (6, 70), 2)


def test_another_order_of_ids_has_another_checksum():
    places = np.arange(3)
    assert checksum(np.array([1, 2, 3]), places).sum() != checksum(np.array([3, 2, 1]), places).sum()


# ---- rejection sampling and self-rewarding, by hand ------------------------------------------------


def test_fates_of_rejection_sampling():
    """One truncated, one twice, one below --min-reward; in the second prompt the best one is below it."""
    samples = [
        [sample(1, 2), sample(3, ended=False), sample(1, 2), sample(4, 5, 6), sample(7)],
        [sample(1), sample(2, 2), sample(3, 3, 3), sample(4, 4, 4, 4, ended=False), sample(5)],
    ]
    rewards = np.array([[3.0, 9, 3, 2, 0], [0.5, 0, 0.25, 9, -1]])
    rollout = Rollout([0, 1], [prompt(2), prompt(2)], samples, rewards)
    selected, statistics, book = select_step(Config(min_reward=1.0), rollout)
    assert selected == [(0, 0)]
    assert book.counts == {"truncated": 1 + 4, "duplicate": 2, "low": 1 + (1 + 2 + 3 + 1), "not_selected": 3}
    assert book.sampled == sum(book.counts.values()) + 2 and book.to_train[0] == 2
    assert (statistics["dropped_truncated"], statistics["dropped_duplicates"]) == (2, 1)


def judged_prompt(samples: list[Sample], means: list[float | None]) -> JudgedResponses:
    judged = [Judged(() if mean is None else (mean,)) for mean in means]
    judgements = [[] if mean is None else [sample(1, 2, 3)] for mean in means]
    task = type("Task", (), {"prompt": prompt(2)})()
    nothing = [None] * len(samples)
    return JudgedResponses((0, 0, 5), task, samples, nothing, [False] * len(samples), judgements, judged)


def pair_of(chosen: Sample, rejected: Sample, size: int = 2) -> SampledPair:
    return SampledPair(5, prompt(size).ids, chosen, rejected, 2.0, 1.0, 1.0)


def test_fates_of_responses_and_judgements():
    """Three prompts: one trained, one displaced by a pair of judgements, one without a pair."""
    first = [sample(1), sample(2, 2), sample(3, 3, 3), sample(4, ended=False), sample(5, 5)]
    second, third = [sample(1, 2, 3), sample(4)], [sample(6), sample(7)]
    prompts = [
        judged_prompt(first, [2.0, 1.0, 1.5, None, None]),
        judged_prompt(second, [2.0, 1.0]),
        judged_prompt(third, [1.0, 1.0]),
    ]
    pairs = [pair_of(first[0], first[1]), pair_of(*second), None]
    judgement = pair_of(sample(8, 8), sample(9, 9, 9), size=7)
    book = tokens.of_step(prompts, pairs, [pairs[0], judgement])
    assert book.counts == {"truncated": 1, "unscored": 2, "no_pair": 2, "not_selected": 3, "displaced": 4}
    assert book.to_train[0] == 1 + 2 + (2 + 3)
    examples = [pair.examples for pair in (pairs[0], judgement)]
    assert tuple(count_trained(packing.collate(examples), ()).tolist()) == book.to_train


class Counted(Ledger):
    """A ledger whose training has counted what it is to train."""

    def close(self, label: str, passes: int = 1) -> dict[str, float]:
        return {"ledger/tokens_trained": self.to_train[0]}


def step_of(
    account: tokens.Account, latest: dict, settled: int, later: list, buffer: Buffer, last: bool = False
):
    return account.close("step 1", latest, Counted([(1, np.zeros(settled, int))], {}), later, buffer, last)


def test_tokens_wait_from_step_to_step():
    """A rollout for two steps: 5 and 4 tokens of responses, and 6 of judgements, which wait in the buffer."""
    account, buffer = tokens.Account(), Buffer(0, 5, 1.0)
    now, later = (
        judged_prompt([sample(1, 2, 3), sample(4, 4)], [2.0, 1.0]),
        judged_prompt([sample(*range(4))], [None]),
    )
    sampler = account.counting(
        lambda kind, ids, streams, number: {"generate": [now.samples, later.samples]}[kind]
    )
    assert sampler("generate", [], [], 2) == [now.samples, later.samples]
    account.sampled |= {"judge": 6, "meta_judge": 7}
    account.judge([now, later], is_new=True)
    pair = pair_of(now.judgements[0][0], now.judgements[1][0])
    assert buffer.offer(pair)
    account.admit([pair])
    metrics = step_of(account, {}, 5, [later], buffer)
    expected = {
        "sampled": 9 + 6 + 7,
        "waiting": 4 + 6,
        "judgements": 0,
        "verdicts": 7,
        "expired": 0,
        "trained": 5,
    }
    assert metrics == {f"ledger/tokens_{name}": count for name, count in expected.items()}
    # a continued run samples again what waited, and the iteration ends: the pair expires
    account.sampled["generate"] = 9
    account.judge([now, later], is_new=False)
    metrics = step_of(account, metrics, 4, [], buffer, last=True)
    expected = {"sampled": 0, "waiting": 0, "judgements": 0, "verdicts": 0, "expired": 6, "trained": 4}
    assert metrics == {f"ledger/tokens_{name}": count for name, count in expected.items()}


def test_tokens_that_vanish_between_steps_are_named():
    account, buffer = tokens.Account(), Buffer(0, 5, 1.0)
    message = r"ledger: step 1: 10 tokens waited and 0 were sampled; 4 are settled and 5 wait, -1 tokens"
    with pytest.raises(RuntimeError, match=message):
        step_of(
            account, {"ledger/tokens_waiting": 10}, 4, [judged_prompt([sample(*range(5))], [None])], buffer
        )


# ---- prompts, by hand ------------------------------------------------------------------------------

DATA = {"rows": 7, "rows_per_step": 2, "seed": 3}  # three steps in a pass, one row is left out


def test_every_prompt_once_in_a_pass():
    prompts = Prompts(DATA, 0, 0)
    for step in range(7):
        number, place = divmod(step, 3)
        rows = np.random.default_rng([3, number]).permutation(7)[2 * place : 2 * place + 2].tolist()
        metrics = prompts.use(step, rows)
        assert metrics == {"ledger/pass": number, "ledger/prompts_used": 2 * place + 2}
        assert Prompts(DATA, 0, step + 1, prompts.state()).used == prompts.used
    assert prompts.state() == {"prompts": 2, "checksum": sum((row + 1) ** 2 for row in rows)}


def test_a_pass_that_began_later():
    """After a change of the data at step 5."""
    prompts = Prompts(DATA, 5, 5, {"prompts": 4, "checksum": 99})
    assert prompts.use(5, prompts.expected(5)) == {"ledger/pass": 0, "ledger/prompts_used": 2}
    assert prompts.expected(5) == np.random.default_rng([3, 0]).permutation(7)[:2].tolist()


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resume_that_lost_prompts_is_stopped(step):
    """The record of the checkpoint has one prompt more, or another one."""
    right = Prompts(DATA, 0, step).state()
    for wrong in (right | {"prompts": right["prompts"] + 1}, right | {"checksum": right["checksum"] + 1}):
        with pytest.raises(RuntimeError, match=f"used {wrong['prompts']} prompts .* step {step}"):
            Prompts(DATA, 0, step, wrong)


def test_skipped_and_repeated_prompts_are_named():
    prompts = Prompts(DATA, 0, 0)
    first, second, third = (prompts.expected(step) for step in range(3))
    prompts.use(0, first)
    with pytest.raises(RuntimeError, match=re.escape(f"step 2 uses rows {third}, of which [] were used")):
        prompts.use(1, third)
    prompts = Prompts(DATA, 0, 1)
    with pytest.raises(RuntimeError, match=re.escape(f"of which {sorted(first)} were used before in pass 0")):
        prompts.use(1, first)


def test_the_order_is_that_of_the_run():
    """`data_order` and `global_batch` of the run give the rows that the ledger expects."""
    data = data_order([[np.arange(3, dtype=np.int32)]] * 7, 2, 3)
    expected = [Prompts(data, 0, 0).expected(step) for step in range(7)]
    assert expected == [packing.global_batch(7, 2, 3, step) for step in range(7)]


# ---- runs ------------------------------------------------------------------------------------------

ROLLOUTS = (
    "--model {toy}/sft/hf --train-data {toy}/data/train.jsonl --reward-fn tests.support.rewards:reward "
    "--prompts-per-step 4 --max-prompt-len 48 --global-batch-size 4 --max-new-tokens 6 --max-steps 2 "
    "--micro-batch-tokens 128 --lr 1e-3 --save-interval 1 --deterministic"
)
SELF_REWARD = (
    "--model {judge}/hf --train-data {judge}/data/train.jsonl --judge-template {judge}/data/judge.txt "
    "--meta-judge-template {judge}/data/meta_judge.txt --meta-judge --meta-judge-fraction 0.4 "
    "--samples-per-prompt 2 --judgements 2 --temperature 0.8 --rollout-ahead 2 --max-new-tokens 38 "
    "--lr 1e-4 --micro-batch-tokens 256 --global-batch-size 4 --max-seq-len 36 --steps-per-iteration 4 "
    "--iterations 2 --max-steps 5 --deterministic"
)
FLAGS = {
    "train_ppo": f"{ROLLOUTS} --samples-per-prompt 2 --ppo-epochs 2 --critic-warmup-steps 1",
    "train_grpo": f"{ROLLOUTS} --samples-per-prompt 3 --global-batch-size 12 --kl-coef 0 "
    "--reward-fn tests.support.rewards:of_some_prompts",
    "train_rs": f"{ROLLOUTS} --samples-per-prompt 3 --min-reward 0.3 --temperature 0.5",
    "train_self_reward": SELF_REWARD,
}

MICRO_BATCHES = "align.training.batching.micro_batches"
LOST = r"ledger: step 1: .*training must count \d+ tokens, and counted \d+: \d+ lost"
BUGS = {  # script, bug, message of the error
    "a row of a minibatch is lost": (
        "train_grpo",
        {
            "align.training.minibatches.Minibatches.micro_batches": [
                ("self.model, rows,", "self.model, rows[:-1],")
            ]
        },
        LOST,
    ),
    "a row is in the place of another one": (
        "train_grpo",
        {
            MICRO_BATCHES: [
                (
                    "    batches = []\n",
                    "    if values and 'old' in values:\n"
                    "        plan = [[[c[0], *c[:-1]] for c in rank] for rank in plan]\n"
                    "    batches = []\n",
                )
            ]
        },
        r"ledger: step 1: .*(lost|too many|other tokens)",
    ),
    "a response that rejection sampling keeps is lost": (
        "train_rs",
        {
            "train_rs.main": [
                ("batching.micro_batches(policy, examples,", "batching.micro_batches(policy, examples[1:],")
            ]
        },
        LOST,
    ),
    "a pair is lost": (
        "train_self_reward",
        {
            "train_self_reward.pair_batches": [
                ("micro_batches(state.policy, examples,", "micro_batches(state.policy, examples[:-1],")
            ]
        },
        LOST,
    ),
    "truncated responses are trained on": (
        "train_ppo",
        {"train_ppo.main": [('"counted": mask}', '"counted": mask * 0 + 1}')]},
        r"ledger: step 2: .*training must count \d+ tokens, and counted \d+: \d+ too many",
    ),
}
MORE = {  # flags: each row has a gradient, and no other check sees the loss of a pair first
    "train_grpo": "--truncated keep --reward-fn tests.support.rewards:reward",
    "train_self_reward": "--audit-start inf",
    "train_ppo": "--audit-ratio inf",
}
SKIP = {"align.training.continuation.Continuation.rows_of_step": [("step - self.pass_start", "step + 1")]}


@pytest.fixture(scope="module")
def ran(toy_models, toy_judge, tmp_path_factory) -> tuple[Path, dict[str, str | None]]:
    """Folder of the clean runs, by script, and the errors of all runs, equal on both ranks."""
    folder = tmp_path_factory.mktemp("ledger")
    flags = {name: text.format(toy=toy_models, judge=toy_judge).split() for name, text in FLAGS.items()}
    cases = {
        name: (name, [*flags[name], "--record", "1", "--output", str(folder / name)], {}) for name in FLAGS
    }
    for number, (name, (script, bug, _)) in enumerate(BUGS.items()):
        words = [*flags[script], *MORE.get(script, "").split(), "--output", str(folder / str(number))]
        cases[name] = (script, words, bug)
    resumed = [*flags["train_ppo"], "--output", str(folder / "resumed")]
    cases["stopped"] = ("train_ppo", [*resumed, "--max-time", "00:00:00"], {})
    cases["resumed"] = ("train_ppo", resumed, SKIP)
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    fork_ranks(2, "tests/workers/ledger.py", folder)
    errors, others = (json.loads((folder / f"errors{rank}.json").read_text()) for rank in range(2))
    assert errors == others
    return folder, dict(zip(cases, errors, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_run_that_loses_a_row_is_stopped(name, ran):
    _, errors = ran
    assert re.match(BUGS[name][2], errors[name] or ""), errors[name]


@pytest.mark.slow
def test_prompts_skipped_after_a_resume_stop_the_run(ran):
    _, errors = ran
    assert errors["stopped"] is None
    assert re.match(
        r"ledger: step 2 uses rows \[.*\], of which \[\] were used before", errors["resumed"] or ""
    )


def steps_of(folder: Path, script: str) -> list[tuple[dict[str, int], dict[str, np.ndarray]]]:
    """Ledger of each step, and the arrays of its record."""
    rows = [row for row in read_jsonl(folder / script / "metrics.jsonl") if row["step"] > 0]
    ledgers = [
        {name.partition("/")[2]: v for name, v in row.items() if name.startswith("ledger/")} for row in rows
    ]
    records = [folder / script / f"records/step_{row['step']:06d}/arrays.safetensors" for row in rows]
    return list(zip(ledgers, map(load_file, records), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_ppo", "train_grpo", "train_rs"])
def test_the_ledger_of_a_run_is_that_of_its_record(script, ran):
    """Fates by a slow loop over the recorded responses: their rewards, ends and tokens."""
    folder, errors = ran
    assert errors[script] is None
    totals = np.zeros(3, int)
    for step, (counts, arrays) in enumerate(steps_of(folder, script)):
        owners = np.repeat(np.arange(len(arrays["lengths"])), arrays["lengths"])
        lengths = np.bincount(owners, weights=arrays["trained"]).astype(int)
        fates = {"ppo": ppo_fate, "grpo": grpo_fate, "rs": rs_fate}[script.removeprefix("train_")]
        expected = dict.fromkeys(("trained", *(name[7:] for name in counts if name[:7] == "tokens_")), 0)
        for number, length in enumerate(lengths):
            expected[fates(step, number, arrays)] += int(length)
        expected["sampled"] = int(lengths.sum())
        assert {name: counts[f"tokens_{name}"] for name in expected} == expected
        assert (counts["pass"], counts["prompts_used"]) == (0, 4 * (step + 1))
        totals += [expected["trained"], expected["truncated"], expected["sampled"]]
    assert 0 < totals[0] and 0 < totals[1] and totals[0] + totals[1] < totals[2]  # of every fate some


def ppo_fate(step: int, number: int, arrays: dict) -> str:
    if not arrays["ended"][number]:
        return "truncated"
    return "trained" if step else "critic_warmup"


def grpo_fate(step: int, number: int, arrays: dict) -> str:
    """Three responses to a prompt; those that ended are compared."""
    group = slice(number - number % 3, number - number % 3 + 3)
    scores = arrays["scores"][group][arrays["ended"][group]]
    if not arrays["ended"][number]:
        return "truncated"
    return "trained" if len(set(scores.tolist())) > 1 else "without_signal"


def rs_fate(step: int, number: int, arrays: dict) -> str:
    ids = np.split(arrays["ids"], np.cumsum(arrays["lengths"]))
    first = number - number % 3
    earlier = [ids[k].tolist() for k in range(first, number) if arrays["ended"][k]]
    if not arrays["ended"][number]:
        return "truncated"
    if ids[number].tolist() in earlier:
        return "duplicate"
    if arrays["scores"][number] < 0.3:
        return "low"
    return "trained" if number in arrays["selected"] else "not_selected"


@pytest.mark.slow
def test_sums_of_self_rewarding_close_over_steps(ran):
    """Five steps, of which four are an iteration: the last one begins a rollout for two steps."""
    folder, errors = ran
    assert errors["train_self_reward"] is None
    steps = steps_of(folder, "train_self_reward")
    sums = {name: sum(counts[name] for counts, _ in steps) for name in steps[0][0]}
    fates = (*tokens.FATES, "trained", "judgements", "verdicts", "expired")
    waiting = [counts["tokens_waiting"] for counts, _ in steps]
    assert sums["tokens_sampled"] == sum(sums[f"tokens_{name}"] for name in fates) + waiting[-1]
    assert [counts["tokens_sampled"] > 0 for counts, _ in steps] == [True, False, True, False, True]
    assert waiting[3] == 0 < min(waiting[0], waiting[2], waiting[4])
    assert [counts["tokens_trained"] for counts, _ in steps] == [
        int(arrays["trained"].sum()) for _, arrays in steps
    ]
    assert [counts["prompts_used"] for counts, _ in steps] == [4, 8, 12, 16, 20]
    assert min(sums["tokens_trained"], sums["tokens_judgements"], sums["tokens_verdicts"]) > 0
