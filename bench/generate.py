"""Sampling, ours against transformers' `generate`: new tokens per second after the same prompts.

    python bench/generate.py --data prompts.jsonl --model models/smollm2-135m-instruct --dtype fp32

Rows are those of align/data/prompts.py; the first 64 are used, and both sides get the same token ids. Answers
are drawn at temperature 1 from the whole vocabulary; no end-of-turn token ends one. Weights are in `--dtype`
on both sides.

    equal    the first 1, 8 and 32 prompts at once, 64 new tokens each; transformers pads on the left
    mixed    64 prompts, 16 at a time, stopped at numbers of their own, drawn evenly from 4 to 128:
             transformers runs batches of 16 in order, each until its longest answer is done (a
             StoppingCriteria ends the others); ours gives a slot that is free to the next prompt

A step of `--steps` is one call, by default 1; one more is run first and dropped. Speeds count new tokens, up
to each answer's own end, over the whole call, in which prompts are read and our weights are packed. A decode
step is (a call of 64 tokens - a call of 1) / 63. Its floor is the products of a step's rows with all weights
and nothing else (median of 5 passes before the calls and 5 after, same process): by torch's F.linear, and by
align.kernels.matmul.linear, which is ours, on weights as they are and packed.

Processes and clocks: see common.py. At the end both run in fp32: greedy tokens are compared, and the
log-probs of tokens that ours drew must be those of a forward pass of transformers within TOLERANCE.
"""

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import tyro

COUNTS = (1, 8, 32)  # prompts of equal length
NEW = 64  # new tokens of each
SLOTS = 16  # answers at a time where lengths are mixed
STOPS = [random.Random(seed).randint(4, 128) for seed in range(64)]  # new tokens of each
CHECKED = [32] * 8  # new tokens of the prompts that are compared
TOLERANCE = 1e-4  # of a log-prob, in nats
KERNELS = ("F.linear", "plain", "packed")

Ids = list[list[int]]
Generate = Callable[..., list]  # (prompts, new tokens of each, answers at a time, greedy=False): answers
Seconds = dict[tuple[str, int], float]  # by what was timed and the number of prompts


@dataclass(frozen=True)
class Config:
    """Flags of this benchmark."""

    data: Path
    """jsonl file of 64 prompts or more."""
    run: common.RunConfig = field(default_factory=lambda: common.RunConfig(steps=1))


def main(config: Config) -> None:
    """Measure both sides in processes of their own, print the speeds, check that the tokens are right."""
    run = config.run
    common.prepare(run)
    prompts = common.in_child(partial(read_prompts, config))
    jobs = {"ours": partial(time_ours, run, prompts), "transformers": partial(time_peer, run, prompts)}
    runs = common.measure(jobs, run.rounds)
    print(f"\n{run.model}, {run.dtype}, {run.threads} thread(s), {run.rounds} x {run.steps} call(s)\n")
    print_speeds(*({key: statistics.mean(r[key] for r in side) for key in side[0]} for side in runs.values()))
    common.in_child(partial(compare, run, prompts[: len(CHECKED)]))


def read_prompts(config: Config) -> Ids:
    """Return the token ids of the prompts. Runs in a child."""
    from align.data import prompts
    from align.data.tokenizer import load_tokenizer

    fmt = prompts.PromptFormat(max_prompt_len=1024)
    loaded, _ = prompts.load_prompts([config.data], load_tokenizer(config.run.model), fmt)
    if len(loaded) < len(STOPS):
        raise ValueError(f"--data {config.data} has {len(loaded)} prompts: {len(STOPS)} are needed")
    return [prompt.ids.tolist() for prompt in loaded[: len(STOPS)]]


def time_ours(run: common.RunConfig, prompts: Ids) -> Seconds:
    """Measure align.generation.generator, and the products of its steps. Runs in a child."""
    with our_generate(run) as (generate, weights):
        return time_calls(run, prompts, generate, partial(product_seconds, run, weights))


def time_peer(run: common.RunConfig, prompts: Ids) -> Seconds:
    """Measure transformers. Runs in a child."""
    return time_calls(run, prompts, peer(run)[1], lambda rows: {})


@contextmanager
def our_generate(run: common.RunConfig) -> Iterator[tuple[Generate, list]]:
    """Our Generator as a Generate of Samples, and the weights [n, k] that every token is multiplied with.

    The package has no option for fixed lengths: a subclass of its batch looks them up by the prompt, and
    ignores stop tokens.
    """
    import numpy as np
    import torch

    from align.data.tokenizer import load_tokenizer
    from align.distributed import parallel
    from align.generation import continuous_batching, generator, sampling
    from align.model import huggingface_names
    from align.model.config import ModelConfig

    def call(prompts, limits, at_once, greedy=False):
        class FixedLengths(batch):
            def finish_of(self, slots):
                ended = self.count[slots] == np.array(limits)[self.prompt[slots]]
                return np.where(ended, continuous_batching.LENGTH, continuous_batching.RUNNING)

        generator.ContinuousBatch = FixedLengths
        sampling_config = sampling.SamplingConfig(max_new_tokens=max(limits), greedy=greedy)
        slots = generator.RolloutConfig(rollout_slots=at_once)
        sampler = generator.Generator(policy, slots, sampling_config, settings, layout, tokenizer)
        samples = sampler.generate([np.array(ids) for ids in prompts], [(i,) for i in range(len(prompts))])
        assert [len(sample.ids) for [sample] in samples] == limits
        return [sample for [sample] in samples]

    batch = continuous_batching.ContinuousBatch
    torch.set_num_threads(run.threads)
    tokenizer = load_tokenizer(run.model)
    layout, settings = parallel.ParallelConfig(), ModelConfig(model=str(run.model), precision=run.dtype)
    with parallel.start(layout):
        policy = common.our_model(run.model, run.dtype)
        weights = {
            name: p.detach() for _, p, name in huggingface_names.named_parameters(policy) if p.dim() == 2
        }
        if "lm_head.weight" in weights:  # else the embedding is the head, too
            del weights["model.embed_tokens.weight"]
        yield call, list(weights.values())


def peer(run: common.RunConfig) -> tuple[Any, Generate]:
    """A transformers model, and its `generate` as a Generate of lists of ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def batch(prompts, limits, greedy):
        x = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        start = x.input_ids.shape[1]
        ends = torch.tensor([start + limit for limit in limits])
        stops = [lambda ids, scores, **_: ids.shape[1] >= ends]
        flags = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        ids = model.generate(**x, **flags, max_new_tokens=max(limits), stopping_criteria=stops)
        assert ids.shape[1] == max(ends)
        return [row[start:end].tolist() for row, end in zip(ids, ends, strict=True)]

    def call(prompts, limits, at_once, greedy=False):
        parts = [slice(i, i + at_once) for i in range(0, len(prompts), at_once)]
        return [ids for part in parts for ids in batch(prompts[part], limits[part], greedy)]

    torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(run.model, padding_side="left")
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.dtype]
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=precision).eval()
    model.generation_config.eos_token_id = None  # nothing else ends an answer
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, call


def time_calls(run: common.RunConfig, prompts: Ids, generate: Generate, floors: Callable) -> Seconds:
    """Return the medians of the calls' seconds, and of what `floors(rows)` returns before and after them."""

    def time_call(name, limits, at_once):
        call = partial(generate, prompts[: len(limits)], limits, at_once)
        seconds[name, len(limits)] = statistics.median(common.seconds(run, call, run.steps))

    seconds = {}
    for n in COUNTS:
        before = floors(n)
        time_call("whole", [NEW] * n, n)
        time_call("first", [1] * n, n)
        seconds |= {(name, n): statistics.median(before[name] + after) for name, after in floors(n).items()}
    time_call("mixed", STOPS, SLOTS)
    return seconds


def product_seconds(run: common.RunConfig, weights: list, rows: int) -> dict[str, list[float]]:
    """Return by kernel the seconds of 5 passes, each of `rows` rows times every weight [n, k]."""
    import torch
    import torch.nn.functional as F

    from align.kernels import matmul

    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype) for w in weights}

    def time_kernel(product, weights):
        def one_pass():
            for w in weights:
                product(inputs[w.shape[1]], w)

        return common.seconds(run, one_pass, 5)

    packed = [matmul.pack(w) for w in weights]
    times = [time_kernel(F.linear, weights)] + [time_kernel(matmul.linear, ws) for ws in (weights, packed)]
    return dict(zip(KERNELS, times, strict=True))


def print_speeds(ours: Seconds, peer: Seconds) -> None:
    """Print speeds, and by number of prompts the decode steps and their floors with the share of ours."""
    columns = ("ours tok/s", "their tok/s", "ratio", "our step ms", "their step", *KERNELS)
    print(f"{'prompts':<7}" + "".join(f"{name:>13}" for name in columns))
    for n in COUNTS:
        speeds = [n * NEW / side["whole", n] for side in (ours, peer)]
        steps = [(side["whole", n] - side["first", n]) / (NEW - 1) * 1e3 for side in (ours, peer)]
        print(f"{n:<7}{speeds[0]:>13.1f}{speeds[1]:>13.1f}{speeds[0] / speeds[1]:>12.2f}x", end="")
        floors = [ours[name, n] * 1e3 for name in KERNELS]
        shares = [f"{floor:.2f} ({floor / steps[0]:.0%})" for floor in floors]
        print(f"{steps[0]:>13.2f}{steps[1]:>13.2f}" + "".join(f"{share:>13}" for share in shares))
    n, total = len(STOPS), sum(STOPS)
    speeds = [total / side["mixed", n] for side in (ours, peer)]
    print(f"mixed  {speeds[0]:>13.1f}{speeds[1]:>13.1f}{speeds[0] / speeds[1]:>12.2f}x", end="")
    print(f"   {n} prompts, {SLOTS} at a time, {total} new tokens", flush=True)


def compare(run: common.RunConfig, prompts: Ids) -> None:
    """Compare greedy tokens and log-probs of drawn ones, in fp32, and print how they differ. Runs in a child.

    RuntimeError if a log-prob is off by TOLERANCE or more.
    """
    import torch

    from align.data.tokenizer import load_tokenizer

    run = replace(run, dtype="fp32")
    model, their_generate = peer(run)
    theirs = their_generate(prompts, CHECKED, len(prompts), greedy=True)
    known_ids = load_tokenizer(run.model).vocab_size  # ours draws from these alone: other rows are padding
    with our_generate(run) as (generate, _):
        greedy, drawn = (generate(prompts, CHECKED, len(prompts), greedy) for greedy in (True, False))
    equal, worst = 0, 0.0
    for prompt, ours, their, sample in zip(prompts, greedy, theirs, drawn, strict=True):
        equal += sum(a == b for a, b in zip(ours.ids, their, strict=True))
        ids = sample.ids.tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :known_ids]
        expected = logits.log_softmax(-1)[range(len(ids)), ids]
        worst = max(worst, (torch.from_numpy(sample.logprobs) - expected).abs().max().item())
    print(f"\nfp32, {sum(CHECKED)} tokens: {equal} greedy ones are equal, ", end="")
    print(f"log-probs of drawn ones differ by {worst:.1e} at most")
    if not worst < TOLERANCE:
        raise RuntimeError(f"log-probs of drawn tokens differ by {worst}, more than {TOLERANCE}")


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,)))
