"""bench/gpu.py: what it counts, by hand and against others' counts; what it does with a case that fails."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from align.data import packing
from align.data.packing import Example
from tests.support.files import ROOT
from tests.support.launch import environment

sys.path.insert(0, str(ROOT / "bench"))
import gpu  # noqa: E402
import gpu_cases  # noqa: E402

SMALL = gpu.Shape(layers=2, hidden=8, heads=2, kv_heads=1, ffn=12, vocab=10, tied=False)


@pytest.mark.parametrize(
    ("name", "published", "norms"),  # weights of the published models, and those of their norms
    [
        ("135m", 134_515_008, 61 * 576),
        ("1b", 1_235_814_400, 33 * 2048),
        ("8b", 8_030_261_248, 65 * 4096),
    ],
)
def test_shapes_have_the_weights_of_the_published_models(name, published, norms):
    shape = gpu.SHAPES[name]
    assert gpu.all_weights(shape, shape.layers) == published - norms


def test_weights_by_hand():
    assert SMALL.layer_weights == 2 * 64 + 2 * 32 + 3 * 96  # q and output, k and v, three of the MLP
    assert gpu.matmul_weights(SMALL, 2) == 2 * 480 + 80
    assert gpu.all_weights(SMALL, 2) == 2 * 480 + 2 * 80


def test_keys_are_those_that_each_token_sees():
    assert gpu.keys_seen(3) == 1 + 2 + 3
    assert gpu.keys_seen(2, prefix=5) == 6 + 7


def test_operations_by_hand():
    # products 2 * 960 weights * 3 tokens, output 2 * 80 * 2 tokens, attention 4 * 2 layers * 2 heads * 4 * 6
    assert gpu.forward_flops(SMALL, 2, tokens=3, predicted=2, keys=6) == 5760 + 320 + 384
    assert gpu.train_flops(100, reference=False) == 300
    assert gpu.train_flops(100, reference=True) == 400


def test_operations_are_those_that_torch_counts():
    """With all keys for each token, as eager attention computes them before its mask."""
    config = transformers.LlamaConfig(
        **gpu_cases.hf_config(replace(SMALL, vocab=300), labels=0), attn_implementation="eager"
    )
    model = transformers.LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 7, dtype=torch.long))
    expected = gpu.forward_flops(replace(SMALL, vocab=300), 2, tokens=7, predicted=7, keys=7 * 7)
    assert counter.get_total_flops() == expected


def test_operations_of_rows_that_share_a_beginning():
    ids = [np.array([5, 6, 7, 8, 9]), np.array([5, 6, 7, 1, 2, 3]), np.array([4, 3, 2])]
    trained = [np.arange(5) >= 3, np.arange(6) >= 3, np.arange(3) >= 1]
    one, two, other = map(Example, ids, trained)
    rows = [[one, two], [other]]
    batch = packing.collate(rows)
    expected = gpu.forward_flops(
        SMALL,
        2,
        tokens=len(batch.tokens),
        predicted=int(batch.mask.sum()),
        keys=int((batch.positions + 1).sum()),  # a token at position p sees p + 1 keys
    )
    assert len(batch.tokens) == 4 + 3 + 2  # the shared 5 and 6 once; the 7 predicts two different tokens
    assert gpu_cases.forward_flops_of(SMALL, 2, rows) == expected


def test_bytes_of_a_decode_step_by_hand():
    # bf16: 1040 weights, and for 3 sequences of 5 keys in 2 layers a key and a value of 4 numbers
    assert gpu.decode_bytes(SMALL, 3, 5.0) == 2 * 1040 + 2 * (3 * 5 * 2 * 2 * 4)


def test_layers_that_fit():
    assert gpu.layers_that_fit(gpu.SHAPES["8b"], 85_500_000_000) == 8  # an H100's
    assert gpu.layers_that_fit(gpu.SHAPES["1b"], 85_500_000_000) == 16
    # 18 bytes for each of 480 weights of a layer and 160 of both embeddings are 60 % of 19,200 bytes
    assert gpu.layers_that_fit(SMALL, 19_200) == 1
    with pytest.raises(ValueError, match="too few to train one layer"):
        gpu.layers_that_fit(SMALL, 19_199)


def test_median_step():
    record = gpu_cases.train_record(2, [9.0, 1.0, 4.0, 2.0], [50, 10, 20, 30], [7, 10**12, 10**12, 10**12], 1)
    assert (record["steps"], record["step_s"]) == (3, 2.0)
    assert (record["tokens_per_s"], record["tflops"]) == (10.0, 0.5)


def test_shares_of_a_ppo_step():
    common = {"train_rollouts/rollout_size": 4, "train_rollouts/response_lengths": 8}
    rows = [
        {**common, "time/step": 1.0, "time/train": 1.0, "memory/train_policy": 3.0},
        {**common, "time/step": 3.0, "time/train": 0.5, "time/offload": 0.5, "memory/train_policy": 2.0},
    ]
    record = gpu_cases.ppo_record(rows)
    assert record["step_s"] == 2.0 and record["peak_gb"] == 3.0
    assert record["shares"] == {"train": 2.5 / 4, "offload": 1.5 / 4}


# ---- processes -----------------------------------------------------------------------------------

FAKE = """
import json, pathlib, sys, time
case, folder = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
assert sys.stdin.readline() == "begin\\n"
if case["section"] == "decode":
    time.sleep(60)
if case["section"] == "sft":
    raise MemoryError("no room left")
line = {"layers": 1, "tokens_per_s": 10.0, "step_s": 1.0, "tflops": 0.1, "peak_gb": 1.0}
(folder / f"{case['section']}-{case['shape']}.jsonl").write_text(json.dumps(line) + "\\n")
"""


def test_a_case_that_fails_or_hangs_leaves_a_line_and_the_others_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(gpu, "WORKER", tmp_path / "fake.py")
    sections, output = ("sft", "decode", "dpo"), tmp_path / "figures.json"
    status = gpu.main(gpu.Config(sections, ("tiny",), time_limit_s=8.0, output=output))
    records = json.loads(output.read_text())
    assert status == 1 and [record["section"] for record in records] == list(sections)
    assert "MemoryError: no room left" in records[0]["error"]
    assert "no end within 8 s" in records[1]["error"]
    assert records[2]["tokens_per_s"] == 10.0 and "error" not in records[2]
    said = capsys.readouterr().out
    assert "FAILED: exit status 1: MemoryError: no room left" in said and "dpo tiny" in said


def test_cases_after_the_total_limit_are_not_run(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(gpu, "WORKER", tmp_path / "fake.py")
    output = tmp_path / "figures.json"
    config = gpu.Config(("decode", "dpo"), ("tiny",), total_limit_s=1.0, output=output)
    assert gpu.main(config) == 1
    assert [record["error"] for record in json.loads(output.read_text())] == [
        "no end within 1 s",
        "not run: --total-limit-s is over",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_large_shapes_need_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="--shapes tiny 1b needs a GPU"):
        gpu.main(gpu.Config(shapes=("tiny", "1b"), output=tmp_path / "figures.json"))


def test_every_section_on_the_smallest_shape(tmp_path):
    output = tmp_path / "figures.json"
    flags = "--shapes tiny --time-limit-s 300 --total-limit-s 480"  # the machine may be busy
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", *flags.split(), "--output", str(output)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert torch.cuda.is_available() or "NO GPU HERE" in done.stdout
    records = json.loads(output.read_text())
    by_section = {section: [r for r in records if r["section"] == section] for section in gpu_cases.SECTIONS}
    counts = {"limits": 1, "sft": 1, "dpo": 1, "decode": 4, "ppo": 2}
    assert {section: len(by_section[section]) for section in counts} == counts
    assert by_section["limits"][0]["product_tflops"] > 0 and by_section["limits"][0]["copy_gb_per_s"] > 0
    for record in by_section["sft"] + by_section["dpo"]:
        assert record["tokens_per_s"] > 0 and record["tflops"] > 0 and record["peak_gb"] > 0
    assert 0 < by_section["dpo"][0]["reference_share"] < 1
    # 16 tokens after 16 or after 48, without the first 4 steps: those after 5 to 15 tokens count
    places = [(record["answers"], record["keys"]) for record in by_section["decode"]]
    assert places == [(1, 16 + 10), (3, 16 + 10), (1, 48 + 10), (2, 48 + 10)]
    for count, keys, record in ((*place, r) for place, r in zip(places, by_section["decode"], strict=True)):
        assert record["step_bytes"] == gpu.decode_bytes(gpu.SHAPES["tiny"], count, keys)
    for record in by_section["ppo"]:
        assert record["answers"] == 4
        assert {"generate", "score", "logprobs", "reference", "values", "train"} <= set(record["shares"])
        assert sum(record["shares"].values()) == pytest.approx(1)
    for record in by_section["trl"]:
        assert "skipped" in record or record["tokens_per_s"] > 0
