"""Marker chats: after training on `conversations` rows programs ask in that format and stop at its end."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from align.data import marker_chat, preferences, prompts
from align.data.formats import FormatConfig, format_sft
from align.data.hf_tokenizer import HuggingFaceTokenizer
from align.data.marker_chat import MarkerChat, RowFormats
from align.data.prompts import PromptFormat
from align.data.rows import form_of
from align.data.sft import adopt
from align.data.tokenizer import load_tokenizer
from align.errors import UserError
from align.generation.rollout import Sample
from align.rewards import sources
from align.rewards.sources import RewardConfig
from tests.support.files import TINY, write_rows
from tests.support.launch import fork_python, fork_ranks

TURN = 0x11  # a token of the tiny tokenizer is a byte
TOKENS = ("\x00", "\x11", "\x12", "\n", "\n")
EXTRA_IDS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "\n", "\n")
LABEL = "quality:4"


def conversation(*turns: tuple, system: str = "S", **fields: object) -> dict:
    """A conversations row of (from, value) or (from, value, label) turns."""
    named = [dict(zip(("from", "value", "label"), turn, strict=False)) for turn in turns]
    return {"system": system, "conversations": named, **fields}


def messages_of(row: dict, chat: MarkerChat) -> list[dict]:
    """A conversations row as messages."""
    roles = {chat.user: "user", chat.assistant: "assistant"}
    turns = [
        {"role": roles[turn["from"]], "content": turn["value"], "label": turn.get("label")}
        for turn in row["conversations"]
    ]
    return [{"role": "system", "content": row["system"]}, *turns]


def follower(chat: MarkerChat, source: Path = TINY) -> HuggingFaceTokenizer:
    tokens = load_tokenizer(source)
    tokens.follow(chat)
    tokens.hf.chat_template = tokens.chat_template  # what tokenizer.save writes, for transformers
    return tokens


# ---- the template, beside the training text ------------------------------------------------------

QA = [("User", "a?"), ("Assistant", "b\n\nb"), ("User", 'c "d" \\ {{x}}'), ("Assistant", "é😀")]
LABELLED = [(*turn, LABEL) if turn[0] == "Assistant" else turn for turn in QA]
CASES = {
    "plain": (MarkerChat(TOKENS), conversation(*QA)),
    "no label on one answer": (
        MarkerChat(TOKENS, kind="VALUE_TO_TEXT"),
        conversation(QA[0], QA[1], *LABELLED[2:], type="VALUE_TO_TEXT"),
    ),
    "labels before": (
        MarkerChat(TOKENS, kind="VALUE_TO_TEXT"),
        conversation(*LABELLED, type="VALUE_TO_TEXT"),
    ),
    "labels after": (MarkerChat(TOKENS, kind="TEXT_TO_VALUE"), conversation(*LABELLED, type="TEXT_TO_VALUE")),
    "other markers": (MarkerChat(EXTRA_IDS), conversation(*QA)),
    "quotes in markers": (MarkerChat(("<'s'>", '"é😀"\\', "{{l}}", "", "\t")), conversation(*QA)),
    "a question at the end": (MarkerChat(TOKENS), conversation(*QA[:3])),
    "other names": (
        MarkerChat(TOKENS, user="Ann", assistant="Bob"),
        conversation(("Ann", "a"), ("Bob", "b"), mask="Ann"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_template_renders_the_training_text(name: str):
    chat, row = CASES[name]
    text, spans = marker_chat.conversation_text(row, chat.tokens)
    tokens = follower(chat)
    messages = messages_of(row, chat)
    assert tokens.hf.apply_chat_template(messages, tokenize=False) == text
    last = len(messages) - 1 if messages[-1]["role"] == "assistant" else len(messages)
    variables = {"label": messages[-1]["label"]} if chat.kind == "VALUE_TO_TEXT" else {}
    asked = messages if chat.kind == "TEXT_TO_VALUE" else messages[:last]
    if chat.kind == "TEXT_TO_VALUE":
        asked = [*messages[:-1], {**messages[-1], "label": None}]
    prompt = tokens.hf.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **variables)
    expected = text[: spans[-1][0]] if last < len(messages) else text + f"\x11{chat.assistant}\n"
    assert prompt == expected


def test_template_by_hand():
    tokens = follower(MarkerChat(TOKENS, system="Be kind.", label=LABEL, kind="VALUE_TO_TEXT"))
    asked = [{"role": "user", "content": "Hi"}]
    assert (
        tokens.render(asked, add_generation_prompt=True)
        == f"\x00System\nBe kind.\n\x11User\nHi\n\x11Assistant\n\x12{LABEL}\n"
    )
    answered = [*asked, {"role": "assistant", "content": "Ho"}]
    whole = "\x00System\nBe kind.\n\x11User\nHi\n\x11Assistant\n"
    assert tokens.render(answered) == f"{whole}\x12{LABEL}\nHo\n\x11"
    unlabelled = [*asked, {"role": "assistant", "content": "Ho", "label": False}]
    assert tokens.render(unlabelled) == f"{whole}Ho\n\x11"
    none = tokens.hf.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, label=None)
    assert none.endswith("\x11Assistant\n")
    for wrong in ([{"role": "tool", "content": "x"}], [*asked, {"role": "system", "content": "x"}]):
        with pytest.raises(UserError, match="roles are user and assistant, system first only"):
            tokens.render(wrong)


def test_bos_is_in_the_template():
    chat = MarkerChat(TOKENS, bos=True)
    tokens = follower(chat)
    row = conversation(*QA)
    fmt = FormatConfig(add_bos=True)
    trained, _ = format_sft(row, tokens, fmt)
    messages = {"messages": messages_of(row, chat)}
    assert format_sft(messages, tokens, fmt)[0].ids.tolist() == trained.ids.tolist()
    assert trained.ids[:2].tolist() == [257, 0] and tokens.hf.bos_token_id == 257
    asked = prompts.format_prompt(messages, tokens, PromptFormat(add_bos=True))
    assert asked.tolist() == trained.ids[: len(asked)].tolist()


# ---- the same ids in messages, in prompts and in pairs -------------------------------------------


@pytest.mark.parametrize("tokens", [TOKENS, EXTRA_IDS], ids=["one token", "several tokens"])
def test_messages_train_as_conversations_do(tokens):
    chat = MarkerChat(tokens)
    text, row = follower(chat), conversation(*QA)
    fmt = FormatConfig(chat_tokens=tokens)
    as_row, _ = format_sft(row, text, fmt)
    as_messages, _ = format_sft({"messages": messages_of(row, chat)}, text, fmt)
    assert as_messages.ids.tolist() == as_row.ids.tolist()
    assert as_messages.trained.tolist() == as_row.trained.tolist()


def test_conversations_rows_are_prompts():
    chat = MarkerChat(TOKENS, label=LABEL, kind="VALUE_TO_TEXT")
    text, fmt = follower(chat), PromptFormat()

    def prompt(row: dict) -> str:
        return text.decode(prompts.format_prompt(row, text, fmt).tolist())

    whole = "\x00System\nS\n\x11User\na?\n\x11Assistant\n"
    assert prompt(conversation(*QA[:2])) == whole
    assert prompt(conversation(*LABELLED[:2], type="VALUE_TO_TEXT")) == f"{whole}\x12{LABEL}\n"
    assert prompt(conversation(QA[0], type="VALUE_TO_TEXT")) == f"{whole}\x12{LABEL}\n"
    assert prompt(conversation(QA[0])) == whole
    to_label = conversation(*QA[:2], type="TEXT_TO_VALUE")
    assert prompt(to_label) == f"{whole}b\n\nb\n\x12"
    with pytest.raises(UserError, match="asks for none"):
        prompt(conversation(QA[0], type="TEXT_TO_VALUE"))
    with pytest.raises(UserError, match="was not trained on such rows"):
        prompts.format_prompt(conversation(*QA), load_tokenizer(TINY), fmt)


ENDINGS = ["b", "b\n", "b\n\x11"]


@pytest.mark.parametrize("answer", ENDINGS)
def test_pairs_end_as_sampled_answers_do(answer: str):
    """Once: no EOS after the turn marker, and the marker where the text lacks it."""
    text, fmt = follower(MarkerChat(TOKENS)), preferences.PreferenceFormat()
    prompt = "\x00System\nS\n\x11User\na\n\x11Assistant\n"
    chosen, _ = preferences.format_pair({"prompt": prompt, "chosen": answer, "rejected": "c"}, text, fmt)
    expected = [*f"{prompt}b\n\x11".encode()]
    assert chosen.ids.tolist() == expected
    assert preferences.format_text({"text": prompt + answer}, text, fmt).ids.tolist() == expected
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    pair = {"prompt": messages} | {
        side: {"role": "assistant", "content": content}
        for side, content in (("chosen", "b"), ("rejected", "c"))
    }
    assert preferences.format_pair(pair, text, fmt)[0].ids.tolist() == expected


def test_pairs_of_messages_have_the_label_of_sampled_answers():
    """In the last answer and in those before it, in pairs and in SFT rows."""
    text = follower(MarkerChat(TOKENS, label=LABEL, kind="VALUE_TO_TEXT"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt = [*turns, {"role": "user", "content": "c"}]
    pair = {"prompt": prompt, "chosen": turns[1:], "rejected": [{"role": "assistant", "content": "d"}]}
    chosen, _ = preferences.format_pair(pair, text, preferences.PreferenceFormat())
    asked = prompts.format_prompt({"prompt": prompt}, text, PromptFormat()).tolist()
    labelled = f"\x11Assistant\n\x12{LABEL}\n"
    assert text.decode(asked) == f"\x00System\n\n\x11User\na\n{labelled}b\n\x11User\nc\n{labelled}"
    assert chosen.ids.tolist() == [*asked, *b"b\n\x11"]
    assert chosen.ids[chosen.trained].tolist() == [*b"b\n\x11"]
    row = format_sft({"messages": [*prompt, turns[1]]}, text, FormatConfig())[0]
    assert row.ids.tolist() == chosen.ids.tolist()


def test_pairs_end_with_a_marker_of_several_tokens():
    text, fmt = follower(MarkerChat(EXTRA_IDS)), preferences.PreferenceFormat()
    for answer in ("b", "b\n<extra_id_1>"):
        example, _ = preferences.format_pair({"prompt": "a", "chosen": answer, "rejected": "c"}, text, fmt)
        assert text.decode(example.ids.tolist()) == "ab\n<extra_id_1>"


def test_a_reward_model_of_other_ends_is_named(tmp_path: Path):
    text, messages = follower(MarkerChat(TOKENS)), []
    config = RewardConfig(reward_model=tmp_path)
    sources.warn_of_other_ends(config, text, messages.append)  # no file: nothing is known
    for ends in ({17: 60, 258: 2}, {258: 32, 98: 30}, {98: 40, 17: 22}):
        sources.save_statistics({"mean": 0.0, "std": 1.0, "ends": ends}, tmp_path)
        sources.warn_of_other_ends(config, text, messages.append)
    [warning] = messages
    assert "was trained on end with 'b', responses with '\\x11', '<|im_end|>'" in warning


def test_text_of_a_sample_is_the_answer_alone():
    """In a conversation that goes on, the template puts the end of the turn behind it again."""
    text = follower(MarkerChat(TOKENS))

    def sample(ids: bytes, finish: str) -> Sample:
        return Sample(np.array([*ids], np.int32), np.zeros(len(ids)), np.zeros(len(ids)), finish)

    assert sample(b"b\n\x11", "stop").text(text) == "b"
    assert sample(b"b\n", "length").text(text) == "b\n"
    several = follower(MarkerChat(EXTRA_IDS))
    assert sample(b"b\n<extra_id_1>", "stop").text(several) == "b"


# ---- what rows share -----------------------------------------------------------------------------


def formats_of(*rows: dict) -> RowFormats:
    formats = RowFormats()
    for row in rows:
        formats.add(row, form_of(row, ["input", "output"]))
    return formats


def test_what_most_rows_share_is_the_default():
    plain, other = conversation(*QA[:2]), conversation(*QA[:2], system="")
    labelled = conversation(*LABELLED, type="VALUE_TO_TEXT")
    assert formats_of(plain, plain, other).chat(TOKENS, False) == MarkerChat(TOKENS, system="S")
    assert formats_of(plain, other).chat(TOKENS, False) == MarkerChat(TOKENS)
    assert formats_of(labelled).chat(TOKENS, True) == MarkerChat(
        TOKENS, system="S", kind="VALUE_TO_TEXT", label=LABEL, bos=True
    )
    named = conversation(("Ann", "a"), ("Bob", "b"), ("Cy", "c"), ("Bob", "d"), mask=["Ann", "Cy"])
    formats = formats_of(named, conversation(("Cy", "a"), ("Bob", "b"), mask="Cy"), plain)
    chat = formats.chat(TOKENS, False)
    assert (chat.user, chat.assistant) == ("Cy", "Bob")
    assert formats.differences() == [
        "training rows have several user names: 'Cy' 2, 'Ann' 1, 'User' 1",
        "training rows have several assistant names: 'Bob' 3, 'Assistant' 1",
    ]
    assert formats_of({"messages": []}).chat(TOKENS, False) is None


def test_two_chat_formats_are_refused():
    with pytest.raises(UserError, match="1 rows of 'conversations' and 2 of 'messages'"):
        formats_of(conversation(*QA), {"messages": []}, {"messages": []}).chat(TOKENS, False)


# ---- files ---------------------------------------------------------------------------------------


def test_other_programs_stop_at_the_marker(tmp_path: Path):
    chat = MarkerChat(TOKENS, system="S")
    formats, messages = formats_of(conversation(*QA)), []
    tokenizer = load_tokenizer(TINY)
    trained_format = adopt(formats, tokenizer, FormatConfig(), messages.append)
    assert trained_format.chat == chat and "system 'S'" in messages[-1] and r"'\n\x11'" in messages[-1]
    shutil.copy(TINY / "generation_config.json", tmp_path)
    tokenizer.save(tmp_path)
    trained_format.save(tmp_path)
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == [258, TURN] and config.pad_token_id == 256
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": "user", "content": "a"}]
    ids = hf.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat == chat and loaded.stop_ids == {258, TURN}
    assert ids == [*b"\x00System\nS\n\x11User\na\n\x11Assistant\n"]
    assert ids == prompts.format_prompt({"messages": asked}, loaded, PromptFormat()).tolist()
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace('"S"', '"edited"'))
    again = tmp_path / "again"
    load_tokenizer(tmp_path).save(again)
    assert '"edited"' in (again / "chat_template.jinja").read_text()


def test_a_marker_of_several_tokens_is_a_stop_string(tmp_path: Path):
    text = follower(MarkerChat(EXTRA_IDS))
    assert text.stop_ids == {258} and text.stop_strings == ("<extra_id_1>",)
    text.save(tmp_path)
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (config.eos_token_id, config.stop_strings) == ([258], ["<extra_id_1>"])


def test_sentencepiece_models_speak_it_before_and_after_saving(tmp_path: Path):
    shutil.copy(files("mistral_common") / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    chat = MarkerChat(TOKENS, bos=True)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.follow(chat)
    marker = tokenizer.sp.piece_to_id("\x11")
    assert tokenizer.stop_ids == {tokenizer.eos_id, marker} and not tokenizer.stop_strings
    row = conversation(*QA)
    trained, _ = format_sft(row, tokenizer, FormatConfig(add_bos=True))
    assert trained.ids[trained.trained][-1] == marker
    messages = {"messages": messages_of(row, chat)[:-1]}
    tokenizer.save(tmp_path / "hf")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = hf.apply_chat_template(messages["messages"], add_generation_prompt=True, return_dict=False)
    assert ids == trained.ids[: len(ids)].tolist()
    assert tokenizer.render(messages["messages"], add_generation_prompt=True).startswith("<s>\x00System")


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.jsonl, and OUTPUT of an SFT run on it: every answer is "ok"."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [conversation(("User", x), ("Assistant", "ok"), type=None) for x in "abcdefgh" * 16]
    write_rows(folder / "data.jsonl", rows)
    (folder / "judge.txt").write_text("judge {{ prompt }}: {{ response }}")
    flags = "--global-batch-size 16 --max-epochs 4 --lr 4e-3 --min-lr 4e-3 --warmup-steps 2 --max-seq-len 64"
    sft = f"train_sft.py --train-data {folder}/data.jsonl --output {folder}/sft {flags}"
    fork_ranks(2, "tests/workers/resume.py", json.dumps([sft.split()]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hf", "checkpoints/step_00000032"])
def test_generate_asks_and_stops_in_the_trained_format(model: str, trained: Path, tmp_path: Path):
    command = ("generate.py", "--model", trained / "sft" / model, "--greedy", "--max-new-tokens", 12)
    done = fork_python(*command, "--prompt", "c")
    assert done.stdout == "ok\n" and "(stop, 4 tokens" in done.stderr
    row = conversation(("User", "d"), ("Assistant", "?"))
    questions = [row, {"messages": [{"role": "user", "content": "e"}]}]
    write_rows(tmp_path / "in.jsonl", questions)
    fork_python(*command, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["response"], row["finish"]) for row in answers] == [("ok", "stop"), ("ok", "stop")]


@pytest.mark.slow
def test_transformers_stops_in_the_trained_format(trained: Path):
    hf = trained / "sft" / "hf"
    network = transformers.AutoModelForCausalLM.from_pretrained(hf)
    tokens = transformers.AutoTokenizer.from_pretrained(hf)
    asked = tokens.apply_chat_template(
        [{"role": "user", "content": "f"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = network.generate(**asked, do_sample=False, max_new_tokens=12)[0, asked.input_ids.shape[1] :]
    assert bytes(answer.tolist()) == b"ok\n\x11"


@pytest.mark.slow
def test_self_rewarding_samples_ended_answers(trained: Path):
    command = (
        f"train_self_reward.py --model {trained}/sft/hf --train-data {trained}/data.jsonl --output "
        f"{trained}/self --judge-template {trained}/judge.txt --global-batch-size 8 --samples-per-prompt 2 "
        "--judgements 1 --iterations 1 --max-steps 1 --max-new-tokens 16 --max-seq-len 64 --rollout-ahead 1"
    )
    fork_ranks(2, "tests/workers/resume.py", json.dumps([command.split()]))
    lines = (trained / "self" / "metrics.jsonl").read_text().splitlines()
    [step] = [row for line in lines if (row := json.loads(line))["step"] == 1]
    assert step["train/bad_ends_per_GBS"] < 0.2
    assert (trained / "self" / "hf" / "chat_template.jinja").read_text() == (
        trained / "sft" / "hf" / "chat_template.jinja"
    ).read_text()
