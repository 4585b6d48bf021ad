"""Tokenizers: exact ids, round trips, and that what is saved loads elsewhere with the same ids."""

import json
import random
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import sentencepiece
import transformers

from align.data import tokenizer_files
from align.data.sentencepiece_tokenizer import SentencePieceTokenizer
from align.data.tokenizer import load_tokenizer
from align.errors import UserError
from tests.support.files import TINY
from tests.support.tokenizers import SENTENCES

CHAT = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "yo"}]
MARKERS = ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "many"]  # the last could also be cut otherwise
TEXTS = [
    *SENTENCES,
    *["", "a", " a", "a b", "  a  b ", "\n", "   ", "new\nline\n\n\nmore\ttab", "====== ---- !!!!!!"],
    *["emoji 😀 and ünïcode ﬁ ①", "日本語 テキスト", "e\u0301 x\u00a0y\u200bz", "def f(x):\n    return  x"],
    "\x00System\nfoo\n\x11User\nhi\n\x11",
    *["<extra_id_1>", " <extra_id_1> a", "<extra_id_0>System\nhi\n<extra_id_1>User\nyo<extra_id_2> x"],
]
TRAINED = {  # SentencePiece models trained here: what differs is what happens at the edges of a text
    "bpe": dict(model_type="bpe"),
    "bpe_no_prefix": dict(model_type="bpe", add_dummy_prefix=False),
    "bpe_plain": dict(
        model_type="bpe",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        byte_fallback=True,
    ),
    "unigram": dict(model_type="unigram"),
    "unigram_no_prefix": dict(model_type="unigram", add_dummy_prefix=False),
}
REAL = {  # Llama-2 style models with byte fallback, of 32,000 and 32,768 pieces
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
}


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory with just a tokenizer.model for each name in TRAINED and REAL."""
    root = tmp_path_factory.mktemp("sentencepiece")
    for name in [*TRAINED, *REAL]:
        (root / name).mkdir()
    (root / "text").write_text("\n".join(SENTENCES * 5))
    for name, options in TRAINED.items():
        sentencepiece.SentencePieceTrainer.train(
            input=str(root / "text"),
            model_prefix=str(root / name / "tokenizer"),
            vocab_size=360,
            hard_vocab_limit=False,
            user_defined_symbols=MARKERS,
            minloglevel=2,
            **options,
        )
    for name, file in REAL.items():
        shutil.copy(files("mistral_common") / "data" / file, root / name / "tokenizer.model")
    return {name: root / name for name in [*TRAINED, *REAL]}


@pytest.fixture(scope="module")
def saved_models(
    sentencepiece_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Files that `save` writes for each tokenizer."""
    root = tmp_path_factory.mktemp("saved")
    for name, directory in sentencepiece_models.items():
        load_tokenizer(directory).save(root / name)
    return {name: root / name for name in sentencepiece_models}


def tiny_with(directory: Path, file: str, **changes: object) -> Path:
    """A copy of the tiny model's tokenizer with some keys of one of its JSON files changed."""
    shutil.copytree(TINY, directory)
    content = json.loads((directory / file).read_text()) | changes
    (directory / file).write_text(json.dumps(content))
    return directory


# ---- the tiny model ----------------------------------------------------------------------------------------


def test_tiny_tokens_are_bytes():
    tiny = load_tokenizer(TINY)
    for text in [*TEXTS, "".join(map(chr, range(0x300))), "  two  spaces\r\n\ttab\n\n"]:
        assert tiny.encode(text) == list(text.encode())
        assert tiny.decode(tiny.encode(text)) == text
        assert tiny.encode(text, continued=True) == tiny.encode(text)


def test_tiny_special_tokens():
    tiny = load_tokenizer(TINY)
    assert (tiny.pad_id, tiny.bos_id, tiny.eos_id) == (256, 257, 258)
    assert tiny.encode("a<|im_end|>b<|endoftext|><|im_start|>") == [97, 258, 98, 256, 257]
    assert tiny.decode([97, 258, 98, 256, 257]) == "a<|im_end|>b<|endoftext|><|im_start|>"
    assert (tiny.vocab_size, tiny.stop_ids, tiny.adds_bos) == (259, {258}, False)


def test_tiny_chat_template():
    tiny = load_tokenizer(TINY)
    asked = "<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n"
    assert tiny.render(CHAT) == asked + "yo<|im_end|>\n"
    assert tiny.render(CHAT[:1], add_generation_prompt=True) == asked


def test_tiny_config_is_a_llama_that_holds_the_vocabulary():
    config = transformers.AutoConfig.from_pretrained(TINY)
    assert isinstance(config, transformers.LlamaConfig)
    assert config.vocab_size >= load_tokenizer(TINY).vocab_size
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (32, 4, 2)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (257, 258, 256)
    assert (TINY / "tokenizer.json").stat().st_size < 4096


# ---- Hugging Face directories ------------------------------------------------------------------------------


def test_save_copies_what_transformers_loads(tmp_path: Path):
    load_tokenizer(TINY).save(tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert loaded.encode(text, add_special_tokens=False) == list(text.encode())
    assert loaded.apply_chat_template(CHAT, tokenize=False) == load_tokenizer(TINY).render(CHAT)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_stop_ids_come_from_the_generation_config_too(tmp_path: Path):
    several = tiny_with(tmp_path / "several", "generation_config.json", eos_token_id=[256, 10])
    assert load_tokenizer(several).stop_ids == {258, 256, 10}
    (several / "generation_config.json").unlink()
    assert load_tokenizer(several).stop_ids == {258}


def test_pad_falls_back_to_eos(tmp_path: Path):
    assert load_tokenizer(tiny_with(tmp_path / "t", "tokenizer_config.json", pad_token=None)).pad_id == 258


def test_adds_bos_is_seen_and_encode_still_adds_none(tmp_path: Path):
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [257], "tokens": ["<|im_start|>"]}},
    }
    with_bos = load_tokenizer(tiny_with(tmp_path / "t", "tokenizer.json", post_processor=processor))
    assert with_bos.adds_bos
    assert with_bos.encode("a") == [97]


def test_without_chat_template(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "t")
    (tmp_path / "t/chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template.*chat_template.jinja.*--prompt-template"):
        load_tokenizer(tmp_path / "t").render(CHAT)


def test_refusal_of_the_chat_template_is_a_value_error(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "t")
    (tmp_path / "t/chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="refuses these messages: roles must alternate"):
        load_tokenizer(tmp_path / "t").render(CHAT)


def test_no_end_of_text_token(tmp_path: Path):
    with pytest.raises(UserError, match="no end-of-text token: set eos_token"):
        load_tokenizer(tiny_with(tmp_path / "t", "tokenizer_config.json", eos_token=None))


def test_no_tokenizer_there(tmp_path: Path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.model"):
        with pytest.raises(UserError, match="holds no tokenizer"):
            load_tokenizer(path)


# ---- SentencePiece models ----------------------------------------------------------------------------------


def test_sentencepiece_attributes(sentencepiece_models: dict[str, Path]):
    model = load_tokenizer(sentencepiece_models["v1"])
    assert isinstance(model, SentencePieceTokenizer)
    assert (model.bos_id, model.eos_id, model.vocab_size) == (1, 2, 32000)
    assert model.pad_id == model.eos_id  # this model has no pad piece
    assert (model.stop_ids, model.adds_bos) == ({2}, False)
    assert load_tokenizer(sentencepiece_models["v1"] / "tokenizer.model").encode("a") == model.encode("a")


def test_sentencepiece_known_ids(sentencepiece_models: dict[str, Path]):
    model = load_tokenizer(sentencepiece_models["v1"])
    assert model.encode("Hello world") == [22557, 1526]
    assert model.encode(" world", continued=True) == [1526]
    assert [model.sp.id_to_piece(i) for i in model.encode("world", continued=True)] == ["world"]
    assert [model.sp.id_to_piece(i) for i in model.encode("\nworld", continued=True)] == ["<0x0A>", "world"]
    assert model.encode("</s>") != [2]  # spelled out it is text
    assert model.decode([22557, 1526, 2, 1, 1526]) == "Hello world</s><s> world"


@pytest.mark.parametrize("name", [*TRAINED, *REAL])
def test_saved_sentencepiece_has_the_same_ids_in_transformers(
    name: str, sentencepiece_models: dict[str, Path], saved_models: dict[str, Path]
):
    ours = load_tokenizer(sentencepiece_models[name])
    theirs = transformers.AutoTokenizer.from_pretrained(saved_models[name])
    for text in TEXTS + random_texts(200):
        assert theirs(text).input_ids == ours.encode(text), text
    again = load_tokenizer(saved_models[name])
    names = ("eos_id", "bos_id", "pad_id", "vocab_size", "stop_ids", "adds_bos")
    assert [getattr(again, n) for n in names] == [getattr(ours, n) for n in names]
    assert (saved_models[name] / "tokenizer.model").read_bytes() == ours.path.read_bytes()


@pytest.mark.parametrize("kind", ["as it is", "saved"])
@pytest.mark.parametrize("name", [*TRAINED, *REAL])
def test_continued_text_joins_as_if_never_cut(
    name: str, kind: str, sentencepiece_models: dict[str, Path], saved_models: dict[str, Path]
):
    tokens = load_tokenizer({"as it is": sentencepiece_models, "saved": saved_models}[kind][name])
    for sentence in SENTENCES:
        words = sentence.split()
        for i in range(1, len(words)):
            prompt, response = " ".join(words[:i]), " " + " ".join(words[i:])
            joined = tokens.encode(prompt) + tokens.encode(response, continued=True)
            assert joined == tokens.encode(sentence)
    for response in (" many", "  many", "\nmany", "\n\n many", " 7"):
        joined = tokens.encode("How") + tokens.encode(response, continued=True)
        assert joined == tokens.encode("How" + response), response


def test_sentencepiece_decodes_what_it_encodes(
    sentencepiece_models: dict[str, Path], saved_models: dict[str, Path]
):
    ours, saved = load_tokenizer(sentencepiece_models["v1"]), load_tokenizer(saved_models["v1"])
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
        assert saved.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", ["tiny", "v1", "v1 saved"])
def test_ids_beyond_the_vocabulary_are_spelled_out(name, sentencepiece_models, saved_models):
    directory = {"tiny": TINY, "v1": sentencepiece_models["v1"], "v1 saved": saved_models["v1"]}[name]
    loaded = load_tokenizer(directory)
    ids, beyond = loaded.encode("ab cd"), loaded.vocab_size
    text = loaded.decode([*ids, beyond, beyond + 7, *loaded.encode("ef", continued=True), beyond])
    assert text == f"ab cd<id {beyond}><id {beyond + 7}>ef<id {beyond}>"
    assert loaded.decode([beyond]) == f"<id {beyond}>"


def test_sentencepiece_has_no_chat_template(sentencepiece_models: dict[str, Path]):
    with pytest.raises(UserError, match="no chat template.*'conversations'"):
        load_tokenizer(sentencepiece_models["bpe"]).render(CHAT)


def random_texts(count: int) -> list[str]:
    """Pieces of sentences, and strings of characters that meet at the edges of tokens."""
    rng = random.Random(0)
    alphabet = " \n\tab=-.,é日😀xyzthe▁01"
    texts = []
    for _ in range(count):
        sentence = rng.choice(SENTENCES)
        start = rng.randrange(len(sentence))
        texts.append(sentence[start : start + rng.randrange(1, 60)])
        texts.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30))))
        texts.append(sentence[:9] + " " * rng.randrange(9) + rng.choice(MARKERS) + " " + sentence[start:])
    return texts


# ---- the pad token of a reward model -----------------------------------------------------------------------


def scorer_directory(tmp_path: Path, source: Path = TINY, **tokenizer_config: object) -> Path:
    """A directory with the tokenizer of `source`, changed, and a config.json."""
    directory = tmp_path / "scorer"
    load_tokenizer(source).save(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_config))
    (directory / "config.json").write_text(json.dumps({"hidden_size": 8, "pad_token_id": 7}))
    return directory


def pad_tokens(directory: Path) -> tuple[int | None, int | None]:
    """The EOS of config.json and of the tokenizer must be one token."""
    tokenizer_files.save_pad_token(directory)
    hf = transformers.AutoTokenizer.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["hidden_size"] == 8
    return config["pad_token_id"], hf.pad_token_id


def test_pad_token_that_ends_no_text_stays(tmp_path):
    directory = scorer_directory(tmp_path)
    pad_id = transformers.AutoTokenizer.from_pretrained(TINY).pad_token_id
    assert pad_tokens(directory) == (pad_id, pad_id)


def test_pad_token_that_ends_texts_is_replaced(tmp_path):
    """transformers would read the score of a text that ends with it one token early."""
    hf = transformers.AutoTokenizer.from_pretrained(TINY)
    directory = scorer_directory(tmp_path, pad_token=hf.eos_token)
    config_pad, tokenizer_pad = pad_tokens(directory)
    assert config_pad == tokenizer_pad and config_pad not in (None, hf.eos_token_id, hf.bos_token_id)


def test_pad_token_that_generation_stops_at_is_replaced(tmp_path):
    hf = transformers.AutoTokenizer.from_pretrained(TINY)
    directory = scorer_directory(tmp_path)
    stop = {"eos_token_id": [hf.eos_token_id, hf.pad_token_id]}
    (directory / "generation_config.json").write_text(json.dumps(stop))
    config_pad, tokenizer_pad = pad_tokens(directory)
    assert config_pad == tokenizer_pad and config_pad not in stop["eos_token_id"]
