"""Sampling: draws against exact distributions, the warpers of transformers, numbers worked by hand."""

import math

import pytest
import torch
from transformers.generation import logits_process

from align.errors import UserError
from align.generation import sampling
from align.generation.sampling import (
    SamplingConfig,
    _top_p_floor,
    _top_p_floor_by_bisection,
    check_draws,
    pick,
)
from tests.support.sampling import CHI_SQUARE_999, CONFIGS, exact

BELOW_ONE = math.nextafter(1.0, 0.0)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> SamplingConfig:
    return CONFIGS[request.param]


def random_row(vocabulary: int, seed: int, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [V] float32 and seen [V] bool, a third of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=generator) * scale
    return logits, torch.rand(vocabulary, generator=generator) < 1 / 3


def draw(
    logits: torch.Tensor, uniforms: list[float] | torch.Tensor, config: SamplingConfig, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row [V], drawn from once for each random number."""
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64)
    return pick(logits.repeat(len(uniforms), 1), uniforms, config, seen.repeat(len(uniforms), 1))


def by_hand(probabilities: list[float], uniforms: list[float], **options: float) -> list[list[float]]:
    """Ids and exp of both log-probs, for one row of probabilities without seen tokens."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().float()
    seen = torch.zeros(len(logits), dtype=torch.bool)
    ids, logprobs, model = draw(logits, uniforms, SamplingConfig(**options), seen)
    return [ids.tolist(), logprobs.double().exp().tolist(), model.double().exp().tolist()]


# ---- by hand -------------------------------------------------------------------------------------


def test_draws_by_hand():
    """Bounds at 1/2, 3/4 and 7/8; a random number on a bound belongs to the token above it."""
    uniforms = [0.0, 0.4999, 0.5001, 0.7499, 0.7501, 0.8749, 0.8751, BELOW_ONE]
    ids, probabilities, model = by_hand([0.5, 0.25, 0.125, 0.125], uniforms)
    assert ids == [0, 0, 1, 1, 2, 2, 3, 3]
    assert probabilities == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125], rel=1e-6)
    assert model == probabilities


def test_a_random_number_on_a_bound_belongs_to_the_token_above():
    """And one that is 1e-12 below it, which float32 cannot tell from it, to the token below."""
    none = torch.zeros(4, dtype=torch.bool)
    ids, _, _ = draw(torch.zeros(4), [0.25, 0.5, 0.75, 0.25 - 1e-12, 0.75 - 1e-12], SamplingConfig(), none)
    assert ids.tolist() == [1, 2, 3, 0, 2]


def test_a_filter_renormalises_and_leaves_the_model_alone():
    """The two likeliest of 0.1, 0.4, 0.2, 0.3 are left: 4/7 and 3/7."""
    ids, probabilities, model = by_hand([0.1, 0.4, 0.2, 0.3], [0.0, 0.57, 0.572, BELOW_ONE], top_k=2)
    assert ids == [1, 1, 3, 3]
    assert probabilities == pytest.approx([4 / 7, 4 / 7, 3 / 7, 3 / 7], rel=1e-6)
    assert model == pytest.approx([0.4, 0.4, 0.3, 0.3], rel=1e-6)


def test_temperature_one_half_squares_the_probabilities():
    ids, probabilities, model = by_hand([0.1, 0.4, 0.2, 0.3], [0.0, 0.5, 0.6, 0.99], temperature=0.5)
    assert ids == [0, 1, 2, 3]  # bounds at 1/30, 17/30, 21/30
    assert probabilities == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30], rel=1e-6)
    assert model == pytest.approx([0.1, 0.4, 0.2, 0.3], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "support"),
    [
        (dict(top_p=0.39), [0]),  # at least one
        (dict(top_p=1e-9), [0]),
        (dict(top_p=0.41), [0, 1]),
        (dict(top_p=0.69), [0, 1]),
        (dict(top_p=0.71), [0, 1, 2]),
        (dict(top_p=0.99), [0, 1, 2, 3]),
        (dict(top_k=2, top_p=0.55), [0]),  # 0.4 is 0.57 of what top-k leaves
        (dict(top_k=2, top_p=0.58), [0, 1]),
        (dict(min_p=0.51), [0, 1]),
        (dict(min_p=0.49), [0, 1, 2]),
        (dict(top_p=0.65, min_p=0.7), [0, 1]),  # min-p first would leave 0.4 and 0.3, and top-p both
        (dict(top_p=0.55, min_p=0.6), [0, 1]),  # min-p first: 0.4 of 0.7 is enough, [0]
        (dict(temperature=0.5, top_p=0.55), [0, 1]),  # 16/30, 9/30, ...
        (dict(temperature=0.5, top_p=0.53), [0]),
        (dict(temperature=0.5, min_p=0.3), [0, 1]),  # 1, 9/16, 1/4, 1/16 of the largest
        (dict(top_k=100), [0, 1, 2, 3]),
    ],
)
def test_support_by_hand(options, support):
    uniforms = [(i + 0.5) / 400 for i in range(400)]
    ids, _, _ = by_hand([0.4, 0.3, 0.2, 0.1], uniforms, **options)
    assert sorted(set(ids)) == support


@pytest.mark.parametrize("options", [dict(top_k=2), dict(top_p=0.5), dict(top_p=0.6), dict(min_p=0.5)])
def test_all_tokens_that_tie_with_the_last_kept_one_are_kept(options):
    """1, 2, 1, 4, 2, 2 of 12: top-k 2, top-p 1/2 and min-p 1/2 reach into the twos, and keep all three."""
    ids, probabilities, _ = by_hand(
        [1 / 12, 2 / 12, 1 / 12, 4 / 12, 2 / 12, 2 / 12], [0.1, 0.3, 0.7, 0.9], **options
    )
    assert ids == [1, 3, 4, 5]
    assert probabilities == pytest.approx([0.2, 0.4, 0.2, 0.2], rel=1e-6)


def test_the_repetition_penalty_by_hand():
    """Penalty 2 on all but the last: 2 -> 1, -1 -> -2, 0 stays, -inf stays; 1 was not seen."""
    logits, seen = torch.tensor([2.0, -1.0, 0.0, -math.inf, 1.0]), torch.tensor([True] * 4 + [False])
    config = SamplingConfig(repetition_penalty=2.0)
    ids, logprobs, model = draw(logits, [0.2, 0.44, 0.5, 0.9], config, seen)
    mass, before = 2 * math.e + math.exp(-2) + 1, 2 * math.exp(1) + math.exp(-1) + 1 + math.e**2 - math.e
    assert ids.tolist() == [0, 2, 2, 4]  # bounds at 0.414, 0.434, 0.587
    assert logprobs.tolist() == pytest.approx([x - math.log(mass) for x in (1, 0, 0, 1)], abs=1e-6)
    assert model.tolist() == pytest.approx([x - math.log(before) for x in (2, 0, 0, 1)], abs=1e-6)


def test_a_repetition_penalty_without_the_seen_tokens_is_refused():
    with pytest.raises(UserError, match=r"--repetition-penalty 1.5 needs the tokens seen so far"):
        pick(torch.zeros(1, 3), torch.zeros(1), SamplingConfig(repetition_penalty=1.5))


def test_the_models_log_prob_is_finite_where_its_probability_is_zero_in_float32():
    seen = torch.zeros(2, dtype=torch.bool)
    ids, logprobs, model = draw(torch.tensor([0.0, -150.0]), [0.99], SamplingConfig(temperature=1e3), seen)
    assert (ids.item(), model.item()) == (1, -150.0)
    assert logprobs.item() == pytest.approx(-0.15 - math.log(1 + math.exp(-0.15)), abs=1e-6)


# ---- distributions -------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [3, 11, 20])
def test_twenty_thousand_draws_follow_the_exact_distribution(vocabulary, config):
    logits, seen = random_row(vocabulary, seed=vocabulary, scale=1.0)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    counts = draw(logits, uniforms, config, seen)[0].bincount(minlength=vocabulary).tolist()
    pairs = zip(counts, exact(logits, seen, config), strict=True)
    cells = [(count, 20_000 * probability) for count, probability in pairs if count or probability]
    assert min(expected for _, expected in cells) > 5
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    assert len(cells) == 1 or statistic < CHI_SQUARE_999[len(cells) - 2]


@pytest.mark.parametrize("vocabulary", [2, 64, 65, 131, 1000])
def test_evenly_spaced_numbers_recover_the_distribution(vocabulary, config):
    logits, seen = random_row(vocabulary, seed=vocabulary)
    count = 2000
    ids = draw(logits, (torch.arange(count, dtype=torch.float64) + 0.5) / count, config, seen)[0]
    assert (ids.diff() >= 0).all()  # in the order of the ids
    expected = torch.tensor(exact(logits, seen, config), dtype=torch.float64)
    assert ((ids.bincount(minlength=vocabulary) / count - expected).abs() <= 1 / count).all()


def transformers_scores(logits: torch.Tensor, seen: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Scores [V] float64 after transformers' own processors, in the order of its `generate`."""
    processors = [
        logits_process.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        logits_process.TemperatureLogitsWarper(config.temperature),
        logits_process.TopKLogitsWarper(config.top_k) if config.top_k else None,
        logits_process.TopPLogitsWarper(config.top_p),
        logits_process.MinPLogitsWarper(config.min_p),
    ]
    scores = logits.double()[None]
    for processor in filter(None, processors):
        scores = processor(seen.nonzero().T, scores)
    return scores[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocabulary", [131, 640])
def test_support_and_log_probs_are_those_of_transformers(vocabulary, seed, config):
    """The middle of each token's interval gives that token, with its log-prob; so no token more has mass.
    At scale 1 no log-prob is below -16, where float32 is too coarse for 1e-6."""
    logits, seen = random_row(vocabulary, seed, scale=1.0)
    expected = transformers_scores(logits, seen, config).log_softmax(-1)
    support = expected.isfinite().nonzero()[:, 0]
    middles = expected.exp().cumsum(-1) - expected.exp() / 2
    ids, logprobs, model = draw(logits, middles[support], config, seen)
    assert torch.equal(ids, support)
    torch.testing.assert_close(logprobs.double(), expected[support], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.double(), logits.double().log_softmax(-1)[support], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1.5, 2.0, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_top_p_of_flat_and_of_peaked_rows(scale, top_p):
    """From 2 to 4,900 of 5,000 tokens: 64, 1,024 or all are sorted. Each one kept has more than 1e-6."""
    logits, seen = random_row(5000, seed=3, scale=scale)
    config = SamplingConfig(top_p=top_p)
    expected = transformers_scores(logits, seen, config).log_softmax(-1)
    ids, logprobs, _ = draw(logits, [(i + 0.5) / 50 for i in range(50)], config, seen)
    assert expected[expected.isfinite()].min() > math.log(1e-6)
    torch.testing.assert_close(logprobs.double(), expected[ids], rtol=0, atol=1e-6)


def test_the_draw_inverts_the_cumulative_distribution_of_a_real_vocabulary():
    """49,153 tokens: outside of 1e-7 around the bounds, the token of the exact float64 sums."""
    logits, seen = random_row(49_153, seed=5, scale=3.0)
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, _, _ = draw(logits, uniforms, SamplingConfig(), seen)
    bounds = logits.double().softmax(-1).cumsum(-1)
    assert (uniforms < bounds[ids] + 1e-7).all()
    assert (uniforms >= bounds[ids - 1] - 1e-7).all()
    assert len(ids.unique()) > 30


def test_noise_of_a_millionth_hardly_changes_a_draw():
    logits, seen = random_row(1000, seed=0, scale=3.0)
    generator = torch.Generator().manual_seed(2)
    uniforms = torch.rand(20_000, generator=generator, dtype=torch.float64)
    noisy = logits + torch.empty(1000).uniform_(-1e-6, 1e-6, generator=generator)
    assert not torch.equal(noisy, logits)
    ids, noisy_ids = (draw(row, uniforms, SamplingConfig(), seen)[0] for row in (logits, noisy))
    assert (ids != noisy_ids).sum() <= 2


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.999])
def test_top_p_by_bisection_finds_the_same_floor(scale, top_p):
    """The GPU's top-p floor: flat rows (all tie), steep ones, rows thinned out by top-k, to the last bit."""
    logits = torch.stack([random_row(1984, seed, scale)[0] for seed in range(20)])
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights[10:] *= weights[10:] >= weights[10:].topk(9).values[:, -1:]
    assert torch.equal(_top_p_floor_by_bisection(weights, top_p), _top_p_floor(weights, top_p))


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 131, 1000])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_only_a_token_that_can_be_drawn_is_drawn(vocabulary, place, config):
    """All others at -inf, or so low that exp is 0 in float32."""
    token = {"first": 0, "middle": vocabulary // 2, "last": vocabulary - 1}[place]
    seen = torch.ones(vocabulary, dtype=torch.bool)
    for low in (-math.inf, -1e4):
        logits = torch.full((vocabulary,), low)
        logits[token] = 3.0
        ids, logprobs, model = draw(logits, [0.0, 0.3, BELOW_ONE], config, seen)
        assert ids.tolist() == [token] * 3
        assert logprobs.tolist() == model.tolist() == [0.0] * 3


@pytest.mark.parametrize("vocabulary", [70, 131, 1000])
def test_the_ends_of_the_interval_give_the_first_and_the_last_token_with_mass(vocabulary, config):
    """Tokens at -inf at both ends and between; a sum that rounds up must not lead into them."""
    for seed in range(20):
        logits, seen = random_row(vocabulary, seed)
        logits[torch.rand(vocabulary, generator=torch.Generator().manual_seed(seed)) < 0.5] = -math.inf
        logits[[0, -1]] = -math.inf
        support = transformers_scores(logits, seen, config).isfinite().nonzero()[:, 0]
        ids, logprobs, _ = draw(logits, [0.0, BELOW_ONE], config, seen)
        assert ids.tolist() == [support[0], support[-1]]
        assert logprobs.isfinite().all()


def test_a_random_number_on_a_bound_never_leads_to_a_token_without_mass():
    """One token in each of three stretches of 64, some as unlikely as 1e-12; random numbers up to 4 ulp off
    the bounds: the sum before a likely token is rounded there, and may come out above the random number."""
    places, none = [3, 64 + 5, 128 + 5], torch.zeros(192, dtype=torch.bool)
    ulps = torch.arange(-4, 5, dtype=torch.float64) * 2**-54
    for seed in range(100):
        logits = torch.full((192,), -math.inf)
        logits[places] = random_row(3, seed, scale=12.0)[0]
        running = (logits - logits.max()).exp().double().cumsum(-1)[places]
        uniforms = (running[:2, None] / running[2] + ulps).flatten().clamp(0, BELOW_ONE)
        ids, _, _ = draw(logits, uniforms, SamplingConfig(), none)
        assert set(ids.tolist()) <= set(places)


@pytest.mark.parametrize("vocabulary", [131, 1000, 4096])
def test_a_row_does_not_depend_on_the_others(vocabulary, config):
    """Rows that are flat and rows that are peaked, so that top-p sorts more of some than of others."""
    rows = [random_row(vocabulary, seed, scale=scale) for seed, scale in enumerate((0.1, 3, 1, 0.5, 9, 2, 1))]
    logits, seen = (torch.stack(tensors) for tensors in zip(*rows, strict=True))
    uniforms = torch.rand(len(rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = pick(logits, uniforms, config, seen)
    for i in range(len(rows)):
        one = slice(i, i + 1)
        alone = pick(logits[one], uniforms[one], config, seen[one])
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


def test_without_a_filter_both_log_probs_are_the_same_to_the_last_bit():
    logits, seen = random_row(1000, seed=4)
    _, logprobs, model = draw(logits, torch.linspace(0, 0.999, 500), SamplingConfig(), seen)
    assert torch.equal(logprobs, model)


def test_shapes_types_and_that_the_logits_stay_as_they_are(config):
    """Also of logits that are a part of a larger tensor, as after the vocabulary's padding is cut off."""
    padded = torch.stack([random_row(160, seed)[0] for seed in range(3)])
    before, seen = padded.clone(), torch.ones(3, 131, dtype=torch.bool)
    uniforms = torch.tensor([0.1, 0.5, 0.9])
    got = pick(padded[:, :131], uniforms, config, seen)
    assert [(part.shape, part.dtype) for part in got] == [
        ((3,), torch.int64),
        ((3,), torch.float32),
        ((3,), torch.float32),
    ]
    assert torch.equal(padded, before)
    whole = pick(padded[:, :131].contiguous(), uniforms, config, seen)
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.5, top_k=2), dict(greedy=True)])
@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
def test_broken_logits_are_refused(row, options):
    logits = torch.tensor([[1.0, 2.0, 3.0], row, [1.0, 2.0, 3.0]])
    ids, _, model = pick(logits, torch.zeros(3), SamplingConfig(**options))
    assert 0 <= ids.min() and ids.max() < 3, "an id that is beyond the vocabulary would break what reads it"
    check_draws(model[::2].numpy())
    with pytest.raises(FloatingPointError, match=r"logits of rows \[1\] hold NaN or \+inf, or -inf only"):
        check_draws(model.numpy())


@pytest.mark.parametrize("config", CONFIGS)
def test_draws_are_the_same_by_products(config, monkeypatch):
    """The filter of --deterministic on GPUs."""
    logits, seen = (torch.stack(x) for x in zip(*(random_row(1984, seed) for seed in range(30)), strict=True))
    uniforms = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = pick(logits, uniforms, CONFIGS[config], seen)
    monkeypatch.setattr(sampling, "_running_sums", sampling._sums_by_product)
    for a, b in zip(pick(logits, uniforms, CONFIGS[config], seen), expected, strict=True):
        assert torch.equal(a, b)


def test_broken_logits_leave_the_other_rows_as_they_are():
    logits = torch.stack([random_row(131, seed)[0] for seed in range(3)])
    broken = logits.clone()
    broken[1, 7] = math.nan
    for options in (dict(top_k=5, top_p=0.9), dict(greedy=True)):
        expected, draws = (
            pick(x, torch.full((3,), 0.4), SamplingConfig(**options)) for x in (logits, broken)
        )
        for a, b in zip(expected, draws, strict=True):
            assert torch.equal(a[::2], b[::2])


# ---- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 131, 1000])
def test_greedy_takes_the_likeliest_token(vocabulary):
    logits = torch.stack([random_row(vocabulary, seed)[0] for seed in range(50)])
    ids, logprobs, model = pick(logits, torch.full((50,), 0.9), SamplingConfig(greedy=True))
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert logprobs.tolist() == [0.0] * 50
    torch.testing.assert_close(model.double(), logits.double().log_softmax(-1).amax(-1), rtol=0, atol=1e-6)


def test_greedy_ties_take_the_lowest_id():
    logits = torch.zeros(4, 1000)
    logits[1, [700, 70, 999]] = 1.0
    logits[2, [998, 999]] = 1.0
    logits[3, :5] = -math.inf
    ids, _, model = pick(logits, torch.zeros(4), SamplingConfig(greedy=True))
    assert ids.tolist() == [0, 70, 998, 5]
    masses = [1000, 3 + 997 / math.e, 2 + 998 / math.e, 995]
    assert model.tolist() == pytest.approx([-math.log(mass) for mass in masses], abs=1e-6)


def test_greedy_heeds_the_repetition_penalty():
    logits, seen = torch.tensor([[2.0, 1.5]]), torch.tensor([[True, False]])
    config = SamplingConfig(greedy=True, repetition_penalty=2.0)
    ids, logprobs, model = pick(logits, torch.zeros(1), config, seen)
    assert (ids.item(), logprobs.item()) == (1, 0.0)
    assert model.item() == pytest.approx(-math.log(1 + math.exp(0.5)), abs=1e-6)


# ---- flags ---------------------------------------------------------------------------------------


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match='--stop "": a stop string of zero length would end every response'):
        SamplingConfig(stop=("\n", ""))


def test_the_bounds_of_the_flags_are_accepted():
    SamplingConfig(max_new_tokens=1, temperature=1e-3, top_k=1, top_p=1.0, min_p=0.999, stop=("###",))
    SamplingConfig(greedy=True, repetition_penalty=1.2, stop=("\n\n",))
