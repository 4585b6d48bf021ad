"""An export by several ranks: the files of one process, written at the same time.

That every family's tensors are the same bytes in every layout is shown in test_parity.py.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.launch import fork_ranks

LIMIT = 60_000  # bytes of a file; it parts keys from values
LAYOUTS = {
    "dp4": {},
    "tp4": {"tp": 4},  # two ranks share a key head
    "tp2_dp2": {"tp": 2},
    "tp2_cp2": {"tp": 2, "cp": 2},
    "cp2_dp2": {"cp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "pp2_dp2": {"pp": 2},
}
MODELS = {"lm": ("llama", "sft"), "tied": ("qwen2", "sft"), "rm": ("llama", "regression")}  # two labels


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory) -> tuple[Path, dict]:
    """(exports by model and layout, and "one" of one process; what their ranks did)."""
    output, results = tmp_path_factory.mktemp("exports"), {}
    for processes, layouts in (1, {"one": {}}), (4, LAYOUTS):
        cases = {}
        for name, (family, algorithm) in MODELS.items():
            for layout, sizes in layouts.items():
                cases[f"{name}_{layout}"] = (str(models / family), {"algorithm": algorithm, **sizes})
        fork_ranks(processes, "tests/workers/export.py", output, LIMIT, json.dumps(cases))
        results |= json.loads((output / "results.json").read_text())
    return output, results


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_several_ranks(exports, name, layout):
    """Equal to those of one process; with pipeline stages, whose files end with their layers, the tensors."""
    output, results = exports
    actual, expected = output / f"{name}_{layout}", output / f"{name}_one"
    if "pp" not in LAYOUTS[layout]:
        contents = [
            {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (actual, expected)
        ]
        assert contents[0] == contents[1]
        assert len(contents[0]) > 6
    tensors, whole = (
        {k: x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}
        for folder in (actual, expected)
    )
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in whole.items())
    ranks = results[f"{name}_{layout}"]
    files = [file for rank in ranks for file in rank["files"]]
    assert all(rank["files"] for rank in ranks)  # the worker's barrier: they write at the same time
    assert len(files) == len(set(files)) == len(list(actual.glob("*.safetensors")))
    assert max(len(rank["files"]) for rank in ranks) <= -(-len(files) // 4) + 1
    assert not any(held for rank in ranks for held in rank["alive"])  # a rank holds one file at a time


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_opens_them(exports, models, layout):
    lm = transformers.AutoModelForCausalLM.from_pretrained(exports[0] / f"lm_{layout}").state_dict()
    whole = load_file(models / "llama" / "model.safetensors")
    assert lm.keys() == whole.keys() and all(torch.equal(lm[key], tensor) for key, tensor in whole.items())
