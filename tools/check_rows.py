"""Rows of a user's files as token ids, by transformers alone: what `tools.check` expects of a step.

Files are read by align.data.jsonl. A row in a form that is not rendered here has no expectation (`sequences`
is None) and is reported as not checked: marker chats, ShareGPT, Alpaca, tools, --prompt-template, inputs cut
to --max-seq-len, and plain-text responses of SentencePiece tokenizers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data import jsonl

Ids = list[int]


@dataclass(frozen=True)
class Tokens:
    """Token ids, and which of them are trained."""

    ids: Ids
    trained: list[bool]


@dataclass(frozen=True)
class Row:
    """A row of the data: where it is in the files, its expected sequences, its numbers, and its fields."""

    place: str
    sequences: list[Tokens] | None
    numbers: list[float]  # margin or labels of a reward model, gap of rewards of a pair
    fields: dict


class Unknown(Exception):
    """A row in a form that is not rendered here."""


def sequence(context: Ids, response: Ids) -> Tokens:
    """A sequence that trains its response."""
    return Tokens(context + response, [False] * len(context) + [True] * len(response))


class Renderer:
    """Conversations and texts to token ids by the tokenizer of a model's directory."""

    def __init__(self, directory: Path, config: Any):
        """`config`: the flags of the script."""
        from transformers import AutoTokenizer, GenerationConfig

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.format = config.format
        self.variables = config.text.variables()
        stops = {self.tokenizer.eos_token_id}
        if (directory / "generation_config.json").is_file():
            eos = GenerationConfig.from_pretrained(directory).eos_token_id
            stops |= set(eos if isinstance(eos, list) else [eos])
        self.stops = stops - {None}
        adds_bos = self.tokenizer("x").input_ids[:1] == [self.tokenizer.bos_token_id]
        self.bos = adds_bos if self.format.add_bos is None else self.format.add_bos
        self.joins = not (self.tokenizer.tokenize("a") or [""])[0].startswith("\u2581")

    def text(self, text: str, bos: bool = False) -> Ids:
        """A text as it stands."""
        own = self.tokenizer(text, add_special_tokens=False).input_ids
        return [self.tokenizer.bos_token_id] * bos + own

    def response(self, text: str, eos: bool = True) -> Ids:
        """A response of plain text after a prompt, with EOS unless it ends with a stop token."""
        if not self.joins:
            raise Unknown("a plain-text response of a SentencePiece tokenizer")
        ids = self.text(text)
        ended = bool(ids) and ids[-1] in self.stops
        return ids + [self.tokenizer.eos_token_id] * (eos and not ended)

    def chat(self, messages: list[dict], prompt: bool = False) -> Ids:
        """A conversation through the chat template; `prompt`: with the start of a response."""
        if any(set(message) - {"role", "content", "weight"} for message in messages) or not all(
            isinstance(message["content"], str) for message in messages
        ):
            raise Unknown("messages with other fields than role and content")
        turns = [{name: turn[name] for name in ("role", "content")} for turn in messages]
        ids = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=prompt, tokenize=True, return_dict=False, **self.variables
        )
        added = self.format.add_bos is True and ids[:1] != [self.tokenizer.bos_token_id]
        return [self.tokenizer.bos_token_id] * added + ids

    def trained(self, messages: list[dict], number: int, ids: Ids) -> slice:
        """Places of message `number`, a response, in the ids of a chat: up to its last stop token."""
        start, end = len(self.chat(messages[:number], prompt=True)), len(self.chat(messages[: number + 1]))
        stops = [place for place in range(start, min(end, len(ids))) if ids[place] in self.stops]
        if "{% generation" in str(self.tokenizer.chat_template) or not stops:
            raise Unknown("a chat template that marks responses itself, or ends them without a stop token")
        return slice(start, stops[-1] + 1)

    # ---- rows ------------------------------------------------------------------------------------

    def sft(self, row: dict) -> Iterator[Tokens]:
        """Examples of supervised fine-tuning, of any length."""
        fmt = self.format
        if "messages" in row and not {"system", "tools", "chat_template_kwargs"} & set(row):
            yield from self.sft_chats(row["messages"])
        elif set(row) >= set(fields := fmt.template_fields()) and "instruction" not in row:
            if fmt.prompt_template != "{input} {output}" or fields != ["input", "output"]:
                raise Unknown("a --prompt-template")
            prompt, answer = (str(row[name]).strip(" ") for name in fields)
            response = self.response(" " + answer if answer else "")
            tokens = sequence(self.text(prompt, self.bos), response)
            if len(tokens.ids) > fmt.max_seq_len:
                raise Unknown("a row of --prompt-template beyond --max-seq-len")
            yield tokens
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            response = self.response(row["completion"], eos=False) + [self.tokenizer.eos_token_id]
            yield sequence(self.text(row["prompt"], self.bos), response)
        else:
            raise Unknown(f"fields {', '.join(row)}")

    def sft_chats(self, messages: list[dict]) -> Iterator[Tokens]:
        """A conversation as examples by --turns."""
        responses = [
            i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight") != 0
        ]
        parts = {"whole": [responses], "each": [[i] for i in responses], "last": [responses[-1:]]}
        for part in parts[self.format.turns]:
            chat = messages if self.format.turns == "whole" else messages[: part[-1] + 1]
            ids = self.chat(chat)
            trained = [False] * len(ids)
            for number in part:
                place = self.trained(chat, number, ids)
                trained[place] = [True] * (place.stop - place.start)
            yield Tokens(ids, trained)

    def side(self, row: dict, name: str) -> Tokens:
        """One side of a pair."""
        value = row.get(name, row.get(f"{name}_response"))
        if set(row) & {"system", "tools", "chat_template_kwargs", "instruction", "conversations"}:
            raise Unknown(f"fields {', '.join(row)}")
        if isinstance(value, str) and isinstance(row.get("prompt"), str):
            return sequence(self.text(row["prompt"], self.bos), self.response(value, self.format.append_eos))
        before = row["prompt"] if isinstance(row.get("prompt"), list) else []
        messages = [*before, *(value if isinstance(value, list) else [value])]
        ids = self.chat(messages)
        place = self.trained(messages, len(messages) - 1, ids)
        return sequence(ids[: place.start], ids[place])

    def labelled(self, row: dict) -> Tokens:
        """A labelled text or conversation."""
        if "messages" in row:
            ids = self.chat(row["messages"])
            place = self.trained(row["messages"], len(row["messages"]) - 1, ids)
            return sequence(ids[: place.stop], [])
        ids = self.text(row["text"], self.bos)
        ended = ids[-1] in self.stops or not self.format.append_eos
        return sequence(ids + [self.tokenizer.eos_token_id] * (not ended), [])

    def prompt(self, row: dict) -> Tokens:
        """A prompt to sample from."""
        if set(row) & {"system", "tools", "chat_template_kwargs", "instruction", "conversations"}:
            raise Unknown(f"fields {', '.join(row)}")
        [name] = [name for name in ("prompt", "text", "messages") if name in row]
        value = row[name]
        if isinstance(value, str):
            return sequence(self.text(value, self.bos), [])
        is_whole = name == "messages" and value[-1]["role"] == "assistant"
        return sequence(self.chat(value[:-1] if is_whole else value, prompt=True), [])


def lines(paths: Sequence[Path]) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of all files."""
    for path in paths:
        yield from jsonl.read_jsonl(path)


def sft_rows(renderer: Renderer, paths: Sequence[Path]) -> Iterator[Row]:
    """Examples that fine-tuning keeps, cut to --max-seq-len."""
    fmt = renderer.format
    for place, row in lines(paths):
        try:
            for whole in renderer.sft(row):
                trained = [i > 0 and (fmt.loss_on == "all" or x) for i, x in enumerate(whole.trained)]
                part = Tokens(whole.ids[: fmt.max_seq_len], trained[: fmt.max_seq_len])
                if any(part.trained):
                    yield Row(place, [part], [], row)
        except Unknown as reason:
            yield Row(f"{place}: {reason}", None, [], row)


def pair_rows(renderer: Renderer, paths: Sequence[Path], gaps: bool) -> Iterator[Row]:
    """Pairs that are not too long, with the gap of their rewards if `gaps`, else their margin."""
    read = lines(paths)
    for place, row in read:
        try:
            if "text" in row:
                sides = [renderer.labelled(row), renderer.labelled(next(read)[1])]
            else:
                sides = [renderer.side(row, name) for name in ("chosen", "rejected")]
        except Unknown as reason:
            yield Row(f"{place}: {reason}", None, [], row)
            continue
        rewards = [row[name] for name in ("chosen_reward", "rejected_reward") if name in row]
        number = (rewards[0] - rewards[1] if rewards else 1.0) if gaps else row.get("margin", 0.0)
        longest = max(len(side.ids) for side in sides)
        if longest <= renderer.format.max_seq_len and sides[0].ids != sides[1].ids:
            yield Row(place, sides, [number], row)


def labelled_rows(renderer: Renderer, paths: Sequence[Path]) -> Iterator[Row]:
    """Labelled texts that are not too long."""
    for place, row in lines(paths):
        try:
            text = renderer.labelled(row)
        except Unknown as reason:
            yield Row(f"{place}: {reason}", None, row["label"], row)
            continue
        if len(text.ids) <= renderer.format.max_seq_len:
            yield Row(place, [text], row["label"], row)


def prompt_rows(renderer: Renderer, paths: Sequence[Path]) -> Iterator[Row]:
    """Prompts that are not too long."""
    for place, row in lines(paths):
        try:
            prompt = renderer.prompt(row)
        except Unknown as reason:
            yield Row(f"{place}: {reason}", None, [], row)
            continue
        if len(prompt.ids) <= renderer.format.max_prompt_len:
            yield Row(place, [prompt], [], row)
