"""GPU tests: the scripts as a user runs them, numbers beside a CPU's, kernels.

Tests of kernels run on the CPU, too, on what takes their place there; the others are marked `gpu`. On a
machine with one GPU: `pytest -m gpu tests/test_gpu.py`. fp32 is there for these comparisons: torch leaves
tf32 off for matrix products.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from align.data import context_slices, toy
from align.kernels import matmul
from align.model import attention, layers, logprobs
from tests.support import layer_formulas, logprob_formulas
from tests.support.files import ROOT, read_jsonl, reproducible_metrics
from tests.support.generation import (
    FP32,
    GREEDY,
    NEW_TOKENS,
    SAMPLED,
    network,
    prompts,
    sample,
    transformers_greedy,
)
from tests.support.launch import environment, torchrun
from tests.support.resume import SELF_REWARD
from tests.workers.logprobs import entropy_grad, inputs

CUDA = torch.cuda.is_available()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device, and there is none")]
on_gpu = [pytest.param("cuda", marks=needs_gpu)]
on_both = ["cpu", *on_gpu]
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
ANSWERS = "--reward-fn tests.support.rewards:reward --truncated keep --max-prompt-len 48 --prompts-per-step 4"
COMMANDS = {  # the tiny model; {data} and {judge} are folders
    "sft": "train_sft.py --train-data {data}/train.jsonl --global-batch-size 4 --max-seq-len 64",
    "rm": "train_rm.py --train-data {data}/train_comparisons.jsonl --global-batch-size 4 --max-seq-len 64",
    "dpo": "train_dpo.py --train-data {data}/train_comparisons.jsonl --global-batch-size 4 --max-seq-len 64",
    "rs": f"train_rs.py --train-data {{data}}/train.jsonl {ANSWERS} --samples-per-prompt 4 --keep-top 2 "
    "--max-new-tokens 12 --global-batch-size 4",
    "ppo": f"train_ppo.py --train-data {{data}}/train.jsonl {ANSWERS} --samples-per-prompt 2 "
    "--max-new-tokens 12 --global-batch-size 4",
    "self_reward": f"train_self_reward.py --global-batch-size 4 --max-seq-len 36 {SELF_REWARD}",
}
STEPS = 5
ALIKE = 1e-4  # what losses in fp32 may differ by between a CPU and a GPU, absolute and relative


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of chats and of comparisons."""
    directory = tmp_path_factory.mktemp("data")
    toy.write(directory, num_train=80, num_val=8)
    toy.write_comparisons(directory, num_train=80, num_val=8)
    return directory


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest) -> Path:
    """toy_judge, which two processes train: on the CPU."""
    with without_gpu():
        return request.getfixturevalue("toy_judge")


def without_gpu() -> mock._patch_dict:
    """Processes that start inside the block see no GPU."""
    return mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="")


def command(name: str, data: Path, judge: Path, output: Path, *more: object) -> list[str]:
    """One of COMMANDS with an output and more flags, which win."""
    words = COMMANDS[name].format(data=data, judge=judge).split()
    words += ["--output", output, "--save-interval", 0, "--warmup-steps", 1, "--lr", 1e-4, *more]
    return [str(word) for word in words]


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("device", on_gpu)
def test_a_script_trains_in_bf16(name, device, data, judge, tmp_path):
    done = torchrun(1, *command(name, data, judge, tmp_path / "out", "--max-steps", 3), timeout_s=400)
    assert "bfloat16" in done.stdout and "nccl" in done.stdout
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["step"]] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    exported = load_file(tmp_path / "out" / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    kind = "AutoModelForSequenceClassification" if name == "rm" else "AutoModelForCausalLM"
    getattr(transformers, kind).from_pretrained(tmp_path / "out" / "hf")


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"there is no {SMOLLM2.relative_to(ROOT)}: make smollm2")
@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
@pytest.mark.parametrize("device", on_gpu)
def test_smollm2_trains_in_bf16(name, device, data, judge, tmp_path):
    longer = ("--max-prompt-len", 128) if name == "ppo" else ("--max-seq-len", 128)
    flags = ("--model", SMOLLM2, "--max-steps", 3, *longer)
    torchrun(1, *command(name, data, judge, tmp_path / "out", *flags), timeout_s=400)
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["step"]] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.fixture(scope="module")
def cpu_and_gpu(data: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each device with all COMMANDS run on it, in fp32."""
    folders = {device: tmp_path_factory.mktemp(device) for device in ("cpu", "gpu")}
    for device, folder in folders.items():
        flags = ("--precision", "fp32", "--max-steps", STEPS)
        runs = [command(name, data, judge, folder / name, *flags) for name in COMMANDS]
        with without_gpu() if device == "cpu" else mock.patch.dict(os.environ):
            torchrun(1, "tests/workers/resume.py", json.dumps(runs), timeout_s=500)
    return folders


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("device", on_gpu)
def test_losses_are_those_of_a_cpu(name, device, cpu_and_gpu):
    """Sampled texts are equal, too: a draw differs only where its random number is 1e-6 from a bound."""
    cpu, gpu = (cpu_and_gpu[where] / name for where in ("cpu", "gpu"))
    assert " on CPU, gloo" in (cpu / "log.txt").read_text()
    assert "nccl" in (gpu / "log.txt").read_text()
    before, after = reproducible_metrics(cpu), reproducible_metrics(gpu)
    assert len(before) >= STEPS and [set(row) for row in before] == [set(row) for row in after]
    losses = {key for row in before for key in row if "loss" in key}
    assert losses
    for expected, actual in zip(before, after, strict=True):
        of_step = {key: expected[key] for key in losses & set(expected)}
        assert {key: actual[key] for key in of_step} == pytest.approx(of_step, rel=ALIKE, abs=ALIKE)
    if (cpu / "samples.jsonl").exists():
        assert texts(gpu) == texts(cpu)


def texts(output: Path) -> list[dict]:
    """samples.jsonl without its numbers."""
    rows = read_jsonl(output / "samples.jsonl")
    return [{key: value for key, value in row.items() if isinstance(value, str)} for row in rows]


COLLECTIVES = """
import torch, torch.distributed as dist
from align.distributed import parallel
with parallel.start(parallel.ParallelConfig()):
    assert dist.get_backend() == "nccl"
    for dtype in (torch.int64, torch.float64, torch.float32, torch.bfloat16):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            x = torch.arange(8, device=parallel.device()).to(dtype)
            dist.all_reduce(x, op)
            assert x.tolist() == list(range(8)), (dtype, op, x)
    assert parallel.gather({"a": [1, "b"]}) == [{"a": [1, "b"]}]
    dist.barrier()
"""


@pytest.mark.parametrize("device", on_gpu)
def test_collectives_in_use(device):
    run_python("-c", COLLECTIVES)


@pytest.mark.parametrize("device", on_both)
def test_products_are_added_unrounded(device):
    """fp32 totals of bf16 products: on a GPU without bf16's rounding, which a CPU's product has."""
    torch.manual_seed(0)
    a, b = (torch.randn(*shape, device=device).bfloat16() for shape in ((1000, 200), (200, 300)))
    total = torch.randn(1000, 300, device=device)
    expected = total.cpu().double() + a.cpu().double() @ b.cpu().double()
    matmul.add_product(total, a, b)
    error = (total.cpu().double() - expected).norm() / expected.norm()
    assert error < (1e-6 if device == "cuda" else 4e-3)


@pytest.mark.parametrize("device", on_gpu)
def test_the_cpu_backend_is_never_imported(device, data, judge, tmp_path):
    words = command("ppo", data, judge, tmp_path / "out", "--max-steps", 1)
    code = (
        f"import runpy, sys; sys.argv = {words}; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert 'align.generation.generator' in sys.modules; "
        "assert 'align.distributed.megatron_on_cpu' not in sys.modules"
    )
    run_python("-c", code)


def run_python(*words: object) -> None:
    """Run `python words...` from the repository's root, which must end well."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.mark.parametrize("device", on_gpu)
def test_offloading_changes_no_bit(device, data, judge, tmp_path):
    for offload in ("on", "off"):
        flags = ("--offload", offload, "--deterministic", "--max-steps", 3)
        run_python(*command("ppo", data, judge, tmp_path / offload, *flags))
    assert reproducible_metrics(tmp_path / "on") == reproducible_metrics(tmp_path / "off")
    assert (tmp_path / "on/samples.jsonl").read_text() == (tmp_path / "off/samples.jsonl").read_text()
    assert_same_weights(tmp_path / "on", tmp_path / "off")


@pytest.mark.parametrize("name", ["sft", "ppo"])
@pytest.mark.parametrize("device", on_gpu)
def test_a_continued_run_has_the_same_bits(name, device, data, judge, tmp_path):
    """The second run is the first one, as it was after step 2."""
    flags = ["--deterministic", "--max-steps", 4, "--save-interval", 2]
    flags += ["--val-data", data / "val.jsonl", "--val-interval", 2, "--save-top-k", 9]  # keeps both
    run_python(*command(name, data, judge, tmp_path / "whole", *flags))
    shutil.copytree(tmp_path / "whole", tmp_path / "continued")
    shutil.rmtree(tmp_path / "continued/checkpoints/step_00000004")
    shutil.rmtree(tmp_path / "continued/hf")
    run_python(*command(name, data, judge, tmp_path / "continued", *flags))
    assert "continuing after step 2" in (tmp_path / "continued/log.txt").read_text()
    assert reproducible_metrics(tmp_path / "continued") == reproducible_metrics(tmp_path / "whole")
    assert_same_weights(tmp_path / "continued", tmp_path / "whole")


def assert_same_weights(one: Path, other: Path) -> None:
    """The exported models are equal to the last bit."""
    weights, expected = (load_file(path / "hf" / "model.safetensors") for path in (one, other))
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


# ---- kernels -------------------------------------------------------------------------------------


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, bf16: float = 1e-2) -> None:
    """The norm of the difference, relative to that of the expected values, is below 1e-5; `bf16` in bf16."""
    error = ((actual.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm()).item()
    assert error < {torch.float32: 1e-5, torch.bfloat16: bf16}[dtype]


def exact(*tensors: Tensor) -> list[Tensor]:
    """The same values on the CPU in float64, with gradients of their own."""
    return [x.detach().cpu().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", on_both)
def test_small_layers(device, dtype):
    """Norm, gate and rotation with their gradients, for several lengths, 1 among them."""
    torch.manual_seed(0)
    weight = torch.randn(64, device=device).to(dtype).requires_grad_()
    cases: dict[Callable, tuple[Callable, tuple[int, ...]]] = {
        lambda x: layers.RMSNormFunction.apply(x, weight, layer_formulas.EPS): (layer_formulas.norm, (64,)),
        layers.SwiGLUFunction.apply: (layer_formulas.gate, (1, 64)),
    }
    for ours, (plain, shape) in cases.items():
        for tokens in (1, 5, 128, 777):
            x = torch.randn(tokens, *shape, device=device).to(dtype).requires_grad_()
            grad = torch.randn_like(y := ours(x))
            y.backward(grad)
            inputs = exact(x, weight) if plain is layer_formulas.norm else exact(x)
            expected = plain(*inputs)
            expected.backward(grad.cpu().double())
            assert_near(y, expected, dtype)
            assert_near(x.grad, inputs[0].grad, dtype)
            if plain is layer_formulas.norm:
                assert_near(weight.grad, inputs[1].grad, dtype)
                weight.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", on_both)
def test_rotation(device, dtype):
    torch.manual_seed(0)
    for tokens in (1, 5, 777):
        angles = torch.rand(tokens, 12, dtype=torch.float64) * 7
        cos, sin = (x[:, None].to(device, dtype) for x in (angles.cos(), angles.sin()))
        x = torch.randn(tokens, 3, 24, device=device).to(dtype).requires_grad_()
        grad = torch.randn_like(y := layers.rotary_embedding(x, cos, sin))
        y.backward(grad)
        (exact_x,) = exact(x)
        expected = layer_formulas.turned(exact_x, angles)
        expected.backward(grad.cpu().double())
        assert_near(y, expected, dtype)
        assert_near(x.grad, exact_x.grad, dtype)


def random_pack(rng: torch.Generator) -> tuple[list[int], list[tuple[int, int]]]:
    """Lengths of some sequences, and what each continues: half of them a beginning of one before."""
    lengths, prefixes = [], []
    for _ in range(8):
        length = int(torch.randint(1, 90, (), generator=rng))
        source = int(torch.randint(0, 2 * len(lengths) + 1, (), generator=rng))
        prefix = (0, 0)
        if source < len(lengths):
            size = int(torch.randint(1, lengths[source] + 1, (), generator=rng))
            prefix = sum(lengths[:source]), size
        lengths.append(length)
        prefixes.append(prefix)
    return lengths, prefixes


def attend_slowly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    prefixes: list[tuple[int, int]],
    window: int | None,
) -> Tensor:
    """Sequence by sequence, a matrix of scores for each: [T, heads, d]."""
    parts, begin = [], 0
    for length, (start, size) in zip(lengths, prefixes, strict=True):
        own = slice(begin, begin + length)
        k, v = (torch.cat([x[start : start + size], x[own]]) for x in (key, value))
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (k, v))
        distance = torch.arange(size, size + length)[:, None] - torch.arange(size + length)
        hidden = (distance < 0) | (distance >= (window or size + length))
        scores = torch.einsum("qhd,khd->hqk", query[own], k) * query.shape[-1] ** -0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
        begin += length
    return torch.cat(parts)


@pytest.mark.parametrize(("seed", "ranks"), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 3)])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("heads", "groups", "d"), [(4, 4, 64), (6, 2, 24), (8, 1, 128)])
@pytest.mark.parametrize("device", on_both)
def test_attention_over_random_packs(device, heads, groups, d, window, seed, ranks):
    """In bf16, context parallel ranks in turn: on a GPU the flash kernels, on a CPU one call per sequence."""
    rng = torch.Generator().manual_seed(seed)
    lengths, prefixes = random_pack(rng)
    if rest := -sum(lengths) % (2 * ranks):
        lengths, prefixes = [*lengths, rest], [*prefixes, (0, 0)]
    total = sum(lengths)
    inputs = [
        torch.randn(total, count, d, generator=rng).bfloat16().to(device).requires_grad_()
        for count in (heads, groups, groups)
    ]
    assert attention.uses_flash(torch.bfloat16, d, inputs[0].is_cuda) == (device == "cuda")
    core = object.__new__(attention.TorchAttention)  # without the parts that need process groups
    torch.nn.Module.__init__(core)
    core.scale, core.window = d**-0.5, window
    spans = [context_slices.spans_of_rank(total, rank, ranks) for rank in range(ranks)]
    gathered = [torch.cat([context_slices.take(x, own) for own in spans]) for x in inputs[1:]]
    parts = []
    for rank, own in enumerate(spans):
        layout = torch.device(device), (rank, ranks)
        packing = attention.packed_params(lengths, prefixes, total, None, *layout)
        parts.append(core.within(context_slices.take(inputs[0], own), *gathered, packing))
    out = context_slices.in_pack_order(torch.cat(parts), ranks)
    grad = torch.randn(total, heads, d, generator=rng).bfloat16()
    out.backward(grad.to(device))
    slow = exact(*inputs)
    expected = attend_slowly(*slow, lengths, prefixes, window)
    expected.backward(grad.double())
    assert_near(out, expected, torch.bfloat16)
    for ours, theirs in zip(inputs, slow, strict=True):
        assert_near(ours.grad, theirs.grad, torch.bfloat16)


@pytest.mark.parametrize("device", on_gpu)
def test_flash_attention_3_is_in_use_where_it_is_installed(device):
    installed = importlib.util.find_spec("flash_attn_interface") is not None
    newest = installed and torch.cuda.get_device_capability(device)[0] == 9
    assert attention.flash_kernel() == ("FlashAttention 3" if newest else "flash attention")
    assert torch.nn.attention.current_flash_attention_impl() == ("FA3" if newest else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("tokens", [1, 700, 2500])
@pytest.mark.parametrize("device", on_both)
def test_logprobs_of_hidden_states(device, tokens, entropy, dtype, monkeypatch):
    """With their gradients, beside float64 on a CPU; the most tokens take several chunks."""
    monkeypatch.setattr(logprobs, "GPU_LOGITS", 2**17)
    hidden, weight, targets, grad = inputs(tokens)
    grad = entropy_grad(tokens) if entropy else grad
    arguments = hidden.to(dtype), weight.to(dtype), targets, grad
    results = logprob_formulas.ours(*(x.to(device) for x in arguments))
    for ours, theirs in zip(results, logprob_formulas.oracle(*arguments), strict=True):
        assert_near(ours, theirs, dtype, bf16=2e-2)  # logits are rounded, then probabilities


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Cases of the decode kernels; what they change there is as before afterwards."""
    from align.kernels import decode_attention  # needs Triton, which comes with torch for CUDA
    from tests.workers import decode_attention as cases

    for name in ("PROGRAMS", "LEAST"):
        monkeypatch.setattr(decode_attention, name, getattr(decode_attention, name))
    with torch.device("cuda"):
        yield cases


@pytest.mark.parametrize("device", on_gpu)
def test_decode_attention(device, kernels):
    """The compiled kernels on the cases that test_decode_attention.py interprets, and in bf16."""
    for case in kernels.CASES + kernels.ON_GPU:
        result = kernels.attend_error(*case)
        assert result["error"] < (1e-5 if case[-1] == "float32" else 2e-2), case


@pytest.mark.parametrize("device", on_gpu)
def test_decode_append(device, kernels):
    for queries, d, dtype in [(1, 8, "float32"), (3, 24, "float32"), (16, 128, "bfloat16")]:
        assert kernels.append_error(queries, d, dtype) < (1e-5 if dtype == "float32" else 5e-2)


WITHOUT_GRAPHS = (
    "import runpy, sys; from align.generation import inference; "
    "inference.why_no_graphs = lambda policy, tp_graphs: 'a test'; "
    "sys.argv = ['tests/workers/generator.py', *sys.argv[1:]]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.parametrize("device", on_gpu)
def test_graphs_change_no_answer(device, models, tmp_path):
    """Drawn answers with penalty and filters; more prompts than slots, so that slots are filled anew."""
    case = {"model": str(models / "llama"), "prompts": prompts(), "sampling": SAMPLED, "samples": 2}
    cases = {str(slots): {**case, "rollout": {"rollout_slots": slots}} for slots in (3, 50, 128)}
    cases_path, results_path = tmp_path / "cases.json", tmp_path / "plain.json"
    cases_path.write_text(json.dumps(cases))
    run_python("-c", WITHOUT_GRAPHS, cases_path, results_path)
    plain, graphed = json.loads(results_path.read_text()), sample(tmp_path, 1, cases)
    for name in cases:
        for answer, other in zip(
            (answer for answers in graphed[name]["answers"] for answer in answers),
            (answer for answers in plain[name]["answers"] for answer in answers),
            strict=True,
        ):
            assert answer[0] == other[0] and answer[3] == other[3]
            assert answer[1] == pytest.approx(other[1], abs=FP32[1])


@pytest.mark.parametrize("device", on_gpu)
def test_greedy_answers_are_those_of_transformers(device, models, tmp_path):
    """In fp32, with CUDA graphs, prompts beside others; transformers computes each alone on the CPU."""
    families = ("llama", "qwen2", "qwen3", "mistral", "stablelm", "nemotron")
    cases = {
        f"{family} {slots}": {
            **{"model": str(models / family), "prompts": prompts(), "sampling": GREEDY},
            "rollout": {"rollout_slots": slots},
        }
        for family in families
        for slots in (5, 64)
    }
    results = sample(tmp_path, 1, cases)
    for family in families:
        expected = transformers_greedy(network(models / family), prompts(), NEW_TOKENS)
        for slots in (5, 64):
            assert [answer[0] for [answer] in results[f"{family} {slots}"]["answers"]] == expected
