"""tools.plan --simulate: the arithmetic of each item by hand, and a plan's table."""

import random
from dataclasses import replace

import pytest

from align.model.architecture import Architecture
from align.planning import step_time
from align.planning.memory import MicroBatchLoad, RankShape
from align.planning.phases import Cluster, Speeds
from align.planning.rollout_memory import RolloutLoad
from tests.support.files import ROOT
from tools import plan

# A layer has 2 x (32 + 8) x 64 x 2,048 + 3 x 2,048 x 8,192 = 60,817,408 weights in matrices.
ONE_B = Architecture(
    family="llama",
    vocab_size=128_256,
    hidden_size=2048,
    ffn_size=8192,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    norm_eps=1e-5,
    init_std=0.02,
    max_positions=131_072,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    rope=(("rope_theta", 5e5), ("rope_type", "default")),
)
MATRICES, HEAD = 60_817_408, 128_256 * 2048
WEIGHTS = 16 * (MATRICES + 2 * 2048) + HEAD + 2048
ONE_GPU = RankShape(item=2, gpu=True)
# 1e12 operations, 1e9 bytes of memory, 1e9 bytes within a node and 1e8 between nodes a second, as kernels
# are assumed to reach them
SPEEDS = Speeds(
    peak_tflops=1 / step_time.PRODUCTS,
    memory_bandwidth=1 / step_time.MEMORY,
    node_bandwidth=1 / step_time.NETWORK,
    network_bandwidth=0.1 / step_time.NETWORK,
)
CLUSTER = Cluster(speeds=SPEEDS)
LOAD = MicroBatchLoad(tokens=1000, count=4, longest=500)


@pytest.mark.parametrize("recompute, passes, attention_passes", [("none", 3, 3.5), ("full", 4, 4.5)])
def test_products_attention_and_logits_of_training(recompute, passes, attention_passes):
    s = replace(ONE_GPU, recompute=recompute)
    items = step_time.micro_batch(ONE_B, s, LOAD, CLUSTER, True)
    assert items["products"] == pytest.approx(16 * 2 * passes * 1000 * MATRICES / 1e12)
    pairs = 1000 * 250  # of a query and its mean number of keys
    rate = 1e12 * step_time.ATTENTION / step_time.PRODUCTS
    assert items["attention"] == pytest.approx(16 * 4 * attention_passes * pairs * 2048 / rate)
    traffic = 5 * 1000 * 128_256 * 2 / 1e9
    assert items["logits"] == pytest.approx(2 * 4 * 1000 * HEAD / 1e12 + traffic)
    kept = step_time.micro_batch(ONE_B, replace(s, keep_logits=True), LOAD, CLUSTER, True)
    assert kept["logits"] == pytest.approx(2 * 3 * 1000 * HEAD / 1e12 + traffic)
    assert items["layer_exchange"] == 0


def test_tensor_parallel_ranks_share_products_and_exchange_activations():
    whole = step_time.micro_batch(ONE_B, ONE_GPU, LOAD, CLUSTER, False)
    half = step_time.micro_batch(ONE_B, replace(ONE_GPU, tp=2), LOAD, CLUSTER, False)
    assert half["products"] == whole["products"] / 2
    # two all-reduces a layer, in each of which a rank sends 2 (tp - 1) / tp of [1000, 2048] bf16
    assert half["layer_exchange"] == pytest.approx(16 * 2 * 1000 * 2048 * 2 / 1e9)
    between = step_time.micro_batch(
        ONE_B, replace(ONE_GPU, tp=2), LOAD, replace(CLUSTER, gpus_per_node=1), False
    )
    assert between["layer_exchange"] == pytest.approx(10 * half["layer_exchange"])


def test_a_pipeline_waits_for_its_stages():
    s = replace(ONE_GPU, pp=4, stage=3)
    micro_batch_s = sum(step_time.micro_batch(ONE_B, s, LOAD, CLUSTER, False).values())
    assert sum(step_time.update(ONE_B, s, LOAD, CLUSTER, False).values()) == pytest.approx(
        (4 + 3) * micro_batch_s
    )
    assert step_time.update(ONE_B, replace(s, vp=3), LOAD, CLUSTER, False)["bubble"] == pytest.approx(
        micro_batch_s
    )


def test_exchange_and_optimizer_of_data_parallel_ranks():
    alone = step_time.update(ONE_B, ONE_GPU, LOAD, CLUSTER, True)
    assert alone["exchange"] == 0
    assert alone["optimizer"] == pytest.approx(50 * WEIGHTS / 1e9)
    micro_batch_s = sum(step_time.micro_batch(ONE_B, ONE_GPU, LOAD, CLUSTER, True).values())
    shared = step_time.update(ONE_B, replace(ONE_GPU, dp=16), LOAD, CLUSTER, True)
    assert shared["optimizer"] == pytest.approx(alone["optimizer"] / 16)
    sent = 15 / 16 * WEIGHTS / 1e8  # 16 ranks are two nodes
    assert shared["exchange"] == pytest.approx(4 * sent - 2 / 3 * micro_batch_s + 2 * sent)


def test_shorter_rows_take_fewer_micro_batches():
    assert step_time.filled(LOAD, 1.0) == LOAD
    assert step_time.filled(LOAD, 0.5) == MicroBatchLoad(tokens=1000, count=2, longest=250)
    assert step_time.filled(LOAD, 0.3) == MicroBatchLoad(tokens=600, count=2, longest=150)


def test_slots_of_a_rollout():
    """The third sequence takes the slot of the second; the last slot decodes alone."""
    assert list(step_time.active_slots([3, 1, 2], 2)) == [(1, 2), (2, 2)]
    assert list(step_time.active_slots([1, 5], 2)) == [(1, 2), (4, 1)]
    assert list(step_time.active_slots([2] * 4, 8)) == [(2, 4)]
    lengths = random.Random(0).choices(range(1, 100), k=50)
    assert sum(steps * active for steps, active in step_time.active_slots(lengths, 7)) == sum(lengths)


@pytest.mark.parametrize("fill", [1.0, 0.5, 0.2])
def test_lengths_of_responses(fill):
    lengths = step_time.response_lengths(10_000, 1000, fill)
    assert sum(lengths) / 10_000 == pytest.approx(1000 * fill, rel=0.01)
    assert max(lengths) == 1000 and min(lengths) >= 1


def test_a_decode_step_reads_weights_and_cache_once():
    kernels = 16 * step_time.DECODE_KERNELS
    cache = 2 * 16 * 8 * 64 * 2  # bytes of a token: keys and values of 16 layers
    expected = (2 * WEIGHTS + 3 * 100 * cache) / 1e9 + kernels
    assert step_time.decode_step(ONE_B, ONE_GPU, 3, 100, CLUSTER, True) == pytest.approx(expected)
    many = step_time.decode_step(ONE_B, ONE_GPU, 10_000, 0, CLUSTER, True)
    assert many == pytest.approx(2 * WEIGHTS * 10_000 / 1e12 + kernels)


def test_a_decode_step_without_a_graph_takes_its_launches():
    """Two tensor parallel ranks add two all-reduces a layer."""
    fast = replace(CLUSTER, speeds=Speeds(memory_bandwidth=1e6, peak_tflops=1e6))
    two = replace(ONE_GPU, tp=2)
    without, graphs = (step_time.decode_step(ONE_B, two, 1, 0, fast, graphs) for graphs in (False, True))
    assert without == pytest.approx(16 * 0.28e-3)
    assert graphs == pytest.approx(16 * (28e-6 + 2 * 20e-6), rel=0.01)


@pytest.mark.parametrize(
    ("flags", "launches"),  # of a decode step of the 4 layers: Python's, or a graph's kernels and all-reduces
    [
        ("--rollout-tp 2", 4 * 0.28e-3),
        ("--rollout-tp 2 --rollout-tp-graphs", 4 * (28e-6 + 2 * 20e-6)),
        ("--rollout-layout same", 4 * 0.28e-3),
        ("--rollout-layout same --rollout-tp-graphs", 4 * (28e-6 + 2 * 20e-6)),
        ("", 4 * 28e-6),
        ("--deterministic", 4 * 0.28e-3),
    ],
)
def test_flags_of_graphs(flags, launches):
    """64 decode steps of the built-in model, whose weights and KV cache take microseconds to read."""
    batch = "--prompts-per-step 16 --samples-per-prompt 2 --global-batch-size 32"  # fewer than slots
    words = f"--tp 2 --max-new-tokens 64 {batch} {flags}".split()
    config = plan.parse(plan.load_script(ROOT / "train_grpo.py").Config, words)
    job = config.plan(Cluster(gpus_per_node=2))
    [generate] = [phase for phase in job.phases(job.layout) if phase.name.startswith("generate")]
    decode = step_time.seconds(job, job.layout, generate)["decode"]
    assert 64 * launches <= decode < 64 * (launches + 30e-6)


def test_a_rollout_by_copies():
    load = RolloutLoad(slots=4, prompts=2, per_prompt=2, prompt=10, response=20)
    copy = replace(ONE_GPU, tp=1)
    items = step_time.rollout(ONE_B, copy, load, CLUSTER, True, True)
    assert items["decode"] == pytest.approx(20 * step_time.decode_step(ONE_B, copy, 4, 20, CLUSTER, True))
    assert items["reshard"] == pytest.approx(2 * WEIGHTS / 1e9)


@pytest.mark.parametrize("script", ["train_sft", "train_rm", "train_rs", "train_ppo", "train_self_reward"])
def test_the_table_sums_up(script, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    plan.main(["--gpus-per-node", "2", "--simulate", f"{script}.py", "--pp", "2"])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("seconds of a step"))
    rows = lines[start + 1 : -2]
    sums = [float(row.split()[-1]) for row in rows]
    assert rows and min(sums) > 0 and float(lines[-2].split()[3]) == pytest.approx(sum(sums), abs=0.02)
    assert not any(row.startswith(("build", "save")) for row in rows)


def test_a_second_epoch_trains_twice():
    def trained(epochs: int) -> float:
        config = plan.parse(plan.load_script(ROOT / "train_grpo.py").Config, ["--ppo-epochs", str(epochs)])
        job = config.plan(Cluster(gpus_per_node=1))
        times = {p.name: step_time.seconds(job, job.layout, p) for p in job.phases(job.layout)}
        return times["train policy"]["optimizer"]

    assert trained(2) == pytest.approx(2 * trained(1))


def test_no_estimate_for_cpus(capsys):
    with pytest.raises(SystemExit):
        plan.main(["--device", "cpu", "--host-memory", "8", "--simulate", "train_sft.py"])
    assert "--simulate estimates the time of GPUs" in capsys.readouterr().err
