"""tools.check: planted differences are found in their stage, and runs without one are reported equal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train_sft
from align.data import toy
from align.errors import UserError
from tests.support.files import ROOT, read_jsonl, write_rows
from tests.support.launch import fork_python, fork_ranks
from tests.support.rows import chat, comparisons
from tests.workers.check import CASES, FLAGS
from tools import check
from tools.check_stages import Step
from tools.conformance.models import SIZES

SMALL = SIZES | dict(vocab_size=264, num_hidden_layers=2, bos_token_id=257, eos_token_id=258)


def write_inputs(folder: Path) -> None:
    """Models with large random weights, and rows of all kinds."""
    for name, kind, more in (
        ("model", transformers.LlamaForCausalLM, {}),
        ("tied", transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
        ("critic", transformers.LlamaForSequenceClassification, {"num_labels": 1}),
    ):
        shutil.copytree(ROOT / "assets" / "tiny", folder / name)
        torch.manual_seed(0)
        model = kind(transformers.LlamaConfig(**SMALL, **more))
        model.save_pretrained(folder / name)
        if name == "tied":  # a file may hold the head as well
            weights = load_file(folder / name / "model.safetensors")
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
            save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    texts = [("sort: b a", "a b"), ("hi", "hello there, this answer is too long for the limit"), ("a", "b")]
    write_rows(folder / "chats.jsonl", [chat(*text, "again", "yes") for text in texts * 3])
    (folder / "judge.txt").write_text("{{ prompt }} -> {{ response }}")
    write_rows(folder / "pairs.jsonl", comparisons(8, 1))
    toy.write(folder, num_train=8, num_val=1)
    rows = [{"prompt": row["messages"][0]["content"]} | row for row in read_jsonl(folder / "train.jsonl")]
    write_rows(folder / "prompts.jsonl", [{k: v for k, v in row.items() if k != "prompt"} for row in rows])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Stages of each run by its name."""
    folder, results = tmp_path_factory.mktemp("given"), {}
    write_inputs(folder)
    for processes in (1, 2):
        output = tmp_path_factory.mktemp(f"on{processes}")
        fork_ranks(processes, "tests/workers/check.py", folder, output, timeout_s=1200)
        results |= json.loads((output / f"on{processes}.json").read_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_run_without_a_bug_is_equal(name, ran):
    stages = ran[f"{name} alone"]
    assert [stage for stage in stages if stage["first"]] == []
    assert all(
        stage["error"] <= stage["bound"] for stage in stages if stage["name"] not in ("tokens", "mask")
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_planted_difference_is_found_in_its_stage(name, ran):
    first = next(stage for stage in ran[name] if stage["first"])
    assert first["name"] == CASES[name].stage and CASES[name].cause in first["cause"]


@pytest.mark.slow
def test_the_command_runs_a_step_and_compares_it(tmp_path, monkeypatch, capsys):
    """Its flags replace those of the user's run; a record that is changed afterwards differs."""
    monkeypatch.setattr(check, "run_script", lambda script, words, _: fork_python(f"{script}.py", *words))
    (folder := tmp_path / "in").mkdir()
    write_inputs(folder)
    words = ["train_sft.py", "--model", folder / "model", "--train-data", folder / "chats.jsonl"]
    words += ["--max-seq-len", 64, "--global-batch-size", 4, "--precision", "fp32", "--max-steps", 50]
    words += ["--output", tmp_path / "mine", "--keep", tmp_path / "run"]
    assert check.main(list(map(str, words))) == 0
    assert "DIFFERENT" not in (shown := capsys.readouterr().out) and shown.count(" equal") == 7
    assert not (tmp_path / "mine").exists()
    record = tmp_path / "run" / "records" / "step_000001" / "record.json"
    facts = json.loads(record.read_text())
    facts["metrics"]["train/lr"] *= 1.5
    record.write_text(json.dumps(facts))
    assert check.main(list(map(str, words))) == 1
    assert "first difference: learning rate, train/lr" in capsys.readouterr().out


def test_a_run_that_fails_is_an_error_of_one_line(tmp_path):
    message = r"train_sft.py ended with status 2: error: .*--no-such-flag"
    with pytest.raises(UserError, match=message):
        check.run_script("train_sft", ["--no-such-flag", "1"], 1)
    with pytest.raises(UserError, match="other.py is no training script"):
        check.main(["other.py"])
    with pytest.raises(UserError, match="--resume-from: the check starts from --model"):
        check.flags_of_run(train_sft, ["--resume-from", "x"], 1, tmp_path)


def test_terms_that_cancel_round_by_their_size():
    """The loss of advantages of both signs is near 0, and its rounding that of its terms."""
    step = object.__new__(Step)
    step.stages = []
    for size, is_equal in ((0.0, False), (0.5, True), (0.05, False)):
        actual = step.compare("loss", [3e-7], [1e-9], [2e-9], str, str, size)
        assert actual == is_equal, step.stages[-1]
