"""An exhibit of the museum: a silent bug, planted in our code, and what catches it."""

from dataclasses import dataclass, field

from tests.support.seeded_bugs import Bug

# 16 responses a step, of which a few end by themselves, in one update of several micro-batches.
PPO_FAMILY = (
    "--prompts-per-step 8 --samples-per-prompt 2 --truncated keep --global-batch-size 16 --temperature 0.8 "
    "--micro-batch-tokens 128 --max-prompt-len 48 --reward-fn tests.support.rewards:reward --max-new-tokens"
)
GRPO = f"train_grpo {PPO_FAMILY}"
# A letter ends a response, so that groups have responses that count and truncated ones.
LETTERS = " ".join("abcdefghijklmnopqrstuvwxyz")
GROUPS = f"--prompts-per-step 4 --samples-per-prompt 4 --stop {LETTERS}"
SFT = "train_sft --max-seq-len 96 --global-batch-size 16 --micro-batch-tokens"
DPO = "train_dpo --max-seq-len 96 --global-batch-size 8 --micro-batch-tokens"
RM = "train_rm --max-seq-len 96 --global-batch-size 8 --micro-batch-tokens"
RUNS = {  # script and flags
    "usual": f"{GRPO} 12",
    "small micro-batches": f"{GRPO} 12 --micro-batch-tokens 64",
    "one token": f"{GRPO} 1",  # so that all responses have one length
    "few slots": f"{GRPO} 12 --rollout-slots 5",
    "reshard": f"{GRPO} 12 --rollout-layout reshard",
    "two updates": f"{GRPO} 12 --global-batch-size 8",
    "many tokens": f"{GRPO} 48 --samples-per-prompt 8 --global-batch-size 64 --micro-batch-tokens 1024",
    "masked rloo": f"{GRPO} 8 {GROUPS} --truncated mask --advantages rloo",
    "reinforce": f"{GRPO} 12 --advantages reinforce --kl-coef 0.1",
    "ppo": f"train_ppo {PPO_FAMILY} 12 --kl-coef 0.1 --critic-lr 1e-3",
    "sft": f"{SFT} 1024",
    "sft, small micro-batches": f"{SFT} 160",
    "dpo": f"{DPO} 1024",
    "dpo, small micro-batches": f"{DPO} 192",
    "dpo, apo_zero": f"{DPO} 1024 --loss apo_zero",
    "rm": f"{RM} 1024",
    "rm, small micro-batches": f"{RM} 192",
    "tp 2": f"{GRPO} 12 --tp 2",
    "sequence parallel": f"{GRPO} 12 --tp 2 --sequence-parallel",
    "cp 2": f"{GRPO} 12 --cp 2",
    "dp 2": f"{GRPO} 12",
}
PROCESSES = {name: 2 if name.endswith((" 2", "parallel")) else 1 for name in RUNS}


@dataclass(frozen=True)
class Exhibit:
    """A silent bug, and its guards: at least one of a run's own audit, a test, and another layout.

    origin: public bugs of its kind, "repository number"; "": one of our own.
    run: the run that has it, by name in RUNS.
    caught: what stops that run, by name in MESSAGES of test_museum.py, or "" if nothing does.
    in_bf16: the same in bf16; None: as in fp32.
    after: steps that end before it shows.
    test: "tests.module:function" of a test that fails with it; `arguments` of that test beside its fixtures.
    beside: a run of another layout or packing, whose first step has another loss or gradient with the bug.
    """

    bug: Bug
    run: str = "usual"
    caught: str = ""
    in_bf16: str | None = None
    after: int = 0
    test: str = ""
    arguments: dict[str, object] = field(default_factory=dict)
    beside: str = ""
    origin: str = ""

    def caught_in(self, precision: str) -> str:
        """Name of the audit that stops the run in a precision, "" for none."""
        return self.caught if precision == "fp32" or self.in_bf16 is None else self.in_bf16
