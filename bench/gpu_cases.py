"""The cases of bench/gpu.py, each in a process of its own, its results as lines of a file.

    python bench/gpu_cases.py CASE FOLDER

CASE is a JSON object of `section`, `shape` and, for ppo, `offload`. The process imports what the case needs,
reads a line of input, measures, and appends each record to FOLDER/<case>.jsonl at once.
"""

import functools
import gc
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median_low as median

import common  # noqa: F401, it puts the package on the path
import gpu
import numpy as np
import torch
from gpu import SHAPES, Record, Shape, Work

from align.data import packing
from align.data.packing import Example
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.generation import sampling
from align.generation.generator import Generator, RolloutConfig
from align.losses import preference, supervised
from align.losses.statistics import log_ratio_statistics
from align.model import architecture, config, gpt, huggingface, huggingface_names
from align.training import batching, engine, optim, phases
from align.training.reference import Swapped

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 8192  # tokens
INIT_STD = 0.02
BETA = 0.1
KL_COEF = 0.05
FIRST_ID = 264  # past the ids of assets/tiny's tokenizer
LAYOUT = ParallelConfig()
UNSTEADY = 8  # first steps of a call of decoding, which do not count: a graph is captured in one of them
Emit = Callable[[Record], None]


def architecture_of(shape: Shape, labels: int = 0) -> architecture.Architecture:
    """Architecture of a Llama of this shape."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(hf_config(shape, labels)))
        return architecture.read_config(Path(folder))


@torch.no_grad()
def random_policy(shape: Shape, layers: int, settings: config.ModelConfig) -> gpt.Policy:
    """A policy whose matrices are normal, drawn on its own device: a CPU takes a minute for 8b."""
    policy = gpt.build_policy(architecture_of(replace(shape, layers=layers)), settings, LAYOUT)
    torch.manual_seed(0)
    for weight in policy.parameters():
        if weight.dim() > 1:
            weight.normal_(std=INIT_STD)
    return policy


def settings_of(shape: str) -> config.ModelConfig:
    """Flags of the models of this benchmark."""
    return config.ModelConfig(model=f"llama-{shape}", precision="bf16")


def steps_of_rows(shape: Shape, work: Work) -> list[list[Example]]:
    """The rows of each SFT step, warm-up first; every token but the first is trained."""
    rng = np.random.default_rng(0)
    return [
        [random_row(shape, work.row_tokens, rng) for _ in range(work.rows)] for _ in range(num_steps(work))
    ]


def random_row(shape: Shape, bounds: tuple[int, int], rng: np.random.Generator) -> Example:
    """One row of random tokens."""
    length = int(rng.integers(bounds[0], bounds[1] + 1))
    return Example(random_ids(shape, length, rng), np.arange(length) > 0)


def random_ids(shape: Shape, length: int, rng: np.random.Generator) -> np.ndarray:
    """[length] int32 token ids past those of the built-in tokenizer, so that none pads or ends a text."""
    return rng.integers(FIRST_ID, shape.vocab, length).astype(np.int32)


def steps_of_pairs(shape: Shape, work: Work) -> list[list[tuple[Example, Example]]]:
    """The pairs of each DPO step, chosen first, warm-up first; the answers' tokens are trained."""
    rng = np.random.default_rng(1)
    return [[random_pair(shape, work, rng) for _ in range(work.pairs)] for _ in range(num_steps(work))]


def random_pair(shape: Shape, work: Work, rng: np.random.Generator) -> tuple[Example, Example]:
    """Two random answers to one random prompt."""
    prompt = random_ids(shape, int(rng.integers(work.prompt_tokens[0], work.prompt_tokens[1] + 1)), rng)
    pair = []
    for _ in range(2):
        answer = random_ids(shape, int(rng.integers(work.answer_tokens[0], work.answer_tokens[1] + 1)), rng)
        ids = np.concatenate([prompt, answer])
        pair.append(Example(ids, np.arange(len(ids)) >= len(prompt)))
    return pair[0], pair[1]


def num_steps(work: Work) -> int:
    """Steps with those that do not count."""
    return work.warmup + work.steps


def forward_flops_of(shape: Shape, layers: int, rows: list[list[Example]]) -> int:
    """Operations of one forward pass over rows of examples that share the places of a common beginning."""
    tokens = predicted = keys = 0
    for row in rows:
        for example, prefix in zip(row, packing.shared_places(row), strict=True):
            own = example.num_inputs - prefix
            tokens += own
            predicted += int(example.trained.sum())
            keys += gpu.keys_seen(own, prefix)
    return gpu.forward_flops(shape, layers, tokens, predicted, keys)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call, until the GPU is done with it."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def device_bytes() -> int:
    """The GPU's memory, without one the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limits(case: Record, scratch: Path, emit: Emit) -> None:
    """The rate of a large product of random matrices, and of a copy within the device."""
    work, device = gpu.work_of(case["shape"]), parallel.device()
    n = work.product
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randint(0, 255, (work.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def per_call(call: Callable[[], object]) -> float:
        def ten() -> None:
            for _ in range(10):
                call()

        ten()
        return median([seconds_of(ten) / 10 for _ in range(5)])

    product_s = per_call(lambda: torch.mm(a, b, out=out))
    copy_s = per_call(lambda: target.copy_(source))
    emit(
        {
            "device": parallel.device_name(),
            "torch": torch.__version__,
            "device_bytes": device_bytes(),
            "product": n,
            "product_tflops": 2 * n**3 / product_s / 1e12,
            "copy_gb_per_s": 2 * work.copy_bytes / copy_s / 1e9,
        }
    )


def train_record(
    layers: int, seconds: list[float], tokens: list[int], flops: list[int], warmup: int
) -> Record:
    """Speeds of the median step of those after `warmup`, from each step's seconds, tokens and operations."""
    measured = list(zip(seconds, tokens, flops, strict=True))[warmup:]
    return {
        "layers": layers,
        "steps": len(measured),
        "step_s": median([s for s, _, _ in measured]),
        "tokens_per_s": median([count / s for s, count, _ in measured]),
        "tflops": median([count / s / 1e12 for s, _, count in measured]),
        "peak_gb": phases.peak_bytes() / 1e9,
    }


def sft(case: Record, scratch: Path, emit: Emit) -> None:
    """Optimizer steps as train_sft.py takes them, of packing, forward and backward pass, and AdamW."""
    shape, work = SHAPES[case["shape"]], gpu.work_of(case["shape"])
    layers = gpu.layers_that_fit(shape, device_bytes())
    budget = packing.BatchConfig(work.rows, micro_batch_tokens=work.micro_batch_tokens)
    steps = steps_of_rows(shape, work)
    with parallel.start(LAYOUT):
        policy = gpt.distributed(random_policy(shape, layers, settings_of(case["shape"])))
        optimizer = common.our_optimizer(policy)

        def loss_fn(batch: packing.Batch, logprobs: torch.Tensor) -> tuple[torch.Tensor, dict]:
            return supervised.sft_loss(logprobs, batch.mask), {}

        def step(examples: list[Example]) -> None:
            batches = batching.micro_batches(policy, [[example] for example in examples], budget)
            engine.forward_backward(policy, batches, loss_fn, packing.num_trained(examples))
            optim.step(optimizer, common.LEARNING_RATE)

        seconds = []
        for number, examples in enumerate(steps):
            if number == work.warmup:
                phases.start_peak()
            seconds.append(seconds_of(functools.partial(step, examples)))
        tokens = [sum(len(row.ids) for row in rows) for rows in steps]
        flops = [
            gpu.train_flops(forward_flops_of(shape, layers, [[row] for row in rows]), reference=False)
            for rows in steps
        ]
        emit(train_record(layers, seconds, tokens, flops, work.warmup))


def dpo(case: Record, scratch: Path, emit: Emit) -> None:
    """Optimizer steps as train_dpo.py --reference swap takes them; a prompt counts with both answers."""
    shape, work = SHAPES[case["shape"]], gpu.work_of(case["shape"])
    layers = gpu.layers_that_fit(shape, device_bytes())
    budget = packing.BatchConfig(work.pairs, micro_batch_tokens=work.micro_batch_tokens)
    steps = steps_of_pairs(shape, work)
    with parallel.start(LAYOUT):
        policy = gpt.distributed(random_policy(shape, layers, settings_of(case["shape"])))
        optimizer = common.our_optimizer(policy)

        def sequence_logprobs(batch: packing.Batch, logprobs: torch.Tensor) -> torch.Tensor:
            return preference.sequence_logprobs(logprobs, batch.mask, batch.lengths)

        def loss_fn(batch: packing.Batch, logprobs: torch.Tensor) -> tuple[torch.Tensor, dict]:
            policy_logprobs = sequence_logprobs(batch, logprobs).view(-1, 2).unbind(1)
            ref_logprobs = batch.extra["ref"].view(-1, 2).unbind(1)
            loss = preference.dpo(*policy_logprobs, *ref_logprobs, BETA).sum()
            return loss, log_ratio_statistics(*policy_logprobs, *ref_logprobs, BETA)

        reference = Swapped(policy, sequence_logprobs)
        seconds, reference_s = [], []
        for number, pairs in enumerate(steps):
            if number == work.warmup:
                phases.start_peak()
            start = time.perf_counter()
            batches = batching.micro_batches(policy, pairs, budget)
            reference_s.append(seconds_of(functools.partial(reference.attach, batches, "train")))
            engine.forward_backward(policy, batches, loss_fn, len(pairs))
            optim.step(optimizer, common.LEARNING_RATE)
            synchronize()
            seconds.append(time.perf_counter() - start)
        tokens = [sum(len(example.ids) for pair in pairs for example in pair) for pairs in steps]
        flops = [gpu.train_flops(forward_flops_of(shape, layers, pairs), reference=True) for pairs in steps]
        shares = [part / whole for part, whole in zip(reference_s, seconds, strict=True)][work.warmup :]
        emit(train_record(layers, seconds, tokens, flops, work.warmup) | {"reference_share": median(shares)})


class NoStops:
    """A tokenizer without a stop token."""

    stop_ids: set[int] = set()
    vocab_size = 2**31
    stop_strings, chat = (), None

    def decode(self, ids: list[int]) -> str:
        return ""


def decode(case: Record, scratch: Path, emit: Emit) -> None:
    """Calls of Generator.generate. A step is the time between two tokens of the first answer."""
    shape, work = SHAPES[case["shape"]], gpu.work_of(case["shape"])
    settings, n = settings_of(case["shape"]), work.decode_tokens
    rng = np.random.default_rng(2)
    with parallel.start(LAYOUT):
        policy = random_policy(shape, shape.layers, settings)
        cases = [(count, n, count) for count in work.decode_batches]
        cases += [(count, work.long_tokens - n, 1) for count in work.long_batches]
        for count, length, num_prompts in cases:
            slots = RolloutConfig(rollout_slots=count)
            sampling_config = sampling.SamplingConfig(max_new_tokens=n)
            generator = Generator(policy, slots, sampling_config, settings, LAYOUT, NoStops())
            prompts = [random_ids(shape, length, rng) for _ in range(num_prompts)]
            streams = [(i,) for i in range(num_prompts)]
            times: list[float] = []

            def note(prompt: int, answer: int, token: int, times: list[float] = times) -> None:
                if prompt == answer == 0:
                    times.append(time.perf_counter())

            call = functools.partial(generator.generate, prompts, streams, count // num_prompts, note)
            call()
            times.clear()
            phases.start_peak()
            whole_s = seconds_of(call)
            if len(times) != n:
                raise RuntimeError(f"the first answer has {len(times)} tokens, not {n}")
            steps = common.differences(times)[min(UNSTEADY, n // 4) :]
            # on average: the step after i tokens reads length + i
            keys = length + (n - len(steps) + n - 1) / 2
            emit(
                {
                    "answers": count,
                    "keys": keys,
                    "tokens_per_s": count / median(steps),
                    "step_s": median(steps),
                    "step_bytes": gpu.decode_bytes(shape, count, keys),
                    "call_tokens_per_s": count * n / whole_s,
                    "peak_gb": phases.peak_bytes() / 1e9,
                }
            )


def ppo(case: Record, scratch: Path, emit: Emit) -> None:
    """Steps of train_ppo.py: policy, critic, reference and reward model of one shape, random ones.

    Nothing is saved at the end. A stop token has a chance of one in the vocabulary.
    """
    import tyro

    import train_ppo
    from align.tracking.run import Run
    from align.training.session import Session

    shape, work = SHAPES[case["shape"]], gpu.work_of(case["shape"])
    output = scratch / gpu.name_of(case)
    policy, scorer = write_model(shape, scratch, labels=0), write_model(shape, scratch, labels=1)
    arguments = ppo_flags(case, work, policy, scorer)
    arguments += ["--train-data", str(write_prompts(work, scratch)), "--output", str(output)]
    flags = tyro.cli(train_ppo.Config, args=arguments, config=(tyro.conf.OmitArgPrefixes,))
    Session._save = Session._complete = huggingface.save = lambda *_: None
    Run.close = functools.partialmethod(Run.close, plots=False)
    with parallel.start(flags.parallel):
        train_ppo.main(flags)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    emit(ppo_record(rows[1:]))  # kernels are compiled in the first


def ppo_record(rows: list[dict[str, float]]) -> Record:
    """Mean seconds of a step, and the phases' shares of all steps, from rows of metrics.jsonl."""
    names = {name for row in rows for name in row if name.startswith("time/") and name != "time/step"}
    total = sum(row["time/step"] for row in rows)
    seconds = {name: sum(row["time/step"] * row.get(name, 0.0) for row in rows) for name in sorted(names)}
    return {
        "step_s": total / len(rows),
        "shares": {name.removeprefix("time/"): value / total for name, value in seconds.items()},
        "answers": rows[0]["train_rollouts/rollout_size"],
        "response_tokens": rows[0]["train_rollouts/response_lengths"],
        "peak_gb": max(gb for row in rows for name, gb in row.items() if name.startswith("memory/")),
    }


def ppo_flags(case: Record, work: Work, policy: Path, scorer: Path) -> list[str]:
    """Flags of train_ppo.py, but for data and output."""
    flags = {
        "model": policy,
        "reward-model": scorer,
        "precision": "bf16",
        "prompts-per-step": work.ppo_answers,
        "global-batch-size": work.ppo_answers,
        "rollout-slots": work.ppo_answers,
        "micro-batch-tokens": max(
            work.micro_batch_tokens, work.ppo_new_tokens + 2 * work.ppo_prompt_tokens[1]
        ),
        "max-prompt-len": 2 * work.ppo_prompt_tokens[1] + 64,  # the chat template adds to it
        "max-new-tokens": work.ppo_new_tokens,
        "truncated": "keep",
        "kl-coef": KL_COEF,
        "offload": case["offload"],
        "max-steps": work.ppo_steps,
        "save-interval": 0,
    }
    return [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]


def write_prompts(work: Work, scratch: Path) -> Path:
    """A file of prompts for all steps; the built-in tokenizer makes a token of each letter."""
    rng, path = np.random.default_rng(3), scratch / "prompts.jsonl"
    letters = list("abcdefghij ")
    rows = []
    for _ in range(work.ppo_answers * work.ppo_steps):
        length = rng.integers(work.ppo_prompt_tokens[0], work.ppo_prompt_tokens[1] + 1)
        rows.append({"prompt": [{"role": "user", "content": "".join(rng.choice(letters, length))}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(shape: Shape, scratch: Path, labels: int) -> Path:
    """A Hugging Face directory of random bf16 weights, once: a reward model with `labels`, else a policy.

    The tokenizer is the built-in one, whose ids are the first 264 of the vocabulary.
    """
    from safetensors.torch import save_file

    folder = scratch / f"{'reward' if labels else 'policy'}-{shape.layers}x{shape.hidden}"
    if (folder / "config.json").exists():
        return folder
    shutil.copytree(ROOT / "assets" / "tiny", folder)
    torch.manual_seed(labels)
    tensors = {}
    for name, size in huggingface_names.tensor_shapes(architecture_of(shape, labels)).items():
        tensor = torch.empty(size, dtype=torch.bfloat16, device=parallel.device())
        tensors[name] = (tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(std=INIT_STD)).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(shape, labels), indent=1))
    return folder


def hf_config(shape: Shape, labels: int) -> dict:
    """The config.json of a shape."""
    head = {"architectures": ["LlamaForCausalLM"]}
    if labels:
        head = {"architectures": ["LlamaForSequenceClassification"], "num_labels": labels}
    return head | {
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape.tied,
        "initializer_range": INIT_STD,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 256,
    }


def trl(case: Record, scratch: Path, emit: Emit) -> None:
    """TRL's trainers on the rows of `sft` and `dpo`: fp32 weights under bf16 autocast, torch's attention.

    Nothing is recomputed. Padded, TRL computes `trl_micro_batch` rows (pairs) at a time; packed, as many rows
    of the longest length.
    """
    if importlib.util.find_spec("trl") is None:
        emit({"skipped": "trl is not installed (bench/requirements.txt)"})
        return
    jobs = {
        "sft padded": functools.partial(trl_sft, packing=False),
        "sft packed": functools.partial(trl_sft, packing=True),
        "dpo": trl_dpo,
    }
    for name, train in jobs.items():
        phases.start_peak()
        task = name.split()[0]
        emit({"name": f"{name} {case['shape']}", "task": task} | train(case["shape"], scratch))
        gc.collect()
        parallel.free_memory()


def trl_sft(shape: str, scratch: Path, packing: bool) -> Record:
    """Train the rows of `sft` by SFTTrainer, packed in rows of the longest length by best fit decreasing."""
    import datasets
    import trl

    work = gpu.work_of(shape)
    packs = work.rows * sum(work.row_tokens) / 2 / work.row_tokens[1] if packing else work.rows
    accumulated = round(packs / work.trl_micro_batch) or 1
    steps = steps_of_rows(SHAPES[shape], work)
    rows = [{"input_ids": row.ids.tolist(), "labels": row.ids.tolist()} for part in steps for row in part]
    settings = trl_settings(work, work.row_tokens[1], accumulated, scratch)
    trainer = trl.SFTTrainer(
        model=trl_model(SHAPES[shape]),
        args=trl.SFTConfig(packing=packing, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=trl_tokenizer(),
    )
    flops = sum(
        gpu.train_flops(forward_flops_of(SHAPES[shape], SHAPES[shape].layers, [[row]]), reference=False)
        for part in steps
        for row in part
    )
    return trl_record(shape, trainer, flops / sum(len(row["input_ids"]) for row in rows))


def trl_dpo(shape: str, scratch: Path) -> Record:
    """DPOTrainer with the reference in every step, given ready ids, as in bench/dpo.py."""
    import copy

    import datasets
    import trl

    class Prepared(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # noqa: ANN001, ANN202
            return dataset

    work = gpu.work_of(shape)
    pairs = [pair for part in steps_of_pairs(SHAPES[shape], work) for pair in part]
    rows = []
    for chosen, rejected in pairs:
        start = int(chosen.trained.argmax())
        sides = {"chosen_ids": chosen.ids[start:].tolist(), "rejected_ids": rejected.ids[start:].tolist()}
        rows.append({"prompt_ids": chosen.ids[:start].tolist()} | sides)
    longest = work.prompt_tokens[1] + work.answer_tokens[1]
    settings = trl_settings(work, longest, work.pairs // work.trl_micro_batch, scratch)
    model = trl_model(SHAPES[shape])
    trainer = Prepared(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(beta=BETA, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=trl_tokenizer(),
    )
    forward = forward_flops_of(SHAPES[shape], SHAPES[shape].layers, [list(pair) for pair in pairs])
    tokens = sum(len(example.ids) for pair in pairs for example in pair)
    return trl_record(shape, trainer, gpu.train_flops(forward, reference=True) / tokens)


def trl_settings(work: Work, max_length: int, accumulated: int, scratch: Path) -> dict:
    """Settings of a TRL trainer on this device."""
    run = common.RunConfig(dtype="bf16")
    here = {"use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}
    settings = common.trl_arguments(run, work.trl_micro_batch, max_length, str(scratch / "trl"))
    return settings | here | {"gradient_accumulation_steps": accumulated}


def trl_model(shape: Shape) -> torch.nn.Module:
    """A random Llama of transformers in fp32, which TRL trains under bf16 autocast."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with parallel.device():
        return LlamaForCausalLM(LlamaConfig(**hf_config(shape, labels=0)))


def trl_tokenizer() -> object:
    """The built-in tokenizer, which pads; no text goes through it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny")


def trl_record(shape: str, trainer: object, flops_per_token: float) -> Record:
    """Train, and return the median step's speed. Steps may hold different rows: what is packed is less."""
    work = gpu.work_of(shape)
    log = common.record_steps(trainer)
    trainer.train()
    seconds = common.differences([entry["wall"] for entry in log])
    tokens = [round(count) for count in common.logged_tokens(log)]
    flops = [round(count * flops_per_token) for count in tokens]
    warmup = min(work.warmup, len(seconds) - 1)
    return train_record(SHAPES[shape].layers, seconds, tokens, flops, warmup)


SECTIONS = {"limits": limits, "sft": sft, "dpo": dpo, "decode": decode, "trl": trl, "ppo": ppo}


def main(case: Record, scratch: Path) -> None:
    """Import the libraries of a case, read a line as the signal to begin, and measure."""
    if case["section"] == "trl" and importlib.util.find_spec("trl") is not None:
        import trl as _  # noqa: F401, the time of this import is not the case's
    if not sys.stdin.readline():
        return  # the parent process has ended

    def emit(record: Record) -> None:
        with (scratch / f"{gpu.name_of(case)}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    SECTIONS[case["section"]](case, scratch, emit)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
