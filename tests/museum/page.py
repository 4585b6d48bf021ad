"""docs/museum.md out of the exhibits: `python -m tests.museum.page` writes it, test_museum.py compares it."""

from tests.museum.exhibit import RUNS, Exhibit
from tests.museum.exhibits import OWN
from tests.museum.public import PUBLIC
from tests.support.files import ROOT

GUARDS = {  # of a run
    "sampler": "log-probs",
    "bias": "bias of log-probs",
    "surprise": "surprise",
    "ratio": "ratio",
    "update": "loss of the first update",
    "groups": "sums of advantages",
    "replicas": "replicas",
    "tokens": "lengths of responses",
    "ends": "ends of responses",
    "start": "start of DPO",
    "ledger": "ledger",
    "lengths": "sizes that do not fit",
    "two BOS": "two BOS",
    "": "-",
}
INTRODUCTION = """# Museum of silent bugs

A silent bug changes numbers and raises no error. `tests/museum/` plants {total} of them in this code, one at
a time: {own} of our own and {public} that other projects had, re-created in a few words.
`.venv/bin/python -m pytest tests/museum` runs them, each with the guard that must notice it, and once without
the bug, where none may. `.venv/bin/python -m tests.museum.page` writes this page.

## Catch rate

Columns "stopped": the run ends with an error, by its own audits, without a test or a second run. Column
"tests": the bug stops such a run in a test, fails the test that is named, or changes the first step beside
another layout.

| | bugs | stopped in fp32 | stopped in bf16 | tests |
|---|---|---|---|---|
{rates}

bf16 hides faults that are smaller than its rounding, so its bounds on single tokens are wide. Averages over
all tokens, sums that must be 0 and weights that must be equal keep their power.

| audit | comparison |
|---|---|
| log-probs | sampling with training log-probability of each token ([bounds](generation.md#audit)) |
| bias of log-probs | their signed mean over a rollout with 0: rounding has no direction |
| surprise | mean -log p of the sampled tokens with the mean entropy of their distributions (PPO, GRPO) |
| ratio | pi / pi_old at the first update of a rollout with 1 (PPO, GRPO) |
| loss of the first update | the engine's loss with the sum of its terms before packing (PPO, GRPO) |
| sums of advantages | sum over the responses to each prompt with 0 (GRPO, RLOO) |
| replicas | copies of a weight on several ranks, after the first update and before each checkpoint |
| lengths, ends of responses | tokens sampled with tokens trained; the last token with the stop tokens |
| ledger | ids and positions of tokens in training with those sampled ([ledger](proofs.md#token-ledger)) |
| start of DPO | policy with reference before the first update |
| two BOS, sizes that do not fit | no audit, but the run stops |
"""
HEAD = "| bug | fp32 | bf16 | tests |{origin}\n|---|---|---|---|{line}"


def guards(exhibit: Exhibit) -> str:
    """Tests that notice an exhibit, beside the run that it stops."""
    parts = []
    if exhibit.test == "samples":
        parts.append("rewards in `samples.jsonl`")
    elif exhibit.test:
        module, _, function = exhibit.test.partition(":")
        parts.append(f"`{module.replace('.', '/')}.py`: `{function}`")
    if exhibit.beside:
        parts.append(f"layouts: `{exhibit.run}` beside `{exhibit.beside}`")
    return ", ".join(parts) or "runs"


def row(name: str, exhibit: Exhibit, has_origin: bool) -> str:
    """A line of a table."""
    stopped = [GUARDS[exhibit.caught_in(precision)] for precision in ("fp32", "bf16")]
    cells = [name, *stopped, guards(exhibit), *([links(exhibit.origin)] if has_origin else [])]
    return f"| {' | '.join(cells)} |"


def links(origin: str) -> str:
    """Issues and pull requests as links; GitHub redirects one kind to the other."""
    parts = [part.split() for part in origin.split(", ")]
    return ", ".join(
        f"[{name} {number}](https://github.com/{name}/issues/{number})" for name, number in parts
    )


def rate(label: str, exhibits: dict[str, Exhibit]) -> str:
    """A line of the table of catch rates."""
    stopped = [sum(bool(x.caught_in(precision)) for x in exhibits.values()) for precision in ("fp32", "bf16")]
    tested = sum(bool(x.caught or x.test or x.beside) for x in exhibits.values())
    shares = [f"{count} ({100 * count / len(exhibits):.0f} %)" for count in (*stopped, tested)]
    return f"| {label} | {len(exhibits)} | {' | '.join(shares)} |"


def text() -> str:
    """The page."""
    counts = {"own": len(OWN), "public": len(PUBLIC), "total": len(OWN) + len(PUBLIC)}
    rates = [rate("of our own", OWN), rate("of other projects", PUBLIC), rate("all", OWN | PUBLIC)]
    parts = [INTRODUCTION.format(**counts, rates="\n".join(rates))]
    parts.append("\n## Bugs of other projects\n")
    parts.append(HEAD.format(origin=" reported as |", line="---|"))
    parts += [row(name, exhibit, True) for name, exhibit in PUBLIC.items()]
    parts.append("\n## Bugs of our own\n")
    parts.append("Some were reported elsewhere, too: `tests/museum/exhibits.py` has the numbers.\n")
    parts.append(HEAD.format(origin="", line=""))
    parts += [row(name, exhibit, False) for name, exhibit in OWN.items()]
    parts.append("\n## Runs\n\n| name | script and flags |\n|---|---|")
    parts += [f"| {name} | `{flags}` |" for name, flags in RUNS.items()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "museum.md").write_text(text(), encoding="utf-8")
