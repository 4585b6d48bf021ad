"""Scores of answers: a function of the user's, and a reward model against transformers.

As a script this file is its own worker: what comes out on two processes, to a file.
"""

import copy
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers

from align.data import packing
from align.data.hf_tokenizer import HuggingFaceTokenizer
from align.data.packing import BatchConfig
from align.data.preferences import as_scored
from align.data.prompts import Prompt
from align.data.tokenizer import load_tokenizer
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.generation import rollout
from align.generation.rollout import Sample
from align.model.config import ModelConfig
from align.rewards import sources
from align.rewards.sources import RewardConfig, RewardFunction, RewardModel
from align.training import offload
from tests.support import grids
from tests.support.files import TINY
from tests.support.generation import sample_of
from tests.support.launch import fork_ranks
from tools.conformance.models import FAMILIES

SCORED = ("llama", "qwen3", "mistral")  # families whose reward models are compared
LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}}
BUDGETS = (4096, 60)  # micro_batch_tokens; of 3 answers with their prompt 60 hold one, two or all
QUESTIONS = ("one", "two ", "three\n")
STOP = ("##", "!")
ANSWERS = (  # to each question: text, and does a stop token end it?
    ("yes", True),
    ("yes", False),  # cut off
    ("no##", False),  # ended by a stop string
    ("a!b##c", False),  # the second of them comes first
    ("", True),  # nothing but the stop token
)


# ---- functions that a user might give ------------------------------------------------------------


def noted(prompt: str, response: str, row: dict) -> float:
    """Writes down what it was called with. Length of the response, and which row."""
    line = json.dumps([prompt, response, row["id"], int(os.environ["RANK"])]) + "\n"
    with Path(row["log"]).open("a") as file:
        file.write(line)
    return len(response) + 100 * row["id"]


def returns_none(prompt: str, response: str, row: dict) -> None:
    return None


def returns_text(prompt: str, response: str, row: dict) -> str:
    return "1"


def returns_nan(prompt: str, response: str, row: dict) -> float:
    return float("nan")


def returns_infinity(prompt: str, response: str, row: dict) -> float:
    return -float("inf")


def returns_numpy(prompt: str, response: str, row: dict) -> np.float32:
    return np.float32(0.5)


def returns_bool(prompt: str, response: str, row: dict) -> bool:
    return response == "yes"


NO_FUNCTION = 3
WRONG = {  # function: what it returned, as the message has it
    "returns_none": "None",
    "returns_text": "'1'",
    "returns_nan": "nan",
    "returns_infinity": "-inf",
}


# ---- data ----------------------------------------------------------------------------------------


def texts(tokenizer: HuggingFaceTokenizer, log: Path) -> tuple[list[Prompt], list[list[Sample]]]:
    """QUESTIONS and ANSWERS as tokens."""
    prompts = [
        Prompt(np.array(tokenizer.encode(question), np.int32), {"id": i, "log": str(log)})
        for i, question in enumerate(QUESTIONS)
    ]
    answers = [sample_of(tokenizer.encode(answer) + [tokenizer.eos_id] * ended) for answer, ended in ANSWERS]
    return prompts, [answers] * len(prompts)


def numbers(count: int = 7, answers: int = 3) -> tuple[list[Prompt], list[list[Sample]]]:
    """Random prompts of up to 30 tokens, with answers of up to 25."""
    rng = np.random.default_rng(8)

    def ids(longest: int) -> np.ndarray:
        return rng.integers(3, 131, rng.integers(1, longest + 1)).astype(np.int32)

    prompts = [Prompt(ids(30), {}) for _ in range(count)]
    return prompts, [[sample_of(ids(25).tolist()) for _ in range(answers)] for _ in range(count)]


# ---- worker --------------------------------------------------------------------------------------


def message_of(call: Callable[[], object]) -> str:
    """With which a call is refused."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "it was not refused"


def by_functions(log: Path) -> dict[str, object]:
    """Rewards of each function, or the message."""
    tokenizer = load_tokenizer(TINY)
    prompts, samples = texts(tokenizer, log)
    results = {}
    for name in ("noted", "returns_numpy", "returns_bool"):
        reward = RewardFunction(f"tests.rewards.test_sources:{name}", tokenizer, STOP)
        results[name] = reward(prompts, samples).tolist()
    for name in WRONG:
        reward = RewardFunction(f"tests.rewards.test_sources:{name}", tokenizer, STOP)
        results[name] = message_of(lambda reward=reward: reward(prompts, samples))
    return results


def by_models(directory: Path) -> dict[str, object]:
    """Scores by each reward model in each layout, and the weights that it holds between calls."""
    text, results = load_tokenizer(TINY), {}
    for name, flags in LAYOUTS.items():
        layout = ParallelConfig(**flags)
        grids.change(layout)
        for family in SCORED:
            for budget in BUDGETS:
                batch = BatchConfig(micro_batch_tokens=budget)
                config = ModelConfig(model="of the policy", precision="fp32")
                flags = RewardConfig(reward_model=directory / family)
                reward = RewardModel(flags, config, layout, batch, text)
                held = [held_weights(reward)]
                scores = [reward(*numbers()).tolist()]
                held.append(held_weights(reward))
                scores.append(reward(*numbers()).tolist())
                results[f"{name} {family} {budget}"] = {"scores": scores, "held": held}
    return results


def held_weights(reward: RewardModel) -> int:
    """Bytes that the scorer's parameters hold."""
    return sum(parameter.untyped_storage().nbytes() for parameter in reward.scorer.parameters())


# ---- what the tests share ------------------------------------------------------------------------


def save_reward_model(directory: Path, family: str, labels: int, seed: int) -> Path:
    """A random reward model as transformers writes it, every tensor random, with the tiny tokenizer."""
    config = copy.deepcopy(FAMILIES[family])
    config.num_labels = labels
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory) -> Path:
    """A directory with a reward model of each of SCORED."""
    directory = tmp_path_factory.mktemp("reward_models")
    for seed, family in enumerate(SCORED):
        save_reward_model(directory / family, family, 1, 200 + seed)
    return directory


@pytest.fixture(scope="module")
def output(reward_models, tmp_path_factory) -> Path:
    """Folder with the results of the worker's two processes."""
    directory = tmp_path_factory.mktemp("rewards")
    fork_ranks(2, "tests/rewards/test_sources.py", reward_models, directory)
    return directory


@pytest.fixture(scope="module")
def results(output) -> list[dict]:
    """Results of each of two processes."""
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


# ---- a function ----------------------------------------------------------------------------------


def responses() -> list[str]:
    """ANSWERS as a function is to see them: without stop token and stop string."""
    return ["yes", "yes", "no", "a", ""]


@pytest.mark.slow
def test_a_function_sees_each_answer_once(output):
    """Prompt and response as text and the row; the two processes share the answers."""
    calls = [json.loads(line) for line in (output / "calls.jsonl").read_text().splitlines()]
    wanted = Counter((question, answer, i) for i, question in enumerate(QUESTIONS) for answer in responses())
    assert Counter(tuple(call[:3]) for call in calls) == wanted
    assert sorted(Counter(call[3] for call in calls).values()) == [7, 8]


@pytest.mark.slow
def test_rewards_of_a_function_stand_where_their_answers_do(results):
    wanted = [[len(answer) + 100 * i for answer in responses()] for i in range(len(QUESTIONS))]
    assert [rank["functions"]["noted"] for rank in results] == [wanted, wanted]


@pytest.mark.slow
def test_any_real_number_is_a_reward(results):
    assert results[0]["functions"]["returns_numpy"] == [[0.5] * 5] * 3
    assert results[0]["functions"]["returns_bool"] == [[1.0, 1.0, 0.0, 0.0, 0.0]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_number_is_refused(name, results):
    """Each rank names its own first answer."""
    for rank, answer in enumerate(("yes", "yes")):
        assert results[rank]["functions"][name] == (
            f"--reward-fn tests.rewards.test_sources:{name} returned {WRONG[name]} "
            f"for the response {answer!r}: a reward is a finite number"
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tests.rewards.test_sources",
            "--reward-fn 'tests.rewards.test_sources' must be of the form module:function",
        ),
        (":noted", "--reward-fn ':noted' must be of the form module:function"),
        ("tests.rewards.test_sources:", "must be of the form module:function"),
        ("no_such_module:f", "--reward-fn no_such_module:f: no module 'no_such_module' in the current"),
        ("no_such_package.part:f", "no module 'no_such_package.part' in the current directory or installed"),
        ("tests.no_such_part:f", "no module 'tests.no_such_part' in the current directory or installed"),
        (
            "tests.rewards.test_sources:nothing",
            "module 'tests.rewards.test_sources' has no function 'nothing'",
        ),
        (
            "tests.rewards.test_sources:NO_FUNCTION",
            "module 'tests.rewards.test_sources' has no function 'NO_FUNCTION'",
        ),
    ],
)
def test_a_function_that_is_not_there(name, message, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(UserError, match=message):
        sources.import_function(name)


def test_a_module_of_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_test.py").write_text("def f(prompt, response, row):\n    return 7\n")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    assert sources.import_function("my_rewards_of_test:f")("", "", {}) == 7


def test_an_import_that_fails_in_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "my_broken_rewards.py").write_text("import no_such_module_at_all\n")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        sources.import_function("my_broken_rewards:f")


def test_standardised_scores():
    """(score - mean) / std, for arrays and tensors."""
    config = RewardConfig(reward_model=Path("x"), reward_mean=2.0, reward_std=4.0)
    assert config.standardised(np.array([2.0, 10.0, 0.0])).tolist() == [0.0, 2.0, -0.5]
    assert config.standardised(torch.tensor([6.0])).tolist() == [1.0]


def test_standardised_by_the_numbers_of_a_file(tmp_path):
    """--reward-standardise auto takes what train_rm.py wrote beside the weights, or says what to do."""
    config = RewardConfig(reward_model=tmp_path, reward_standardise="auto")
    with pytest.raises(UserError, match=r"there is no .*reward_statistics.json, .* Give --reward-mean and"):
        config.with_statistics()
    sources.save_statistics({"mean": 2.0, "std": 4.0, "texts": 10, "data": "val"}, tmp_path)
    assert config.with_statistics() == RewardConfig(reward_model=tmp_path, reward_mean=2.0, reward_std=4.0)
    for wrong in ({"mean": 2.0}, {"mean": 2.0, "std": 0.0}, {"mean": "x", "std": 1.0}, [1.0]):
        (tmp_path / "reward_statistics.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"reward_statistics.json must hold numbers"):
            config.with_statistics()
    off = RewardConfig(reward_model=tmp_path)
    assert off.with_statistics() is off


def test_two_judges_are_asked():
    """A reward model and a function together: train_ppo.py and train_rs.py add up what they say."""
    tokenizer = load_tokenizer(TINY)
    config = RewardConfig(reward_fn="tests.rewards.test_sources:returns_numpy")
    sources_ = sources.reward_sources(config, ModelConfig(), ParallelConfig(), BatchConfig(), tokenizer, STOP)
    assert [type(judge) for judge in sources_] == [RewardFunction]
    with mock.patch.object(sources, "RewardModel", lambda *args: args):
        with_model = replace(config, reward_model=Path("x"))
        model, function = sources.reward_sources(
            with_model, ModelConfig(), ParallelConfig(), BatchConfig(), tokenizer, STOP
        )
    assert model[0] is with_model and isinstance(function, RewardFunction)


# ---- a reward model ------------------------------------------------------------------------------


def transformers_scores(directory: Path) -> np.ndarray:
    """Scores [prompts, answers] of `numbers`, each text alone."""
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    prompts, samples = numbers()
    with torch.no_grad():
        return np.array(
            [
                [
                    scorer(torch.tensor([*prompt.ids, *sample.ids])[None].long()).logits.item()
                    for sample in row
                ]
                for prompt, row in zip(prompts, samples, strict=True)
            ]
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", SCORED)
def test_scores_are_those_of_transformers(family, results, reward_models):
    """In each layout, on each rank, in large micro-batches and in such as split the answers to a prompt."""
    wanted = transformers_scores(reward_models / family)
    assert wanted.std() > 0.1, "scores that are all alike show no mix-up"
    for rank in results:
        for layout in LAYOUTS:
            for budget in BUDGETS:
                first, second = rank["models"][f"{layout} {family} {budget}"]["scores"]
                np.testing.assert_allclose(first, wanted, rtol=0, atol=1e-4, err_msg=f"{layout} {budget}")
                assert second == first


def test_small_micro_batches_split_the_answers_to_a_prompt():
    """Check the data above: else a budget of 60 would be the same case as one of 4096."""
    prompts, samples = numbers()
    rows = [
        [as_scored(rollout.response_example(prompt, sample)) for sample in row]
        for prompt, row in zip(prompts, samples, strict=True)
    ]
    assert any(packing.num_places(row) > min(BUDGETS) for row in rows)


@pytest.mark.slow
def test_weights_are_parked_between_calls(results):
    """The module's parameters hold no memory, before the first call and after it."""
    held = [case["held"] for rank in results for case in rank["models"].values()]
    assert held == [[0, 0]] * (2 * len(LAYOUTS) * len(SCORED) * len(BUDGETS))


def test_parked_weights_come_back():
    torch.manual_seed(0)
    module, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    before = module(x)
    weights = offload.offload_module(module)
    assert [parameter.numel() for parameter in module.parameters()] == [0, 0]
    with weights.swapped_into(module):
        assert torch.equal(module(x), before)
    assert [parameter.numel() for parameter in module.parameters()] == [0, 0]


def refused(directory: Path) -> str:
    """The message with which a directory is refused as --reward-model."""
    config = ModelConfig(precision="fp32")
    return message_of(
        lambda: RewardModel(
            RewardConfig(reward_model=directory),
            config,
            ParallelConfig(),
            BatchConfig(),
            load_tokenizer(TINY),
        )
    )


def test_a_language_model_is_refused(models):
    assert refused(models / "llama") == (
        f"--reward-model {models / 'llama'} is a language model: give a reward model"
    )


def test_several_labels_are_refused(tmp_path):
    directory = save_reward_model(tmp_path / "two", "llama", 2, 0)
    wanted = f"--reward-model {directory} has 2 labels: give a model with one"
    assert refused(directory) == wanted


def test_another_tokenizer_is_refused(tmp_path):
    directory = save_reward_model(tmp_path / "other", "llama", 1, 0)
    spec = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    first, second = list(vocabulary)[65:67]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    assert refused(directory).startswith(f"--reward-model {directory} has another tokenizer than --model: ")


if __name__ == "__main__":
    models, output = map(Path, sys.argv[1:])
    with parallel.start(ParallelConfig()):
        results = {"functions": by_functions(output / "calls.jsonl"), "models": by_models(models)}
        (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
