"""The stages of a recorded step beside the reference: numbers, bounds, and the first difference of each.

Each stage starts from the run's own inputs, so that one fault shows in one stage: log-probs are those of the
recorded tokens, advantages those of the recorded rewards. A bound is FACTOR times the largest difference
between the reference in the run's precision and in float64, measured on the same rows.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from tools import check_causes, check_rows, reference
from tools.check_rows import Renderer, Row, Tokens

FACTOR = 10  # of the measured rounding: kernels of another order of sums
EPS = 2.0**-23  # the least rounding, that of float32, in which log-probs and gradients are summed
EXACT = 1e-9  # relative, of what is computed in float64 from recorded numbers
Terms = Callable[
    [Any], Iterator[tuple[list[Tensor], Tensor | None]]
]  # of a model: outputs, and a part of the loss


@dataclass
class Stage:
    """One row of the table."""

    name: str
    count: int = 0  # numbers compared
    error: float = 0.0
    bound: float = 0.0
    first: str = ""  # the first difference
    cause: str = ""
    note: str = ""  # why it was not compared


@dataclass
class Outcome:
    """Outputs of a model by sequence, the loss of the first update, and its gradient."""

    outputs: list[Tensor] = field(default_factory=list)
    loss: float = 0.0
    size: float = 0.0  # sum of the sizes of the loss's terms, which may cancel
    gradients: dict[str, np.ndarray] = field(default_factory=dict)


class Step:
    """A recorded step of a run, and its flags."""

    def __init__(self, script: str, config: Any, output: Path, number: int = 1):
        """`script`: without .py; `output`: of the run; `number`: from 1. Later steps need OUTPUT/before."""
        directory = output / "records" / f"step_{number:06d}"
        self.number = number
        self.policy = config.model.path if number == 1 else output / "before"  # its weights before the step
        self.script, self.config, self.output = script, config, output
        self.facts = json.loads((directory / "record.json").read_text(encoding="utf-8"))
        self.arrays = load_file(directory / "arrays.safetensors")
        self.directory, self.metrics = directory, self.facts["metrics"]
        self.renderer = Renderer(config.model.path, config)
        ends = np.cumsum(self.arrays.get("lengths", np.zeros(0, int)))[:-1]
        parts = [np.split(self.arrays.get(name, np.zeros(0, int)), ends) for name in ("ids", "trained")]
        self.sequences = [
            Tokens(ids.tolist(), kept.tolist()) for ids, kept in zip(*parts, strict=True) if len(ids)
        ]
        self.rows: list[Row] = []  # of the data
        self.numbers: list[int] = self.arrays["rows"].tolist()
        self.stages: list[Stage] = []

    @property
    def vocab_size(self) -> int | None:
        """Number of ids that are sampled; None, all of the model, for a script that does not sample."""
        if self.script in ("train_sft", "train_dpo", "train_rm"):
            return None
        return max(self.renderer.tokenizer.get_vocab().values()) + 1

    @property
    def per_row(self) -> int:
        """Sequences of a row."""
        return len(self.sequences) // len(self.numbers)

    def label(self, number: int) -> str:
        """File, line and side of a sequence."""
        row, k = divmod(number, self.per_row)
        kept = self.rows[self.numbers[row]].place if self.numbers[row] < len(self.rows) else "?"
        sides = (
            {1: [""], 2: [" chosen", " rejected"]}.get(self.per_row) if "ended" not in self.arrays else None
        )
        return f"{kept} (row {self.numbers[row]}){sides[k] if sides else f' response {k}'}"

    def token(self, number: int, place: int) -> str:
        """File, line, index and text of a token."""
        ids = self.sequences[number].ids
        text = self.renderer.tokenizer.decode(ids[place : place + 1])
        return f"{self.label(number)}, token {place} {text!r}"

    def places(self) -> list[tuple[int, int]]:
        """(sequence, index) of each trained token."""
        return [(n, t) for n, x in enumerate(self.sequences) for t, kept in enumerate(x.trained) if kept]

    def array(self, name: str) -> list[np.ndarray]:
        """An array of trained tokens by sequence."""
        counts = [sum(x.trained) for x in self.sequences]
        return np.split(self.arrays[name], np.cumsum(counts)[:-1])

    def skip(self, name: str, note: str) -> None:
        """A stage that is not compared."""
        self.stages.append(Stage(name, note=note))

    def compare(
        self,
        name: str,
        actual: Sequence[float] | np.ndarray,
        expected: Sequence[float] | np.ndarray,
        measured: Sequence[float] | np.ndarray | None,
        place: Callable[[int], str],
        cause: Callable[[int], str],
        size: float = 0.0,
    ) -> bool:
        """Compare numbers, and add the stage.

        `measured`: the reference's in the run's precision; `size`: of terms of a number, if it is larger.
        """
        a, e = (np.asarray(x, np.float64).reshape(-1) for x in (actual, expected))
        stage = Stage(name, len(e))
        self.stages.append(stage)
        if len(a) != len(e):
            stage.first = f"{len(a)} numbers, expected {len(e)}"
            stage.cause = cause(0)
            return False
        largest = float(np.abs(e).max(initial=0.0))
        stage.bound = EXACT * max(largest, 1.0)
        if measured is not None:
            rounding = float(np.abs(np.asarray(measured, np.float64).reshape(-1) - e).max(initial=0.0))
            stage.bound = FACTOR * max(rounding, EPS * max(largest, size))
        errors = np.abs(a - e)
        stage.error = float(errors.max(initial=0.0))
        if not stage.error <= stage.bound:  # true for NaN
            first = int((~(errors <= stage.bound)).argmax())
            stage.first = f"{place(first)}: {a[first]:.9g}, expected {e[first]:.9g}"
            stage.cause = cause(first)
        return not stage.first


# ---- rows, tokens, masks -------------------------------------------------------------------------


def data_files(step: Step) -> list[Path]:
    """Files of --train-data, those of the toy task without it."""
    if step.config.train_data:
        return list(step.config.train_data)
    pairs = "_comparisons" if step.script in ("train_dpo", "train_rm") else ""
    return [step.output / "data" / f"train{pairs}.jsonl"]


def read_rows(step: Step) -> list[Row]:
    """The rows of the data as the reference renders them."""
    renderer, files, config = step.renderer, data_files(step), step.config
    if step.script == "train_sft":
        return list(check_rows.sft_rows(renderer, files))
    if step.script == "train_dpo" or (step.script == "train_rm" and config.loss == "ranking"):
        return list(check_rows.pair_rows(renderer, files, gaps=step.script == "train_dpo"))
    if step.script == "train_rm":
        return list(check_rows.labelled_rows(renderer, files))
    return list(check_rows.prompt_rows(renderer, files))


def expected_sequences(step: Step) -> list[Tokens]:
    """Each sequence of the step; of a rollout its prompt, with the sampled response behind."""
    expected = [x for number in step.numbers for x in step.rows[number].sequences or ()]
    if step.script == "train_rm":
        return [Tokens([*x.ids, 0], [False] * len(x.ids) + [True]) for x in expected]
    if "ended" not in step.arrays:
        return expected
    prompts = [expected[i // step.per_row].ids for i in range(len(step.sequences))]
    sampled = [x.ids[x.trained.index(True) :] for x in step.sequences]
    return [check_rows.sequence(*pair) for pair in zip(prompts, sampled, strict=True)]


def check_data(step: Step) -> None:
    """Stages of the rows of the step, their token ids, their trained masks."""
    if step.script == "train_self_reward":
        return step.skip("tokens", "sampled and judged by the run")
    step.rows = read_rows(step)
    size = step.config.rows_per_step
    epoch, batch = divmod(step.number - 1, len(step.rows) // size)
    order = np.random.default_rng([step.config.parallel.seed, epoch]).permutation(len(step.rows))
    expected_rows = order[batch * size : (batch + 1) * size].tolist()
    unknown = [row.place for row in step.rows if row.sequences is None]
    if unknown:
        # whether the run kept these rows is not known either
        return step.skip("tokens", f"{len(unknown)} of {len(step.rows)} rows, the first {unknown[0]}")
    place = lambda i: f"row {i} of the step"  # noqa: E731
    if not step.compare("rows", step.numbers, expected_rows, None, place, lambda i: check_causes.ROWS):
        return
    expected = expected_sequences(step)
    pairs = list(zip(step.sequences, expected, strict=True))
    compare_lists(step, "tokens", [(a.ids, e.ids) for a, e in pairs], expected, check_causes.tokens)
    masks = [(a.trained, e.trained) if len(a.ids) == len(e.ids) else ([], []) for a, e in pairs]
    compare_lists(step, "mask", masks, expected, check_causes.mask)


def compare_lists(
    step: Step,
    name: str,
    pairs: Sequence[tuple[list, list]],
    expected: list[Tokens],
    cause: Callable[..., str],
) -> None:
    """A stage of actual and expected lists of the sequences; its error is the number that differ."""
    stage = Stage(name, sum(len(wanted) for _, wanted in pairs))
    step.stages.append(stage)
    wrong = [number for number, (own, wanted) in enumerate(pairs) if own != wanted]
    stage.error = len(wrong)
    if wrong:
        number, (own, wanted) = wrong[0], pairs[wrong[0]]
        differing = (t for t, (x, y) in enumerate(zip(own, wanted, strict=False)) if x != y)
        t = next(differing, min(len(own), len(wanted)))
        shown = [str(x[t]) if t < len(x) else "the end" for x in (own, wanted)]
        stage.first = f"{step.token(number, t)}: {shown[0]}, expected {shown[1]}"
        others = {step.label(n): x for n, x in enumerate(expected) if n != number}
        stage.cause = cause(step.sequences[number], expected[number], others, step.renderer)


# ---- models --------------------------------------------------------------------------------------


def run_model(model: Any, terms: Terms) -> Outcome:
    """Outputs, loss and gradient of a model; `terms` yields them by sequence or pair."""
    outcome = Outcome()
    for outputs, term in terms(model):
        outcome.outputs += [x.detach().double().cpu() for x in outputs]
        if term is not None:
            outcome.loss += float(term)
            outcome.size += abs(float(term))
            term.backward()
    outcome.gradients = {name: x.double().cpu().numpy() for name, x in reference.gradients(model).items()}
    return outcome


def outcomes(
    step: Step, directory: Path, labels: int, terms: Terms, std: float | None = None
) -> list[Outcome]:
    """Outcomes in float64 and in the run's precision."""
    dtype, seed = step.config.model.dtype, step.config.parallel.seed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    computed = []
    for precision in (torch.float64, dtype):
        model = reference.load(directory, labels, precision, dtype, seed, std).to(device)
        computed.append(run_model(model, terms))
        del model
    return computed


def at_trained(step: Step, outputs: list[Tensor]) -> np.ndarray:
    """Of outputs [n - 1] of each sequence those of the trained targets, end to end."""
    pairs = zip(outputs, step.sequences, strict=True)
    return np.concatenate([x.numpy()[np.array(tokens.trained[1:], bool)] for x, tokens in pairs])


def check_logprobs(
    step: Step, name: str, array: str, computed: list[Outcome], temperature: float = 1.0
) -> None:
    """A stage of log-probs at the trained tokens."""
    exact, rounded = (at_trained(step, outcome.outputs) for outcome in computed)
    places = step.places()

    def cause(i: int) -> str:
        number = places[i][0] if i < len(places) else 0
        return check_causes.logprobs(
            step, step.array(array)[number], number, computed[0].outputs[number], temperature
        )

    step.compare(name, step.arrays[array], exact, rounded, lambda i: step.token(*places[i]), cause)


def check_update(step: Step, model: str, computed: list[Outcome], loss_causes: dict[str, float]) -> None:
    """Stages of loss and gradient of the first update of a model."""
    label = "" if model == "policy" else f"{model} "
    loss = step.facts["first_updates"][model]["loss"]
    step.compare(
        f"{label}loss",
        [loss],
        [computed[0].loss],
        [computed[1].loss],
        lambda i: f"{label}loss of the first update",
        lambda i: check_causes.loss(loss, computed[0].loss, loss_causes),
        computed[0].size,
    )
    actual = load_file(step.directory / f"gradients_{model}.safetensors")
    stage = Stage(f"{label}gradients", sum(x.size for x in actual.values()))
    step.stages.append(stage)
    check_gradients(step, stage, actual, computed)


def check_gradients(step: Step, stage: Stage, actual: dict[str, np.ndarray], computed: list[Outcome]) -> None:
    """Compare gradients by name: errors and bounds relative to the largest number of each tensor."""
    expected, rounded = (outcome.gradients for outcome in computed)
    top = max(float(np.abs(x).max()) for x in expected.values())
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    wrong: list[str] = []
    for name in (name for name in expected if name in actual):
        a, e = actual[name].reshape(expected[name].shape), expected[name]
        scale = float(np.abs(e).max()) or top or 1.0
        bound = FACTOR * max(float(np.abs(rounded[name] - e).max()) / scale, EPS)
        error = float(np.abs(a - e).max()) / scale
        if error > stage.error:
            stage.error, stage.bound = error, bound
        if not error <= bound:
            wrong.append(name)
    if extra or missing:
        name = (extra or missing)[0]
        stage.first = f"{name}: {'no such weight in the model' if extra else 'no gradient'}"
        stage.cause = check_causes.names(extra, missing)
    elif wrong:
        own, wanted = actual[wrong[0]].reshape(-1), expected[wrong[0]].reshape(-1)
        place = int(np.abs(own - wanted).argmax())
        stage.first = f"{wrong[0]}, number {place}: {own[place]:.6g}, expected {wanted[place]:.6g}"
        stage.first += f" ({len(wrong)} of {len(expected)} weights differ)"
        stage.cause = check_causes.gradients(wrong, actual, expected)


def check_lr(step: Step, name: str, peak: float, least: float) -> None:
    """A stage of the learning rate."""
    if name not in step.metrics:
        return step.skip("learning rate", f"no {name}: nothing was trained")
    schedule = step.config.optim
    rates = [
        reference.learning_rate(
            peak, least, schedule.warmup_steps, schedule.constant_steps, at, step.facts["total_steps"]
        )
        for at in range(step.number - 2, step.number + 2)
    ]
    shares = [rate / (peak or 1.0) for rate in rates]  # EXACT is relative to it
    actual = step.metrics[name] / (peak or 1.0)
    critic = "critic " if "critic" in name else ""
    cause = lambda i: check_causes.learning_rate(actual, shares)  # noqa: E731
    place = lambda i: f"{name} as a share of the peak"  # noqa: E731
    step.compare(f"{critic}learning rate", [actual], shares[1:2], None, place, cause)
