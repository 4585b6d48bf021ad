"""Run by tests/tools/test_check.py on every rank: first steps of scripts, some with a bug, checked."""

import functools
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from align.distributed import parallel
from align.tracking.run import Run
from tests.support.seeded_bugs import Bug, seeded
from tools import check, check_algorithms
from tools.check_stages import Step

COMMON = "--global-batch-size 4 --micro-batch-tokens 128 --precision fp32 --deterministic --warmup-steps 3"
ROLLOUT = f"{COMMON} --prompts-per-step 4 --samples-per-prompt 2 --max-prompt-len 48 --max-new-tokens 8 "
ROLLOUT += "--truncated keep --temperature 0.8"
PAIRS, FUNCTION = (
    "--train-data FOLDER/pairs.jsonl --max-seq-len 64",
    "tests.support.rewards:reward --audit-ratio inf",
)
FLAGS = {  # script and flags by name; FOLDER has the files
    "sft": f"train_sft {COMMON} --train-data FOLDER/chats.jsonl --max-seq-len 60",
    "dpo": f"train_dpo {COMMON} {PAIRS} --beta 0.3 --audit-start inf",
    "cdpo": f"train_dpo {COMMON} {PAIRS} --loss cdpo --label-smoothing 0.2",
    "rm": f"train_rm {COMMON} {PAIRS}",
    "ppo": f"train_ppo {ROLLOUT} --train-data FOLDER/prompts.jsonl --reward-fn {FUNCTION} --kl-coef 0.1 "
    "--gae-lambda 0.9 --critic FOLDER/critic",
    "grpo": f"train_grpo {ROLLOUT} --train-data FOLDER/prompts.jsonl --reward-fn {FUNCTION}",
    "constant": f"train_grpo {ROLLOUT} --train-data FOLDER/prompts.jsonl --reward-fn {FUNCTION} "
    "--objective cispo --clip 1 --clip-high 3 --aggregate constant --advantage-scale none --truncated keep "
    "--overlong-buffer 6",
    "sequence": f"train_grpo {ROLLOUT} --train-data FOLDER/prompts.jsonl --reward-fn {FUNCTION} "
    "--objective sapo --ratio sequence --aggregate response --advantage-scale batch --kl-in loss",
    "reinforce": f"train_grpo {ROLLOUT} --train-data FOLDER/prompts.jsonl --reward-fn {FUNCTION} "
    "--advantages reinforce --kl-coef 0.1 --entropy-coef 0.01",
    "rs": f"train_rs {ROLLOUT.replace(' --temperature 0.8', '')} --train-data FOLDER/prompts.jsonl "
    "--reward-fn tests.support.rewards:reward",
    "self_reward": f"train_self_reward {COMMON} --micro-batch-tokens 256 --train-data FOLDER/chats.jsonl "
    "--max-seq-len 60 --max-new-tokens 8 --first-iteration-sft --judge-template FOLDER/judge.txt",
    "step 2": f"train_grpo {ROLLOUT} --train-data FOLDER/prompts.jsonl --reward-fn {FUNCTION} --kl-coef 0.5 "
    "--lr 3e-2 --max-epochs 2 --kl-in reward",
    "bf16": f"train_dpo {COMMON} {PAIRS} --precision bf16",
    "dp 2": f"train_ppo {ROLLOUT} --train-data FOLDER/prompts.jsonl --reward-fn {FUNCTION} "
    "--critic FOLDER/critic",
    "tp 2": f"train_dpo {COMMON} {PAIRS} --tp 2",
    "tied": f"train_sft {COMMON} --train-data FOLDER/chats.jsonl --max-seq-len 60",
}
STEPS = {"step 2": 2}  # that are compared, by name; else 1


@dataclass(frozen=True)
class Case:
    """A run, its bug, and the stage in which it shows first."""

    flags: str
    stage: str
    cause: str  # words of the likely cause
    bug: Bug = field(default_factory=dict)


LOAD, CHOSEN = "engine.outputs(model, local, sequence_logprobs)", 'response_field(row, "chosen")'
REJECTED, JUDGE = (
    'response_field(row, "rejected")',
    "np.asarray(sum(judge(chosen, samples) for judge in judges))",
)
SCALED = "[x.data.{}_(1.01) for x in model.parameters()]"
CUT = "Example(example.ids[: fmt.max_seq_len], example.trained[: fmt.max_seq_len])"
TRAINED, MASK, POSITIONS = (
    "packing.num_trained(examples))",
    "supervised.sft_loss(logprobs, batch.mask)",
    "positions[total:] =",
)
UPDATE = f"engine.forward_backward(policy, batches, loss_fn, {TRAINED}"
RENDER = "chat_template.render(template, messages, **variables)"
LAYER = "policy.module.decoder.layers[1].mlp.linear_fc1.weight"

CASES = {
    # tokens
    "another chat template": Case(
        "sft",
        "tokens",
        "another chat template",
        {"align.data.base_tokenizer.Tokenizer.render": [(RENDER, f"{RENDER}.replace('user', 'human')")]},
    ),
    "no end-of-text token": Case(
        "dpo",
        "tokens",
        "end-of-text",
        {"align.data.preferences.encode_ended": [("return ids + [tokenizer.eos_id]", "return ids")]},
    ),
    "rows are cut too short": Case(
        "sft",
        "tokens",
        "cut to 52 tokens on the right",
        {"align.data.sft.cut_end": [(CUT, CUT.replace("max_seq_len", "max_seq_len - 8"))]},
    ),
    "chosen and rejected are swapped in the data": Case(
        "dpo",
        "tokens",
        "sides are swapped",
        {"align.data.preferences.format_pair": [(f"{CHOSEN}, {REJECTED}", f"{REJECTED}, {CHOSEN}")]},
    ),
    "rows in another order": Case(
        "sft",
        "rows",
        "another order of the rows",
        {"align.data.packing.epoch_order": [("permutation(num_rows)", "permutation(num_rows)[::-1]")]},
    ),
    # masks
    "the prompt is trained": Case(
        "sft",
        "mask",
        "the prompt is trained",
        {
            "align.data.formats.format_messages": [
                ("trained[start:end] = [True] * (end - start)", "trained[:end] = [True] * end")
            ]
        },
    ),
    "the score is read one token early": Case(
        "rm",
        "mask",
        "shifted by one token, early",
        {"align.data.preferences.as_scored": [("trained[-1] = True", "trained[-2] = True")]},
    ),
    "the mask of a micro-batch is shifted": Case(
        "sft",
        "log-probs",
        "shifted by one, early",
        {"align.data.packing.collate": [(POSITIONS, f"mask = np.roll(mask, -1); {POSITIONS}")]},
    ),
    # models
    "rope base": Case(
        "sft",
        "log-probs",
        "with base 500000",
        {"align.model.spec.scaled_frequencies": [('rope["rope_theta"] ** exponents', "5e5 ** exponents")]},
    ),
    "epsilon of the norms": Case(
        "rm",
        "scores",
        "norms with epsilon 0.001",
        {
            "align.model.gpt.transformer_config": [
                ("layernorm_epsilon=arch.norm_eps", "layernorm_epsilon=1e-3")
            ]
        },
    ),
    "tied embeddings are not tied": Case(
        "tied",
        "gradients",
        "tied in config.json",
        {"align.model.architecture.read_config": [("bool(hf.tie_word_embeddings) and", "False and")]},
    ),
    "the reference is another model": Case(
        "dpo",
        "reference",
        "another model than --model",
        {
            "align.training.reference.Precomputed.__init__": [
                (f"outputs = {LOAD}", f"{SCALED.format('mul')}; outputs = {LOAD}; {SCALED.format('div')}")
            ]
        },
    ),
    # losses
    "beta": Case(
        "dpo",
        "gradients",
        "0.333333 times the right ones: beta",
        {"train_dpo.main": [("beta = config.beta or", "beta = 0.1 or")]},
    ),
    "label smoothing is ignored": Case(
        "cdpo",
        "gradients",
        "label smoothing",
        {"train_dpo.main": [("{name: vars(config).get(name)", "{name: 0.0")]},
    ),
    "the loss is divided by sequences": Case(
        "sft",
        "loss",
        "number of sequences",
        {"train_sft.main": [(UPDATE, UPDATE.replace(TRAINED, "len(examples))"))]},
    ),
    "mean of the means of micro-batches": Case(
        "sft",
        "loss",
        "a mean of means?",
        {
            "train_sft.main": [
                (f"{MASK}, {{}}", f"{MASK} / batch.mask.sum(), {{}}"),
                (UPDATE, UPDATE.replace(TRAINED, "len(batches))")),
            ]
        },
    ),
    "the policy's loss is maximised": Case(
        "grpo",
        "gradients",
        "wrong sign",
        {
            "align.losses.rl.ppo": [
                ("-advantages * ratio, -advantages * clamped", "advantages * ratio, advantages * clamped")
            ]
        },
    ),
    # gradients, schedule
    "the gradient of a layer is doubled": Case(
        "sft",
        "gradients",
        "2 weights are 2 times",
        {
            "train_sft.main": [
                ('clock.lap("forward_backward")', f'clock.lap("forward_backward"); {LAYER}.main_grad.mul_(2)')
            ]
        },
    ),
    "the learning rate is a step late": Case(
        "dpo",
        "learning rate",
        "one step behind",
        {"align.training.optim.learning_rate": [("config.lr * (step + 1)", "config.lr * step")]},
    ),
    # rollouts
    "rewards of another row": Case(
        "ppo", "rewards", "the response 2 before", {"train_ppo.main": [(JUDGE, f"np.roll({JUDGE}, 1, 0)")]}
    ),
    "values of the token before": Case(
        "ppo",
        "values",
        "the token before",
        {"train_ppo.main": [("packed.outputs(critic)[:, 0])", "packed.outputs(critic)[:, 0].roll(1))")]},
    ),
    "the score is not at the last token": Case(
        "ppo",
        "token rewards",
        "not at the last token",
        {"align.losses.rl.token_rewards": [("cumsum(0) - 1", "cumsum(0) - 2")]},
    ),
    "GAE lambda": Case(
        "ppo",
        "advantages",
        "GAE lambda 1 in place of 0.9",
        {"train_ppo.main": [("config.gamma, config.gae_lambda)", "config.gamma, 1.0)")]},
    ),
    "advantages are not whitened": Case(
        "ppo",
        "advantages",
        "not whitened",
        {"train_ppo.main": [("if config.whiten_advantages:", "if False:")]},
    ),
    "standard deviation of the population": Case(
        "grpo",
        "advantages",
        "by G, not by G - 1",
        {
            "align.losses.rl.grpo": [
                (
                    "variance = deviations.square().sum(1, keepdim=True) / (number - 1)",
                    "variance = deviations.square().sum(1, keepdim=True) / number",
                )
            ]
        },
    ),
    "sign of the KL penalty": Case(
        "step 2",
        "token rewards",
        "KL penalty with the wrong sign",
        {"align.losses.rl.token_rewards": [("-kl_coef * kl", "kl_coef * kl")]},
    ),
    "the worst responses are selected": Case(
        "rs", "selection", "not the best", {"train_rs.select": [("-rewards[k]", "rewards[k]")]}
    ),
}


def run(flags: str, bug: Bug, folder: Path, output: Path, number: int) -> list[dict]:
    """The stages of a step of a run, on rank 0; its script runs with the bug, the check without."""
    script, *words = flags.replace("FOLDER", str(folder)).split()
    module = __import__(script)
    torch.use_deterministic_algorithms(True)

    def run(steps: int) -> None:
        own, config = check.flags_of_run(module, words, steps, output)
        mpu.destroy_model_parallel()
        parallel.make_grid(config.parallel)
        module.main(check.parse(module.Config, [*own, *["--resume-with-changes"] * (steps == number > 1)]))

    with seeded(bug):
        check.run_until(number, run, output)
    if dist.get_rank():
        return []
    _, config = check.flags_of_run(module, words, number, output)
    return [asdict(stage) for stage in check_algorithms.run(Step(script, config, output, number))]


def main(folder: Path, written: Path, *names: str) -> None:
    """All runs of this number of processes."""
    processes = dist.get_world_size()
    runs = {f"{name} alone": Case(name, "", "") for name in FLAGS} | CASES
    results = {}
    for number, (name, case) in enumerate(runs.items()):
        if (2 if case.flags in ("dp 2", "tp 2") else 1) == processes and (not names or name in names):
            model = folder / ("tied" if case.flags == "tied" else "model")
            words = f"{FLAGS[case.flags]} --model {model}"
            results[name] = run(words, case.bug, folder, written / str(number), STEPS.get(case.flags, 1))
            if dist.get_rank() == 0:
                (written / f"on{processes}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    Run.close = functools.partialmethod(Run.close, plots=False)  # curves take long
    folder, written, *names = sys.argv[1:]
    with parallel.start(parallel.ParallelConfig()):
        main(Path(folder), Path(written), *names)
