"""SentencePiece models as tokenizer.json files of Hugging Face, with the same ids."""

import re

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

SPACE = "▁"  # SentencePiece's character for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of SentencePiece pieces
BPE = 2  # a SentencePiece model type; the other one in use is 1, unigram


def translate(proto: ModelProto) -> tokenizers.Tokenizer:
    """Translate a SentencePiece model. The ids are equal, except where a text spells out a control piece.

    (There `</s>` becomes the token, as in every Hugging Face tokenizer and not in SentencePiece.)
    """
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]

    make = bpe_tokenizer if proto.trainer_spec.model_type == BPE else unigram_tokenizer
    tokenizer = make(proto)
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    control = [piece.piece for piece in proto.pieces if piece.type == CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return tokenizer


def bpe_tokenizer(proto: ModelProto) -> tokenizers.Tokenizer:
    """BPE pieces as merges, best score first: SentencePiece joins the neighbours that make the best piece."""
    pieces = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    halves = [
        (piece[:i], piece[i:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    model = models.BPE(
        vocab=pieces,
        merges=halves,
        unk_token=next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        ignore_merges=bool(user_defined),  # user-defined pieces, cut out below, are looked up whole
    )
    tokenizer = tokenizers.Tokenizer(model)
    if user_defined:
        longest_first = sorted(map(re.escape, user_defined), key=len, reverse=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("|".join(longest_first)), "isolated")
    return tokenizer


def unigram_tokenizer(proto: ModelProto) -> tokenizers.Tokenizer:
    """Unigram pieces with their scores; user-defined ones with SentencePiece's bonus."""
    best = max(piece.score for piece in proto.pieces if piece.type == NORMAL)
    never = -1e9  # control pieces and bytes are not cut from text
    vocab = []
    for piece in proto.pieces:
        bonus = best * len(piece.piece.encode()) - 0.1
        vocab.append((piece.piece, {NORMAL: piece.score, USER_DEFINED: bonus}.get(piece.type, never)))
    spec = proto.trainer_spec
    return tokenizers.Tokenizer(models.Unigram(vocab, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback))
