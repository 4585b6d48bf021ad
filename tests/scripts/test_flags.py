"""Flags of all scripts: values out of range are refused, and flags without effect."""

import dataclasses
import importlib
import math
import re
import shlex
import shutil
import types
import typing
from collections.abc import Iterator

import pytest
import tyro

from align.data import preferences, prompts, row_counts, sft
from align.data.formats import FormatConfig, format_sft
from align.data.marker_chat import RowFormats
from align.data.preferences import PreferenceFormat
from align.data.prompts import PromptFormat
from align.data.tokenizer import TextConfig, load_tokenizer
from align.errors import UserError
from align.model.config import ModelConfig
from align.training.checkpoint import CheckpointConfig, check_monitor
from align.training.config import LoopConfig
from tests.support.files import write_rows

SCRIPTS = "train_sft train_rm train_dpo train_ppo train_grpo train_rs train_self_reward generate".split()
NONSENSE = (0, -1, math.nan, math.inf, -math.inf, 1e308, -1e308, 10**21, -(10**21))
ANY_SIZE = (0, math.inf, 1e308, 10**21)
SENSIBLE = {  # values of NONSENSE that a flag may have
    **dict.fromkeys("lr min_lr critic_lr critic_min_lr weight_decay adam_beta1 adam_beta2".split(), (0,)),
    **dict.fromkeys(
        "warmup_steps constant_steps critic_warmup_steps clip_grad seed stall_limit".split(), (0,)
    ),
    **dict.fromkeys("overlong_buffer save_interval save_top_k skip_bad_rows top_k min_p".split(), (0,)),
    **dict.fromkeys(
        "gamma gae_lambda clip clip_high entropy_coef kl_coef value_clip truncated_penalty".split(), (0,)
    ),
    **dict.fromkeys("sft_weight label_smoothing simpo_gamma dpop_lambda length_control".split(), (0,)),
    **dict.fromkeys("center_rewards_coef lora_rank".split(), (0,)),
    **dict.fromkeys("min_reward reward_mean judge_low judge_high attribute_weights".split(), (0, -1)),
    **dict.fromkeys("audit_mean audit_tail audit_start audit_ratio".split(), ANY_SIZE),
}


def script_config(script: str) -> typing.Any:
    config = importlib.import_module(script).Config
    return config(prompt="Hi") if script == "generate" else config()


def numeric_fields(config: typing.Any) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Paths of the numeric fields of a Config and of the Configs in it, and whether they are tuples."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            for path, is_tuple in numeric_fields(value):
                yield (field.name, *path), is_tuple
        kinds = set(typing.get_args(hint)) or {hint}
        if kinds & {int, float}:
            assert kinds <= {int, float, types.NoneType, Ellipsis}, f"{field.name}: {hint}"
            yield (field.name,), typing.get_origin(hint) is tuple


def with_value(config: typing.Any, path: tuple[str, ...], value: object) -> typing.Any:
    name, *rest = path
    value = with_value(getattr(config, name), tuple(rest), value) if rest else value
    return dataclasses.replace(config, **{name: value})


FIELDS = [
    pytest.param(script, path, is_tuple, id=f"{script}-{path[-1]}")
    for script in SCRIPTS
    for path, is_tuple in numeric_fields(script_config(script))
]


@pytest.mark.parametrize(("script", "path", "is_tuple"), FIELDS)
def test_numbers_out_of_range_are_refused(script, path, is_tuple):
    name = path[-1]
    flag = f"--{name.replace('_', '-')} "
    for value in NONSENSE:
        message = ""
        try:
            with_value(script_config(script), path, (value,) if is_tuple else value)
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        if value in SENSIBLE.get(name, ()):  # another flag may be missing, but the value is in range
            assert not (message.startswith(flag) and "must be" in message), message
        else:
            assert message.startswith(f"{flag}{value} must be "), f"{flag}{value}: {message or 'accepted'}"


def test_every_sensible_value_is_of_a_flag():
    assert set(SENSIBLE) <= {field.values[1][-1] for field in FIELDS}
    assert len(FIELDS) > 200


EDGES = {  # the last value of a range, and one beyond it
    "lr": (10, 10.1),
    "adam_beta2": (0.999999, 1),
    "seed": (2**32 - 1, 2**32),
    "max_steps": (10**9, 10**9 + 1),
    "samples_per_prompt": (10**5, 10**5 + 1),
    "max_seq_len": (2, 1),
    "audit_quantile": (1, 1.001),
    "top_p": (1, 1.001),
    "min_p": (0.999, 1),
    "trtllm_memory": (0.999, 1),
    "label_smoothing": (0.499, 0.5),
    "gamma": (1, 1.001),
    "gae_lambda": (1, 1.001),
    "length_control": (1, 1.001),
    "meta_judge_fraction": (0.999, 1),
    "meta_judge_class_cap": (1, 1.001),
    "reward_std": (1e-6, 1e-7),
    "beta": (1e-6, 1e-7),
    "temperature": (1e-3, 1e-4),
}


@pytest.mark.parametrize(
    ("script", "path", "is_tuple"), [field for field in FIELDS if field.values[1][-1] in EDGES]
)
def test_edges_of_ranges(script, path, is_tuple):
    inside, beyond = ((value,) if is_tuple else value for value in EDGES[path[-1]])
    for value, refused in ((inside, False), (beyond, True)):
        message = ""
        try:
            with_value(script_config(script), path, value)
        except UserError as error:
            message = str(error)
        assert (" must be a" in message) == refused, message


# ---- the command line ----------------------------------------------------------------------------


def refusal(command: str, capsys: pytest.CaptureFixture) -> str:
    """tyro's message for a command line that a Config refuses; empty if it is accepted."""
    script, *words = shlex.split(command)
    config = importlib.import_module(script).Config
    try:
        tyro.cli(config, args=words, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit:
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    return ""


@pytest.mark.parametrize(
    ("command", "rule"),
    [
        ("train_sft --min-lr -1", "a number from 0 to 10"),
        ("train_sft --clip-grad nan", "a number from 0 to 1e+06"),
        ("train_sft --seed 4294967296", "a whole number from 0 to 4294967295"),
        ("train_sft --save-top-k -1", "a whole number from 0 to 1000000000"),
        ("train_dpo --reward-scale 0", "a number from 1e-06 to 1e+06"),
        ("train_rm --attribute-weights 1 nan", "a number from -1e+06 to 1e+06"),
        ("train_ppo --entropy-coef -0.1", "a number from 0 to 1e+06"),
        ("train_rs --min-reward nan", "a number from -1e+06 to 1e+06"),
        ("train_self_reward --length-control 0 0 1.5", "a number from 0 to 1"),
        (
            "generate --prompt Hi --samples-per-prompt 1000000000000000000000",
            "a whole number from 1 to 100000",
        ),
        ("generate --prompt Hi --temperature 0", "a number from 0.001 to 1000"),
    ],
)
def test_the_command_line_names_flag_value_and_rule(command, rule, capsys):
    *_, flag = re.findall("--[a-z-]+", command)
    assert re.search(rf"{flag} \S+ must be {re.escape(rule)} ", refusal(command, capsys))


@pytest.mark.parametrize("time", ["90", "1:2:3", "00:60:00", "-1:00:00", "9999999:00:00", "nan"])
def test_a_time_is_read_before_anything_happens(time):
    with pytest.raises(UserError, match=f"--max-time '{time}' is not of the form HH:MM:SS"):
        LoopConfig(max_time=time)


GROUPS = "train_grpo --samples-per-prompt 4"
TRAIN = "--train-data a.jsonl"
PAIRS = "train_rm --loss regression --num-attributes 2 --train-data a.jsonl"
WITHOUT_EFFECT = [  # a command that is accepted, and the flag without effect on it
    # validation
    *(
        (f"{script} {TRAIN} {reward}", f"{flag} without --val-data")
        for flag in ("--val-interval 5", "--val-batches 7", "--monitor val/acc", "--save-top-k 3")
        for script, reward in (
            *((script, "") for script in ("train_sft", "train_rm", "train_dpo", "train_self_reward")),
            *((script, "--reward-fn a:b") for script in ("train_ppo", "train_grpo", "train_rs")),
        )
    ),
    # sampling
    *(
        (f"{script} --greedy", f"{flag} with --greedy")
        for script in ("generate --prompt Hi", "train_rs --samples-per-prompt 1")
        for flag in ("--temperature 0.7", "--top-k 5", "--top-p 0.9", "--min-p 0.1")
    ),
    ("generate --prompt Hi --raw", "--template-date 2020-01-01 with --raw"),
    ("generate --prompt Hi --raw", """--chat-template-kwargs '{"a": 1}' with --raw"""),
    ("generate --chat", "--add-bos False with --chat"),
    ("generate --prompt Hi", "--recompute full without training"),
    ("generate --prompt Hi", "--keep-logits without training"),
    ("train_rm", "--keep-logits with a reward model"),
    ("generate --prompt Hi", "--sequence-parallel without training"),
    ("generate --prompt Hi", "--rollout-tp 2 with --rollout-layout same"),
    ("train_ppo --rollout-layout same", "--rollout-tp 2 with --rollout-layout same"),
    ("train_ppo", "--trtllm-keep with --generate-with native"),
    ("train_ppo", "--trtllm-memory 0.5 with --generate-with native"),
    # rewards
    ("train_ppo", "--reward-mean 1 without --reward-model"),
    ("train_ppo --reward-fn a:b", "--reward-std 2 without --reward-model"),
    ("train_rs", "--reward-standardise auto without --reward-model"),
    ("train_rs --reward-model a --reward-standardise auto", "--reward-mean 1 with --reward-standardise auto"),
    # PPO, rejection sampling
    (GROUPS, "--gamma 0.9 with --advantages grpo"),
    (f"{GROUPS} --advantages rloo", "--no-whiten-advantages with --advantages rloo"),
    *(
        (f"{script} --kl-coef 0", f"{flag} with --kl-coef 0")
        for script in ("train_ppo", "train_grpo")
        for flag in ("--kl k3", "--kl-in loss", "--kl-target 0.1")
    ),
    ("train_ppo", "--kl-horizon 100 without --kl-target"),
    ("train_grpo", "--kl-horizon 100 without --kl-target"),
    ("train_ppo", "--truncated-penalty 2 with --truncated mask"),
    ("train_grpo", "--truncated-penalty 2 with --truncated mask"),
    ("train_rs --samples-per-prompt 1", "--duplicates keep with --samples-per-prompt 1"),
    # preferences
    *(
        ("train_dpo", f"{flag} with --loss dpo")
        for flag in ("--label-smoothing 0.1", "--simpo-gamma 1", "--dpop-lambda 5", "--reward-scale 2")
    ),
    ("train_dpo --loss simpo", "--audit-start 1 with --loss simpo, which has no reference"),
    ("train_dpo", "--sft-average-logprobs True without --sft-weight"),
    ("train_dpo --loss orpo --sft-weight 0", "--sft-average-logprobs True without --sft-weight"),
    ("train_self_reward", "--sft-average-logprobs True without --sft-weight"),
    ("train_self_reward --loss ipo", "--reward-scale 2 with --loss ipo"),
    ("train_self_reward --steps-per-iteration 5", "--max-epochs 2 with --steps-per-iteration"),
    *(
        ("train_self_reward", f"{flag} without --meta-judge")
        for flag in (
            *("--meta-judge-fraction 0.1", "--meta-judge-class-cap 0.5"),
            "--meta-judge-template mine.txt",
        )
    ),
    # adapters
    *(
        (script, f"{flag} without --lora-rank")
        for script in ("train_sft", "train_rm", "train_dpo", "train_ppo", "train_grpo", "train_rs")
        for flag in ("--lora-alpha 8", "--lora-targets q_proj", "--lora-init gaussian", "--lora-rslora")
    ),
    *(
        ("train_sft --adapter a", f"{flag} with --adapter")
        for flag in ("--lora-rank 4", "--lora-alpha 8", "--lora-targets q_proj")
    ),
    ("train_dpo --lora-rank 4", "--reference swap with LoRA"),
    ("train_dpo --adapter a", "--reference precompute with LoRA"),
    ("train_dpo --adapter a", "--audit-start 1 with --adapter"),
    ("train_rm", "--num-attributes 2 with --loss ranking"),
    ("train_rm", "--attribute-weights 1 with --loss ranking"),
    (PAIRS, "--center-rewards-coef 0.1 with --loss regression"),
]


@pytest.mark.parametrize(("command", "unused"), WITHOUT_EFFECT, ids=lambda text: text[:60])
def test_a_flag_without_effect_is_refused(command, unused, capsys):
    flag, why = re.split(" (?=with )| (?=without )", unused, maxsplit=1)
    assert refusal(command, capsys) == ""
    message = refusal(f"{command} {flag}", capsys)
    name = flag.split()[0].replace("--no-", "--")
    assert re.search(rf"{name} .* has no effect {why}", message), message


def test_weights_that_are_all_0_are_refused(capsys):
    assert "--attribute-weights 0" in refusal(f"{PAIRS} --attribute-weights 0 0", capsys)
    assert refusal(f"{PAIRS} --attribute-weights 0 1", capsys) == ""


def test_flags_of_validation_have_an_effect_on_the_toy_task(capsys):
    flags = "--val-interval 5 --val-batches 7 --save-top-k 3 --monitor val/acc"
    assert refusal(f"train_dpo {flags}", capsys) == ""
    assert refusal(f"train_dpo {flags} --train-data a.jsonl --val-data b.jsonl", capsys) == ""
    assert refusal(f"train_dpo --save-top-k 3 --monitor train/loss {TRAIN}", capsys) == ""


@pytest.mark.parametrize(
    ("monitor", "known"),
    [
        ("vall/loss", {"val/loss": 1.0}),
        ("val/loss", {"val_rollouts/rewards": 1.0}),
        ("training/loss", {"train/loss": 1.0}),
        ("train/loss", {"train_optim/loss": 1.0, "train_rollouts/rewards": 1.0}),
        ("vla/loss", {}),
    ],
)
def test_a_misspelt_monitor_is_refused_once_there_are_metrics(monitor, known):
    with pytest.raises(UserError, match=f"--monitor {monitor} is no metric of this run"):
        check_monitor(CheckpointConfig(monitor=monitor), known)


# ---- flags of rows -------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
TURNS = [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": "A"}]
MARKERS = {"system": "S", "mask": "User", "conversations": TURNS}
TEMPLATE = {"input": "Q", "output": "A"}
COMPLETION = {"prompt": "Q", "completion": "A"}
SIDES = {"chosen": {"role": "assistant", "content": "A"}, "rejected": {"role": "assistant", "content": "B"}}
OF_FORM = [  # flags, rows that they change, rows that they do not
    ({"prompt_template": "Q: {input} A: {output}"}, TEMPLATE, [CHAT, MARKERS, COMPLETION]),
    ({"truncation_field": "input, output"}, TEMPLATE, [CHAT, MARKERS, COMPLETION]),
    ({"truncation_side": "left"}, TEMPLATE, [CHAT, MARKERS, COMPLETION]),
    ({"chat_tokens": ("<s>", "<t>", "<l>", r"\n", r"\n")}, MARKERS, [CHAT, TEMPLATE, COMPLETION]),
    ({"turns": "last"}, CHAT, [MARKERS, TEMPLATE, COMPLETION]),
]


@pytest.mark.parametrize(("flags", "changed", "others"), OF_FORM, ids=lambda x: str(x)[:30])
def test_flags_of_another_form_of_rows_are_refused(flags, changed, others, tmp_path):
    text, fmt = load_tokenizer(ModelConfig().path), FormatConfig(**flags)
    for row, used in ((changed, True), *((other, False) for other in others)):
        formats, path = RowFormats(), write_rows(tmp_path / "rows.jsonl", [row])
        sft.load_sft([path], text, fmt, formats)
        if used:
            formats.check_used(fmt, FormatConfig)
            continue
        [name] = flags
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .* has no effect on --train-data"):
            formats.check_used(fmt, FormatConfig)


def test_the_template_wins_over_a_prompt_and_its_completion(tmp_path):
    text, fmt = load_tokenizer(ModelConfig().path), FormatConfig("Q: {prompt} A: {completion}")
    formats, path = RowFormats(), write_rows(tmp_path / "rows.jsonl", [COMPLETION])
    [example], _ = sft.load_sft([path], text, fmt, formats)
    formats.check_used(fmt, FormatConfig)
    assert text.decode(example.ids.tolist()).startswith("Q: Q A: A")


def test_flags_of_plain_text_are_named_in_the_log_of_messages(tmp_path):
    tokenizer = load_tokenizer(ModelConfig().path)
    prompt = CHAT["messages"][:1]
    cases = [
        (sft.load_sft, FormatConfig, CHAT, TEMPLATE),
        (prompts.load_prompts, PromptFormat, {"prompt": prompt}, {"prompt": "Q"}),
        (
            preferences.load_pairs,
            PreferenceFormat,
            {"prompt": prompt, **SIDES},
            {"prompt": "Q", "chosen": "A", "rejected": "B"},
        ),
    ]
    for load, config, chat, plain in cases:
        flags = {"add_bos": False} | ({"append_eos": False} if config is PreferenceFormat else {})
        for row, expected in ((chat, len(flags)), (plain, 0)):
            path = write_rows(tmp_path / "rows.jsonl", [row])
            *_, counts = load([path], tokenizer, config(**flags))
            lines = [name for name in counts if "has no effect" in name]
            assert len(lines) == expected, (load, row, counts)
            assert not lines or (f"1 {lines[0]}" in row_counts.describe(counts))


def test_variables_that_no_template_reads_are_refused(tmp_path):
    directory = shutil.copytree(ModelConfig().path, tmp_path / "model")
    for config, words in (
        (
            TextConfig(chat_template_kwargs='{"enable_thinkng": false}'),
            "--chat-template-kwargs 'enable_thinkng'",
        ),
        (TextConfig(template_date="2020-01-01"), "--template-date 2020-01-01"),
    ):
        with pytest.raises(UserError, match=f"{words} has no effect with .*model, whose chat template does"):
            load_tokenizer(directory, config=config)


@pytest.mark.parametrize("marks", [False, True])
def test_tool_calls_that_the_template_leaves_out_are_refused(marks, tmp_path):
    """A template that names tool_calls and writes nothing of them would train an empty answer."""
    start, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{% if m.role == 'assistant' %}}{start}{{{{ m.content or '' }}}}CALLS<|im_end|>{end}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "get_time", "arguments": {}}}
    row = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    ignores, writes = "{% if m.tool_calls %}{% endif %}", "{{ m.tool_calls | tojson }}"
    for calls, message in (
        (ignores, "message 1: .* leaves out its call of the tool 'get_time'"),
        (writes, ""),
    ):
        directory = shutil.copytree(ModelConfig().path, tmp_path / str(len(calls)))
        (directory / "chat_template.jinja").write_text(template.replace("CALLS", calls))
        tokenizer = load_tokenizer(directory)
        if not message:
            format_sft(row, tokenizer, FormatConfig())
            continue
        with pytest.raises(UserError, match=message):
            format_sft(row, tokenizer, FormatConfig())
