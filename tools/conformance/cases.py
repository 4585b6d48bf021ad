"""The grid: models, algorithms and layouts, by number of processes."""

from dataclasses import dataclass, replace
from typing import Literal

from align.distributed.parallel import ParallelConfig
from tools.conformance.rows import PAIRED


@dataclass(frozen=True)
class Case:
    """An algorithm, and one way to split its steps."""

    algorithm: str = "sft"
    family: str = "llama"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vp: int = 1
    sequence_parallel: bool = False
    micro_batch_tokens: int = 64
    micro_batch_size: int | None = None
    reverse: bool = False  # the rows of a step in reverse order
    recompute: Literal["none", "selective", "full"] = "none"
    sharing: bool = True  # the examples of a row share the places of their common beginning
    lora: int = 0  # rank of adapters, with random A and B; 0: all weights are trained
    swap: bool = False  # dpo: the reference's weights are swapped in, not its log-probs computed before

    @property
    def layout(self) -> ParallelConfig:
        return ParallelConfig(
            tp=self.tp, pp=self.pp, vp=self.vp, cp=self.cp, sequence_parallel=self.sequence_parallel
        )

    @property
    def sizes(self) -> tuple[int, int, int, int, bool]:
        return self.tp, self.pp, self.vp, self.cp, self.sequence_parallel


def describe(case: Case, processes: int) -> str:
    """Layout and settings in words: "tp 2, dp 2, sequence parallel; reversed rows"."""
    sizes = {"tp": case.tp, "pp": case.pp, "vp": case.vp, "cp": case.cp}
    sizes["dp"] = processes // (case.tp * case.pp * case.cp)
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    words += ["sequence parallel"] if case.sequence_parallel else []
    if case.micro_batch_size is not None:
        words.append(f"{case.micro_batch_size} rows a micro-batch")
    elif case.micro_batch_tokens != Case.micro_batch_tokens:
        words.append(f"{case.micro_batch_tokens} tokens a micro-batch")
    words += ["reversed rows"] if case.reverse else []
    words += [f"recompute {case.recompute}"] if case.recompute != "none" else []
    words += [] if case.sharing else ["no shared prompts"]
    words += ["reference swapped in"] if case.swap else []
    words += [f"LoRA of rank {case.lora}"] if case.lora else []
    return ", ".join(words) or "one process"


CASES = {
    1: [
        Case("sft", micro_batch_tokens=400),
        Case("sft", micro_batch_tokens=50),
        Case("sft", micro_batch_size=1),
        Case("sft", micro_batch_size=2),
        Case("sft", reverse=True),
        Case("sft", recompute="selective"),
        Case("sft", recompute="full"),
        Case("sft", "qwen3", recompute="full", reverse=True),
        Case("sft", "mistral", micro_batch_size=3),
        Case("sft", "nemotron", micro_batch_size=2, reverse=True, recompute="full"),
        Case("dpo", sharing=False),
        Case("dpo", micro_batch_tokens=400, swap=True),
        Case("dpo", micro_batch_size=1, reverse=True, recompute="full"),
        Case("dpo", "mistral", sharing=False, swap=True),
        Case("ranking", sharing=False),
        Case("ranking", micro_batch_tokens=400),
        Case("ranking", micro_batch_size=1, reverse=True, recompute="selective"),
        Case("ranking", "mistral", sharing=False),
        Case("regression", micro_batch_size=1, reverse=True, recompute="full"),
        Case("ppo", micro_batch_size=1, reverse=True, recompute="full"),
        Case("grpo", micro_batch_tokens=400, reverse=True),
        Case("critic", micro_batch_size=2, recompute="selective"),
        Case("sft", micro_batch_size=1, reverse=True, lora=4),
        Case("sft", recompute="full", lora=4),
        Case("sft", recompute="selective", lora=4),
        Case("dpo", sharing=False, lora=4),
        Case("ranking", micro_batch_size=1, recompute="full", lora=4),
    ],
    2: [
        Case("sft", tp=2),
        Case("sft", tp=2, sequence_parallel=True),
        Case("sft", pp=2),
        Case("sft", pp=2, micro_batch_size=1, reverse=True),
        Case("sft", pp=2, vp=2, micro_batch_size=1),
        Case("sft", "llama_tied", pp=2, vp=2, recompute="full"),
        Case("dpo", pp=2, vp=2, swap=True),
        Case("ranking", pp=2, vp=2, reverse=True),
        Case("ppo", "llama_tied", pp=2, vp=2),
        Case("critic", pp=2, vp=2, micro_batch_size=2),
        Case("sft", cp=2),
        Case("sft"),
        Case("sft", micro_batch_tokens=50, recompute="full"),
        Case("sft", "llama_tied", pp=2),
        Case("sft", "llama_tied", tp=2, sequence_parallel=True, recompute="full"),
        Case("sft", "qwen3", tp=2, sequence_parallel=True, recompute="selective"),
        Case("sft", "qwen2", cp=2, micro_batch_size=2),
        Case("sft", "mistral", cp=2, micro_batch_tokens=400),
        Case("sft", "stablelm", tp=2, sequence_parallel=True),
        Case("sft", "stablelm", pp=2),
        Case("sft", "nemotron", tp=2, sequence_parallel=True, recompute="selective"),
        Case("sft", "nemotron", cp=2, micro_batch_tokens=400),
        Case("dpo"),
        Case("dpo", tp=2, swap=True),
        Case("dpo", pp=2, micro_batch_size=1),
        Case("dpo", "llama_tied", pp=2, swap=True, recompute="full"),
        Case("dpo", "mistral", cp=2, micro_batch_tokens=400),
        Case("dpo", cp=2, sharing=False),
        Case("ranking"),
        Case("ranking", tp=2),
        Case("ranking", "llama_tied", tp=2, sequence_parallel=True, recompute="full"),
        Case("ranking", "llama_tied", pp=2, micro_batch_size=2),
        Case("ranking", "mistral", cp=2),
        Case("ranking", cp=2, sharing=False),
        Case("regression"),
        Case("regression", tp=2, sequence_parallel=True),
        Case("regression", pp=2),
        Case("regression", cp=2, micro_batch_tokens=100),
        Case("ppo"),
        Case("ppo", tp=2),
        Case("ppo", "llama_tied", pp=2, recompute="full"),
        Case("ppo", cp=2, micro_batch_tokens=128),
        Case("grpo"),
        Case("grpo", "qwen3", tp=2, sequence_parallel=True),
        Case("grpo", pp=2, micro_batch_size=1),
        Case("grpo", cp=2, reverse=True),
        Case("critic"),
        Case("critic", tp=2, sequence_parallel=True),
        Case("critic", pp=2),
        Case("critic", cp=2, micro_batch_tokens=128),
        Case("sft", lora=4),
        Case("sft", tp=2, lora=4),
        Case("sft", tp=2, sequence_parallel=True, lora=4),
        Case("sft", pp=2, micro_batch_size=1, lora=4),
        Case("sft", pp=2, vp=2, recompute="full", lora=4),
        Case("sft", cp=2, lora=4),
        Case("sft", "llama_tied", pp=2, recompute="full", lora=4),
        Case("sft", "stablelm", tp=2, sequence_parallel=True, recompute="full", lora=4),
        Case("sft", "nemotron", tp=2, lora=4),
        Case("dpo", tp=2, lora=4),
        Case("dpo", tp=2, sequence_parallel=True, recompute="selective", lora=4),
        Case("dpo", "llama_tied", pp=2, lora=4),
        Case("dpo", "mistral", cp=2, micro_batch_tokens=400, lora=4),
        Case("ranking", "llama_tied", tp=2, sequence_parallel=True, recompute="full", lora=4),
        Case("ranking", pp=2, lora=4),
    ],
    4: [
        Case("sft", tp=2, pp=2),
        Case("sft", tp=2, pp=2, vp=2, sequence_parallel=True, recompute="selective"),
        Case("sft", "qwen3", pp=2, vp=2, micro_batch_tokens=50),
        Case("grpo", tp=2, pp=2, vp=2, sequence_parallel=True),
        Case("sft", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
        Case("sft", tp=2, sequence_parallel=True),
        Case("sft", pp=2, reverse=True),
        Case("sft", cp=2, micro_batch_tokens=100),
        Case("sft", tp=2, cp=2, sequence_parallel=True),
        Case("sft", cp=4),
        Case("sft"),
        Case("sft", tp=4),
        Case("sft", "llama_tied", tp=2, pp=2, recompute="full"),
        Case("sft", "qwen3", pp=2, cp=2),
        Case("sft", "stablelm", tp=4, sequence_parallel=True),
        Case("sft", "nemotron", tp=2, pp=2),
        Case("dpo", "mistral", cp=4, micro_batch_tokens=400),
        Case("dpo", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
        Case("dpo", tp=2, cp=2, sequence_parallel=True, swap=True),
        Case("dpo", pp=2, reverse=True),
        Case("dpo"),
        Case("ranking", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
        Case("ranking", cp=2, micro_batch_tokens=100),
        Case("ranking", tp=4, reverse=True),
        Case("regression", tp=2, cp=2, sequence_parallel=True),
        Case("regression", pp=2),
        Case("ppo", tp=2, pp=2, sequence_parallel=True),
        Case("ppo", "qwen2", cp=2, micro_batch_tokens=128),
        Case("grpo", tp=2, cp=2, sequence_parallel=True),
        Case("grpo", "mistral", pp=2, micro_batch_tokens=128),
        Case("critic", tp=2, pp=2),
        Case("critic", "llama_tied", tp=2, sequence_parallel=True),
        Case("sft", tp=4, lora=4),
        Case("sft", tp=2, pp=2, vp=2, sequence_parallel=True, lora=4),
        Case("sft", "qwen3", tp=2, sequence_parallel=True, lora=4),
        Case("sft", "stablelm", tp=4, sequence_parallel=True, lora=4),
        Case("dpo", tp=2, cp=2, sequence_parallel=True, lora=4),
        Case("dpo", pp=2, reverse=True, lora=4),
        Case("ranking", tp=2, pp=2, micro_batch_size=1, lora=4),
    ],
}


def quick(cases: list[Case]) -> list[Case]:
    """The first case of each algorithm and layout."""
    return list({(case.algorithm, case.sizes): case for case in reversed(cases)}.values())[::-1]


def of_model(cases: list[Case], family: str, are_pairs: bool, scale: int) -> list[Case]:
    """The cases that rows of the user's file can have, for one model.

    scale: its micro-batches by those of the random rows.
    """
    own = [case for case in cases if (case.algorithm in PAIRED) == are_pairs]
    tokens = [scale * case.micro_batch_tokens for case in own]
    chosen = [replace(c, family=family, micro_batch_tokens=n) for c, n in zip(own, tokens, strict=True)]
    return list(dict.fromkeys(chosen))
