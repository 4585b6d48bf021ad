"""The adapter of TensorRT-LLM against a stand-in: it cannot run here. See tests/stand_ins/tensorrt_llm."""

import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.multiprocessing import reductions

from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.generation import trtllm
from align.generation.sampling import SamplingConfig
from align.model.config import ModelConfig
from tests.support.launch import fork_ranks
from tests.support.stand_ins import StandIn

LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {}}
GREEDY = {"max_new_tokens": 12, "greedy": True}
FILTERED = {"max_new_tokens": 6, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
STOPS = [chr(0x100 + i) for i in range(40, 60)]
CASES = {  # family, sampling, ranks of an engine, is memory kept
    "greedy": ("nemotron", GREEDY, 1, False),
    "greedy over 2": ("qwen2", GREEDY, 2, False),
    "drawn": ("qwen3", {**FILTERED, "stop": STOPS}, 1, True),
}


@pytest.fixture(scope="module")
def results(models, tmp_path_factory) -> dict[str, dict]:
    """Results of workers/trtllm.py by layout and case."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(12, 131, length).tolist() for length in (3, 9, 1, 250, 20, 5)]
    cases = {}
    for layout, parallel in LAYOUTS.items():
        for name, (family, sampling, tp, keep) in CASES.items():
            case = dict(parallel=parallel, model=str(models / family), sampling=sampling, rollout_tp=tp)
            cases[f"{layout} {name}"] = case | dict(keep=keep, prompts=prompts, native="greedy" in sampling)
    folder = tmp_path_factory.mktemp("trtllm")
    (folder / "cases.json").write_text(json.dumps(cases))
    fork_ranks(2, "tests/workers/trtllm.py", folder / "cases.json", folder / "found.json")
    return json.loads((folder / "found.json").read_text())


@pytest.fixture
def fake():
    """The stand-in, as the package that it stands for."""
    with mock.patch.object(sys, "meta_path", [StandIn("tensorrt_llm"), *sys.meta_path]):
        yield importlib.import_module("tensorrt_llm")
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


# ---- whole rollouts in two processes -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_engine_gets_the_weights_bit_for_bit(results, layout, name):
    wrong = results[f"{layout} {name}"]["wrong"]
    assert len(wrong) == 3 and all(engines == [[]] * (2 // CASES[name][2]) for engines in wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("greedy", "greedy over 2"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_answers_are_those_of_native_sampling(results, layout, name):
    case = results[f"{layout} {name}"]
    assert len({answer[3] for answer in case["native"]}) == 2, "some end by themselves, some do not"
    for ours, native in zip(case["answers"][0], case["native"], strict=True):
        assert (ours[0], ours[1], ours[3]) == (native[0], native[1], native[3])
        np.testing.assert_allclose(ours[2], native[2], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("greedy", "greedy over 2"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_generator_samples_with_engines(results, layout, name):
    case = results[f"{layout} {name}"]
    assert case["generator"] == case["answers"][0]
    told = {}
    for i, number, token in case["told"]:
        told.setdefault((i, number), []).append(token)
    assert told == {(i, 0): answer[0] for i, answer in enumerate(case["generator"])}
    tp = CASES[name][2]
    assert case["described"] == f"sampling in TensorRT-LLM, tp {tp}: {2 // tp} x 4 sequences at a time"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_answers_follow_from_weights_and_seeds_alone(results, name):
    ids = {
        layout: [[answer[0] for answer in rollout] for rollout in results[f"{layout} {name}"]["answers"]]
        for layout in LAYOUTS
    }
    assert ids["tp2"][0] == ids["tp2"][1] != ids["tp2"][2], "the third has other weights"
    assert ids["tp2"] == ids["pp2"] == ids["dp2"]


@pytest.mark.slow
def test_stop_strings_end_answers_with_the_token_that_completes_them(results):
    ended = 0
    for ids, *_, finish in results["dp2 drawn"]["answers"][0]:
        stops = [i for i, token in enumerate(ids) if 2 <= token < 12 or 40 <= token < 60]
        assert stops == ([len(ids) - 1] if finish == "stop" else [])
        ended += finish == "stop" and ids[-1] >= 12
    assert ended


@pytest.mark.slow
def test_memory_is_released_between_rollouts_unless_it_is_kept(results):
    update = ["update_weights", "finish"]
    asleep, kept = ("greedy over 2", "drawn")
    [log] = results[f"tp2 {asleep}"]["log"]
    once = [call for i, call in enumerate(log) if call != "update_weights" or log[i - 1] != call]
    assert once == [*update, "generate", "sleep", *(["wakeup", *update, "wakeup", "generate", "sleep"] * 2)]
    assert log.count("update_weights") > 3 * 5, "several buckets"
    log, _ = results[f"tp2 {kept}"]["log"]
    once = [call for i, call in enumerate(log) if call != "update_weights" or log[i - 1] != call]
    assert once == [*update, "generate"] * 3


# ---- log-probs, stops ----------------------------------------------------------------------------


def engine(**sampling: object) -> trtllm.Engine:
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    return trtllm.Engine(Path("there"), SamplingConfig(**sampling), {2}, (), group, 4, False, 0.5)


def output(ids: list[int], logprobs: list[float], reason: str = "length") -> SimpleNamespace:
    told = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids, logprobs, strict=True)]
    return SimpleNamespace(token_ids=ids, logprobs=told, finish_reason=reason)


NAN = [np.nan, np.nan]


@pytest.mark.parametrize(
    ("sampling", "logprobs", "model_logprobs"),
    [
        ({}, [-1, -2], [-1, -2]),
        ({"temperature": 0.7}, [-1, -2], NAN),
        ({"top_k": 5}, NAN, [-1, -2]),
        ({"top_p": 0.9, "temperature": 2.0}, NAN, NAN),
        ({"greedy": True}, [0, 0], [-1, -2]),
    ],
)
def test_log_probs_are_told_where_they_are_known(sampling, logprobs, model_logprobs):
    ids, drawn, of_model, finish = engine(**sampling).response(output([7, 8], [-1, -2]), 2, lambda ids: False)
    assert (ids.tolist(), finish) == ([7, 8], "length") and ids.dtype == np.int32
    np.testing.assert_array_equal(drawn, np.array(logprobs, np.float32))
    np.testing.assert_array_equal(of_model, np.array(model_logprobs, np.float32))


def test_an_answer_is_cut_at_the_first_token_that_ends_it():
    ids, drawn, _, finish = engine(stop=("x",)).response(
        output([7, 8, 9, 8], [-1, -2, -3, -4]), 4, lambda ids: ids[-1] == 8
    )
    assert (ids.tolist(), drawn.tolist(), finish) == ([7, 8], [-1, -2], "stop")


def test_an_answer_in_a_full_room_that_ends_has_ended_by_itself():
    ids, *_, finish = engine().response(output([7, 2], [-1, -2]), 2, lambda ids: ids[-1] == 2)
    assert (ids.tolist(), finish) == ([7, 2], "stop")


@pytest.mark.parametrize("ids", [[7, 8], []])
def test_an_answer_that_ends_for_no_known_reason_stops_the_run(ids):
    with pytest.raises(RuntimeError, match=rf"after {len(ids)} of 5 tokens: timeout"):
        engine().response(output(ids, [-1.0] * len(ids), "timeout"), 5, lambda ids: ids[-1] == 2)


def test_a_log_prob_of_another_token_is_refused():
    told = output([7, 2], [-1, -2])
    told.logprobs[1] = {9: told.logprobs[1][2]}  # as TorchSampler tells the likeliest
    with pytest.raises(RuntimeError, match="log-prob"):
        engine().response(told, 2, lambda ids: True)


# ---- small parts ---------------------------------------------------------------------------------


def test_seeds_differ_by_run_stream_and_number():
    places = [(run, stream, number) for run in (1, 2) for stream in ((0, 1), (1, 0)) for number in (0, 1)]
    seeds = {trtllm.seed(*place) for place in places}
    assert len(seeds) == len(places) and all(0 <= value < 2**63 for value in seeds)
    assert trtllm.seed(1, (0, 1), 0) == trtllm.seed(1, (0, 1), 0)


def test_buckets_hold_copies_up_to_their_size():
    tensors = [
        (f"t{i}", torch.full((2, n), float(i)).t()) for i, n in enumerate((1, 2, 9, 1))
    ]  # 8, 16, 72, 8
    buckets = list(trtllm.buckets(iter(tensors), 24))
    assert [[name for name, _ in bucket] for bucket in buckets] == [["t0", "t1"], ["t2"], ["t3"]]
    for (_, copy), (_, tensor) in zip(sum(buckets, []), tensors, strict=True):
        assert torch.equal(copy, tensor) and copy.is_contiguous() and copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("before", [None, "4,5,6,7"])
def test_workers_inherit_their_gpus_and_nothing_of_torchrun(before):
    torchrun = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ours = {"PATH": "/bin", **torchrun} | ({} if before is None else {"CUDA_VISIBLE_DEVICES": before})
    with mock.patch.dict(os.environ, ours, clear=True):
        with trtllm.environment(["6", "7"]):
            assert dict(os.environ) == {
                "PATH": "/bin",
                "CUDA_VISIBLE_DEVICES": "6,7",
                "TLLM_RAY_FORCE_LOCAL_CLUSTER": "1",
                "TLLM_DISABLE_MPI": "1",
            }
            os.environ["OF_THE_ENGINE"] = "stays"
        later = {"TLLM_RAY_FORCE_LOCAL_CLUSTER": "1", "TLLM_DISABLE_MPI": "1", "OF_THE_ENGINE": "stays"}
        assert dict(os.environ) == ours | later


@pytest.mark.parametrize(("visible", "number"), [(None, "1"), ("", "1"), ("4,6", "6")])
def test_gpus_are_named_as_on_their_node(visible, number):
    value = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    with (
        mock.patch.dict(os.environ, value, clear=True),
        mock.patch("torch.cuda.current_device", return_value=1),
    ):
        assert trtllm.gpu() == number


def test_gpus_by_uuid_are_refused():
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}
    with mock.patch.dict(os.environ, visible), mock.patch("torch.cuda.current_device", return_value=0):
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES GPU-8932f937"):
            trtllm.gpu()


def check(
    package: bool = True,
    model: str = "tiny",
    precision: str = "bf16",
    deterministic: bool = False,
    **sampling: object,
) -> None:
    config, layout = ModelConfig(model, precision), ParallelConfig(deterministic=deterministic)
    spec = mock.patch("importlib.util.find_spec", return_value=package or None)
    with spec, mock.patch("torch.cuda.is_available", return_value=True):
        trtllm.check_trtllm(SamplingConfig(**sampling), config, layout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"package": False}, "requirements-trtllm.txt"),
        ({"precision": "fp32"}, "--precision fp32"),
        ({"deterministic": True}, "--deterministic"),
        ({"min_p": 0.1}, "--min-p 0.1"),
        ({"repetition_penalty": 1.1}, "--repetition-penalty 1.1"),
        ({"top_k": 1025}, "--top-k up to 1024, not 1025"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(settings, message):
    check(temperature=0.5, top_k=1024, top_p=0.5)
    with pytest.raises(UserError, match=message):
        check(**settings)


def test_angles_that_the_engine_would_overlook_are_refused(tmp_path):
    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
    with pytest.raises(UserError, match="rope_theta and rope_scaling"):
        check(model=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope, "rope_theta": 500000.0}))
    check(model=str(tmp_path))


def test_a_share_of_rotated_dimensions_that_the_engine_would_overlook_is_refused(tmp_path):
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_type": "default"}
    config = {"model_type": "nemotron", "rope_parameters": rope, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="give it partial_rotary_factor and rope_scaling"):
        check(model=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": 0.25}))
    check(model=str(tmp_path))


def test_stablelm_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "stablelm"}))
    with pytest.raises(UserError, match="--generate-with trtllm does not know the model_type stablelm"):
        check(model=str(tmp_path))


def test_a_machine_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="needs a GPU"):
        trtllm.check_trtllm(SamplingConfig(), ModelConfig(), ParallelConfig())


def test_workers_find_the_device_where_torch_keeps_it():
    """WorkerExtension writes the number of its GPU over the seventh argument of a handle."""
    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[6] == "storage_device"


# ---- the stand-in --------------------------------------------------------------------------------


def stand_in_engine(fake, model: Path, **changes: object):
    """An engine of the stand-in with the options of the adapter, but for `changes`."""
    ours = engine()
    ours.model, ours.context = model, 256
    with mock.patch.object(fake, "LLM", side_effect=lambda **options: options):
        options = ours.make("float32") | changes
    with mock.patch.dict(os.environ, clear=True), trtllm.environment(["0"]):
        return fake.LLM(**options)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tensor_parallel": 1}, ValueError),
        ({"max_batch_size": "4"}, TypeError),
        ({"enable_sleep": 1}, TypeError),
        ({"sampler_type": "trtllm"}, ValueError),
    ],
)
def test_the_stand_in_refuses_unknown_names_and_types(fake, models, changes, error):
    with pytest.raises(error):
        stand_in_engine(fake, models / "llama", **changes)


@pytest.mark.parametrize(
    "options", [{"stop_ids": [2]}, {"logprobs": 1.0}, {"stop_token_ids": {2}}, {"top_p": 1}]
)
def test_the_stand_in_refuses_unknown_sampling_parameters(fake, options):
    with pytest.raises(TypeError):
        fake.SamplingParams(**options)


def test_the_stand_in_finds_stale_blocks_and_missing_tensors(fake, models):
    from tensorrt_llm.llmapi import KvCacheConfig

    params = [fake.SamplingParams(-1, max_tokens=2, stop_token_ids=[2], seed=1, temperature=1.0, top_p=1.0)]
    for reuse in (False, True):
        llm = stand_in_engine(fake, models / "llama", kv_cache_config=KvCacheConfig(enable_block_reuse=reuse))
        whole = [(name, (torch.clone, (tensor.data,))) for name, tensor in llm.expected.items()]
        with pytest.raises(AssertionError, match="not complete"):
            llm.generate([[5]], params)
        llm._collective_rpc("update_weights", args=({"GPU-0": whole[1:]},))
        with pytest.raises(AssertionError, match="never came"):
            llm._collective_rpc("update_weights", args=(None,))
        for _ in range(2):
            llm._collective_rpc("update_weights", args=({"GPU-0": whole},))
            llm._collective_rpc("update_weights", args=(None,))
            if llm.stale:
                break
            llm.generate([[5]], params)
        assert llm.stale == reuse
    with pytest.raises(AssertionError, match="older weights"):
        llm.generate([[5]], params)


@pytest.mark.parametrize("last", [2, 9])
def test_each_stop_token_stays_in_its_answer(fake, models, last):
    ours = engine()
    ours.stop_ids, ours.context, ours.llm = [2, 9], 256, stand_in_engine(fake, models / "llama")
    ours.llm.whole = True
    with mock.patch.object(ours.llm, "_draw", side_effect=[7, last]):
        [(ids, _, _, finish)] = ours.sample([np.array([5])], [1], lambda ids: ids[-1] in (2, 9))
    assert (ids.tolist(), finish) == ([7, last], "stop")


def test_ids_without_a_token_are_never_drawn(fake, models):
    ours = engine(max_new_tokens=40, temperature=3.0)
    ours.absent_ids, ours.stop_ids = list(range(10, 131)), [131]  # no id ends an answer early
    ours.context, ours.llm = 256, stand_in_engine(fake, models / "llama")
    ours.llm.whole = True
    [(ids, *_)] = ours.sample([np.array([5])], [1], lambda ids: False)
    assert len(ids) == 40 and set(ids.tolist()) <= set(range(10)) and len(set(ids.tolist())) > 2


def test_equal_seeds_draw_equal_answers(fake, models):
    ours = engine(max_new_tokens=8)
    ours.stop_ids, ours.context, ours.llm = [131], 256, stand_in_engine(fake, models / "llama")
    ours.llm.whole = True
    first, second, third = ours.sample([np.array([5])] * 3, [1, 2, 1], lambda ids: False)
    assert first[0].tolist() == third[0].tolist() != second[0].tolist()
