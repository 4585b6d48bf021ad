"""Ids are those of tokenizer.json, whatever class of transformers the config names.

The oracle is the `tokenizers` library on the same file.
"""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from align.data import formats, preferences, prompts, tokenizer_files
from align.data.formats import FormatConfig
from align.data.tokenizer import load_tokenizer
from align.errors import UserError

SPECIAL = ["<|end|>", "<s>", "<|user|>", "<|answer|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|answer|>' }}{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)
LLAMA_3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = [
    "The 3 quick brown foxes jump over 1234567 lazy dogs; it's the dogs' day, isn't it?",
    "def f(x):\n    return  x + 12\n\n\tprint('où est-ce?')  # naïve café 日本語",
]
PIECES = [
    *["a", "the", "The", " quick", "fox", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "1", "12", "1234567"],
    *[
        "é",
        "e\u0301",
        "où",
        "日本語",
        "😀",
        "\u00a0",
        "\u200b",
        "it's",
        "'S",
        "---",
        "()",
        "ﬁ",
        "①",
        "▁",
        "x",
    ],
    *["Ａ", "İ", "\ufeff", "\x00", *SPECIAL, "<|en", "d|>", "</s>", "<0x41>"],
]


def byte_level(split: str | None) -> tokenizers.Tokenizer:
    """Byte-level BPE with the split rule of GPT-2 (None) or another."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif split == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT * 4, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    return tokenizer


def sentencepiece_like(steps: list, scheme: str | None) -> tokenizers.Tokenizer:
    """BPE with byte fallback over text whose spaces are ▁, by normalisers or by Metaspace."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT * 4, trainers.BpeTrainer(vocab_size=200))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if scheme != "never" else undo)
    return tokenizer


REPLACE = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
KINDS = {
    "gpt2 split": lambda: byte_level(None),
    "llama 3 split": lambda: byte_level(LLAMA_3),
    "qwen split": lambda: byte_level(QWEN),
    "single digits": lambda: byte_level("digits"),
    "prepend and replace": lambda: sentencepiece_like(REPLACE, None),
    "replace alone": lambda: sentencepiece_like(REPLACE[1:], None),
    "metaspace first": lambda: sentencepiece_like([], "first"),
    "metaspace always": lambda: sentencepiece_like([], "always"),
    "metaspace never": lambda: sentencepiece_like([], "never"),
    "nfc": lambda: with_normalizer(byte_level(None), normalizers.NFC()),
    "nfkc and lower case": lambda: with_normalizer(
        byte_level(LLAMA_3), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "bos": lambda: with_bos(byte_level(QWEN)),
    "bos, prepend and replace": lambda: with_bos(sentencepiece_like(REPLACE, None)),
    "tokens that take spaces": lambda: byte_level(None),
}
CLASSES = {  # tokenizer_class and model_type, which transformers looks at both
    "gpt2": ("GPT2Tokenizer", "llama"),
    "llama": ("LlamaTokenizer", "llama"),
    "qwen2": ("Qwen2Tokenizer", "qwen2"),
    "fast": ("PreTrainedTokenizerFast", "qwen2"),
    "none": (None, "llama"),
}


def with_normalizer(
    tokenizer: tokenizers.Tokenizer, normalizer: normalizers.Normalizer
) -> tokenizers.Tokenizer:
    tokenizer.normalizer = normalizer
    return tokenizer


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """With a post-processor that puts <s> in front."""
    add_tokens(tokenizer, "bos")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def add_tokens(tokenizer: tokenizers.Tokenizer, kind: str) -> None:
    takes = dict(lstrip=True, rstrip=True) if kind == "tokens that take spaces" else {}
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, **takes) for token in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken("foxes", normalized=True)])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """tokenizer.json of each kind."""
    tokenizer_of = {kind: make() for kind, make in KINDS.items()}
    for kind, one in tokenizer_of.items():
        add_tokens(one, kind)
    return {kind: one.to_str() for kind, one in tokenizer_of.items()}


def directory(folder: Path, text: str, name: str, **fields: object) -> Path:
    tokenizer_class, model_type = CLASSES[name]
    config = {"eos_token": "<|end|>", "bos_token": "<s>", **fields}
    if tokenizer_class:
        config["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def awkward(count: int) -> list[str]:
    random.seed(0)
    return ["".join(random.choices(PIECES, k=random.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_file(kind, name, files, tmp_path):
    """Ids of texts, chats, prompts and pairs, and of the saved tokenizer."""
    loaded = load_tokenizer(directory(tmp_path, files[kind], name))
    oracle = tokenizers.Tokenizer.from_str(files[kind])
    assert loaded.adds_bos == kind.startswith("bos")
    loaded.save(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").read_text() == files[kind]
    saved = load_tokenizer(tmp_path / "saved")
    for text in awkward(200):
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert loaded.encode(text) == saved.encode(text) == ids, repr(text)
        assert loaded.decode(ids) == oracle.decode(ids, skip_special_tokens=False)
    for text in [text for text in awkward(60) if not any(token in text for token in SPECIAL)]:
        asked, answer = {"role": "user", "content": text}, {"role": "assistant", "content": "The fox"}
        prompt = f"<|user|>{text}<|end|><|answer|>"
        ids = oracle.encode(prompt, add_special_tokens=False).ids
        whole = oracle.encode(f"{prompt}The fox<|end|>", add_special_tokens=False).ids
        example, _ = formats.format_sft({"messages": [asked, answer]}, loaded, FormatConfig())
        assert example.ids.tolist() == whole
        assert prompts.format_prompt({"prompt": [asked]}, loaded, prompts.PromptFormat()).tolist() == ids
        chosen, _ = preferences.format_pair(
            {"chosen": [asked, answer], "rejected": [asked, {"role": "assistant", "content": "a"}]},
            loaded,
            preferences.PreferenceFormat(),
        )
        assert chosen.ids.tolist() == whole


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_special_tokens_are_plain_text(kind, files, tmp_path):
    """As `tokenizers` encodes the whole text without special tokens; between control tokens likewise."""
    loaded = load_tokenizer(directory(tmp_path, files[kind], "none"))
    plain = tokenizers.Tokenizer.from_str(files[kind])
    user, end = plain.token_to_id("<|user|>"), plain.token_to_id("<|end|>")
    plain.encode_special_tokens = True
    seen = 0
    for text in awkward(200):
        hidden = loaded.hide(text)
        seen += hidden != text
        assert len(hidden) == len(text)
        assert loaded.encode(hidden) == plain.encode(text, add_special_tokens=False).ids
        assert (hidden != text) == any(token in text for token in SPECIAL)
    assert seen > 30
    for text in ["a", "the fox", "<|end|>", "The<|end|>\n<|answer|>yes", "a <s>"]:
        ids = loaded.encode(f"<|user|>{loaded.hide(text)}<|end|>")
        assert (ids[0], ids[-1]) == (user, end) and not {user, end} & set(ids[1:-1])


def test_a_limit_and_padding_in_the_file_are_not_for_training(files, tmp_path):
    limited = tokenizers.Tokenizer.from_str(files["gpt2 split"])
    text = " ".join(TEXT)
    ids = limited.encode(text).ids
    limited.enable_truncation(8)
    limited.enable_padding(length=400)
    assert load_tokenizer(directory(tmp_path, limited.to_str(), "none")).encode(text) == ids


def test_tokens_of_the_config_are_added(files, tmp_path):
    size = tokenizers.Tokenizer.from_str(files["gpt2 split"]).get_vocab_size()
    token = {"content": "<tool>", "special": True}
    path = directory(tmp_path, files["gpt2 split"], "none", added_tokens_decoder={str(size): token})
    assert load_tokenizer(path).encode("a<tool>")[1:] == [size]
    directory(tmp_path, files["gpt2 split"], "none", added_tokens_decoder={str(size + 1): token})
    with pytest.raises(
        UserError, match=f"'<tool>' has the id {size + 1} in tokenizer_config.json, and {size}"
    ):
        load_tokenizer(path)


def test_add_bos_token_of_the_config_counts(files, tmp_path):
    for kind, asked in [("gpt2 split", True), ("bos", False)]:
        path = directory(tmp_path, files[kind], "llama", add_bos_token=asked)
        assert load_tokenizer(path).adds_bos is asked


def test_a_class_that_changes_the_file_and_text_that_does_not_come_back_are_said(files, tmp_path):
    messages = []
    loaded = load_tokenizer(directory(tmp_path, files["nfkc and lower case"], "gpt2"), messages.append)
    assert len(messages) == 1 and "GPT2Tokenizer" in messages[0] and "changes its normalizer" in messages[0]
    for text in ["the fox", "The fox", "THE"]:
        loaded.encode(text)
    assert messages[1:] == ["decoding does not give the text back: 'The fox' becomes 'the fox'"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: no tokenizer can be made of it"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "tokenizer.json: no tokenizer can be made of it"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: must hold a JSON object"),
        ("special_tokens_map.json", "3", "special_tokens_map.json: must hold a JSON object, not 3"),
        ("config.json", "}", "config.json: not valid JSON"),
        ("generation_config.json", "{'eos'", "generation_config.json: not valid JSON"),
        (
            "generation_config.json",
            '{"eos_token_id": "a"}',
            "eos_token_id = 'a' must be a token id, or a list",
        ),
        ("generation_config.json", '{"eos_token_id": [true]}', r"eos_token_id = \[True\] must be a token id"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id = -1 must be a token id"),
        (
            "tokenizer_config.json",
            '{"eos_token": 5}',
            "transformers cannot load its tokenizer: Special token",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}', "added token 5 has no string"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "transformers cannot load"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be true or false"),
        ("tokenizer_config.json", '{"chat_template": 5}', "the chat template must be text, not 5"),
        ("added_tokens.json", '{"a": "b"}', "transformers cannot load its tokenizer"),
        ("special_tokens_map.json", '{"eos_token": []}', "transformers cannot load its tokenizer"),
        ("chat_template.jinja", "\udcff", "transformers cannot load its tokenizer: 'utf-8'"),
        ("prompt_format.json", "{", "prompt_format.json: not valid JSON"),
        ("prompt_format.json", "[]", "prompt_format.json: must hold a JSON object"),
        ("prompt_format.json", '{"chat": 3}', "prompt_format.json: chat = 3 is no marker chat"),
        ("prompt_format.json", '{"chat": {"tokens": [1]}}', "must have five tokens, all texts strings"),
        ("prompt_format.json", '{"chat": {"tokens": ["a"], "x": 1}}', "is no marker chat: .*'x'"),
    ],
)
def test_broken_files_are_named(name, text, message, files, tmp_path):
    path = directory(tmp_path, files["gpt2 split"], "none")
    if name == "tokenizer_config.json" and text.startswith('{"'):
        (path / "chat_template.jinja").unlink(missing_ok=True)  # which goes before the field
        text = json.dumps(json.loads((path / name).read_text()) | json.loads(text))
    (path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\x07\x0a\x05<unk>", b"\x0a\xff\xff\xff"])
def test_a_sentencepiece_model_that_is_none(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model: (not a SentencePiece model|the model has no end)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (None, [5, 6], {5, 6}),
        ({}, 5, {5}),
        ({"eos_token_id": 7}, [5, 6], {7}),
        ({"eos_token_id": [7, 8]}, None, {7, 8}),
        (None, None, set()),
    ],
)
def test_stop_ids_are_those_of_transformers(generation, config, stops, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({} if config is None else {"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert tokenizer_files.generation_stop_ids(tmp_path) == stops
