"""--profile: which steps are profiled, and what the files hold."""

import gzip
import json

import pytest
import torch

from align.errors import UserError
from align.tracking.profile import Profiler, parse_steps
from tests.support.launch import fork_ranks


@pytest.mark.parametrize(
    "text", ["", "3", "3:", ":3", "0:1", "1:0", "-1:2", "1:2:3", "1.5:2", "a:b", "9" * 10 + ":1"]
)
def test_other_forms_are_refused(text):
    with pytest.raises(UserError, match="must be START:STEPS"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("text", "total", "products"),
    [("3:2", 9, 3 + 4), ("3:100", 5, 3 + 4 + 5), ("9:1", 5, None), (None, 5, None)],
)
def test_the_steps_alone_are_profiled(text, total, products, tmp_path):
    """Step n multiplies n matrices; a run that ends earlier has the profile of the steps until then."""
    log_lines = []
    profiler = Profiler(parse_steps(text), tmp_path / "profile", 1, log_lines.append)
    for step in range(1, total + 1):
        profiler.start(step)
        for _ in range(step):
            torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.end(step, is_last=step == total)
    if products is None:
        assert not log_lines and not (tmp_path / "profile").exists()
        return
    [row] = [x for x in (tmp_path / "profile/rank_1.txt").read_text().splitlines() if "aten::mm" in x]
    assert int(row.split()[-1]) == products
    assert len(log_lines) == 1 and "rank_1.txt" in log_lines[0]


@pytest.mark.slow
def test_a_run_leaves_a_profile_of_each_rank_with_its_phases(tmp_path):
    sizes = "--prompts-per-step 2 --samples-per-prompt 2 --global-batch-size 4 --max-new-tokens 4"
    flags = f"--max-steps 3 --profile 2:1 --val-batches 1 --output {tmp_path}/out {sizes}"
    fork_ranks(2, "train_grpo.py", *flags.split())
    for rank in range(2):
        assert "aten::" in (tmp_path / f"out/profile/rank_{rank}.txt").read_text()
        with gzip.open(tmp_path / f"out/profile/rank_{rank}.json.gz") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert {name: names.count(name) for name in ("generate policy", "score", "train policy")} == {
            "generate policy": 1,
            "score": 1,
            "train policy": 1,
        }
