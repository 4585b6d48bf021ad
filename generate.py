"""Generate responses: to one prompt, to a file of prompts, or in a conversation.

    python generate.py --model DIR --prompt "How many days has a week?"
    python generate.py --model DIR --input prompts.jsonl --output answers.jsonl --samples-per-prompt 4
    python generate.py --model DIR --chat
    torchrun --nproc_per_node 2 generate.py --tp 2 --model runs/sft/checkpoints/step_00000100 --chat

DIR is a Hugging Face directory, or a checkpoint of a run, of which only the weights are read. A prompt has
the token ids that it had in training: through the chat template, or through the run's --prompt-template.
Responses go to stdout or to --output, everything else to stderr.
"""

import json
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from align import console
from align.data import jsonl, marker_chat, packing, prompts
from align.data.formats import FormatConfig, check_bos, format_template, template_pieces
from align.data.packing import Example
from align.data.prompts import Prompt, PromptFormat
from align.data.tokenizer import TextConfig, Tokenizer, load_tokenizer
from align.distributed import launch, parallel, watchdog
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.files import check_files, read_object, write_atomically
from align.flags import SAMPLES, check_ranges, refuse_unused
from align.generation.generator import Generator, RolloutConfig, check_prompt, check_rollout
from align.generation.rollout import Sample
from align.generation.sampling import SamplingConfig
from align.model import architecture, gpt, huggingface
from align.model.architecture import Architecture
from align.model.config import ModelConfig, check_model, describe_model
from align.training import checkpoint, checkpoint_files

PROGRESS_S = 5.0  # seconds between two lines about a long --input
POLL_S = 60.0  # seconds between two collectives during keyboard input: gloo gives up after 1800

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    prompt: str | None = None
    """a user's message, put through the chat template, or into the first field of --prompt-template if the
    model was trained on such rows; with neither the text is continued as it stands"""
    input: Path | None = None
    """prompts: a file of JSON lines, a JSON array or Parquet, or a data set of the Hub, of {"prompt"},
    {"text"}, {"messages"}, {"conversations"} or {"instruction"} rows"""
    output: Path | None = None
    """JSON lines: the rows of --input with "response" and "finish" (stop or length); appears when complete"""
    chat: bool = False
    """chat: each line of stdin is a message; /new starts over, an empty line or Ctrl-D ends"""
    raw: bool = False
    """continue the text of --prompt as it stands, whatever templates the model has"""
    samples_per_prompt: int = 1
    """responses to each prompt; above 1 "response" and "finish" are lists"""
    add_bos: bool | None = None
    """put BOS in front of each prompt; None: as the model's prompt_format.json says, else as the tokenizer
    does by itself (messages: as the template does)"""
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig(rollout_layout="same")  # a copy on each rank needs more memory
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        check_ranges(self, samples_per_prompt=SAMPLES)
        self.check_task()
        refuse_unused(self.model, ModelConfig, "recompute keep_logits", "without training")
        refuse_unused(self.parallel, ParallelConfig, "sequence_parallel", "without training")
        if self.raw:
            names = "chat_template_kwargs template_date"
            refuse_unused(self.text, TextConfig, names, "with --raw, which has no template")
        if self.chat and self.add_bos is False:
            refuse_unused(self, Config, "add_bos", "with --chat: BOS is the chat template's")

    def check_task(self) -> None:
        """Refuse anything but one task with the flags that belong to it."""
        tasks = {"--prompt": self.prompt is not None, "--input": self.input is not None, "--chat": self.chat}
        flags = [flag for flag, wanted in tasks.items() if wanted]
        if len(flags) != 1:
            raise UserError(
                f"{' and '.join(flags) or 'nothing to do'}: give one of --prompt TEXT, --chat, "
                "and --input FILE with --output FILE"
            )
        if (self.input is None) != (self.output is None):
            raise UserError(
                f"--input {self.input} and --output {self.output}: they go together, give both or none"
            )
        if self.output is not None and self.output.suffix == ".gz":
            raise UserError(f"--output {self.output} is written as plain text: leave .gz out of its name")
        if self.prompt == "":
            raise UserError('--prompt "": there must be a text to answer')
        if self.raw and self.prompt is None:
            raise UserError(f"--raw is about --prompt TEXT and has no effect with {flags[0]}: leave it out")
        if self.chat and self.samples_per_prompt != 1:
            raise UserError(
                f"--samples-per-prompt {self.samples_per_prompt}: with --chat a message has one answer"
            )


def main(config: Config) -> None:
    source = find_source(config.model)
    arch = architecture.read_config(source.directory)
    check_model(arch, config.model, config.parallel)
    settings = replace(config.model, model=str(source.directory))  # of a checkpoint: its first model's
    check_rollout(arch, config.rollout, config.sampling, settings, config.parallel)
    tokenizer = load_tokenizer(source.directory, say, source.text_config(config.text))
    if chat_format := marker_chat.read(source.run or source.directory):
        tokenizer.follow(chat_format)
    add_bos = source.formats.get("add_bos") if config.add_bos is None else config.add_bos
    fmt = PromptFormat(add_bos=add_bos)
    if config.chat and not tokenizer.chat_template:
        raise UserError(f"--chat needs a chat template, {source.directory} has none: use --prompt or --input")
    if config.chat and source.formats.get("rows") == "template":
        say("WARNING: training rows had --prompt-template, and --chat asks through the chat template")
    if config.prompt is not None:
        in_template = not tokenizer.chat_template or source.formats.get("rows") == "template"
        template = source.formats.get("prompt_template") if in_template else None
        if config.add_bos is False and tokenizer.chat_template and not (template or config.raw):
            raise UserError("--add-bos False has no effect through the chat template: leave it out")
        ids = encode_text(config.prompt, tokenizer, fmt, template, config.raw)
        if template and tokenizer.chat_template and not config.raw:
            say(f"--prompt goes through --prompt-template {template!r}, as training rows did")
        jsonl.located("--prompt", check_ids, ids, arch)
    if config.input is not None and config.output is not None:  # both or neither
        rows = read_prompts(config.input, tokenizer, fmt, arch)
        prepare_output(config.output, config.input)

    policy = gpt.build_policy(arch, config.model, config.parallel)
    layout, keep = config.parallel, True  # the weights never change
    generator = Generator(policy, config.rollout, config.sampling, settings, layout, tokenizer, keep)
    if source.checkpoint is None:
        huggingface.load(policy, huggingface.open_source(source.directory, arch, config.parallel.seed))
    else:
        checkpoint.load_weights(source.checkpoint, policy)
    say(f"{parallel.layout()}; {describe_model(arch, config.model)}; {generator.describe()}")

    if config.chat:
        chat(generator, fmt)
    elif config.prompt is not None:
        ask(generator, ids, 0, config.samples_per_prompt)
    elif config.output is not None:
        respond_to_file(generator, rows, config.output, config.samples_per_prompt)


def say(text: str) -> None:
    """Print a log line on rank 0's stderr: stdout is for responses."""
    if parallel.is_main():
        console.write(text, to="stderr")


# ---- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The model that --model names."""

    directory: Path  # of config.json and tokenizer
    checkpoint: Path | None  # of the weights; None: they are in the directory
    run: Path | None  # directory of the run that trained the checkpoint in a format of its own
    formats: dict  # the prompt_format.json of its training, where known
    chat_template_kwargs: str = ""  # of a checkpoint's run; a directory's template has its own

    def text_config(self, config: TextConfig) -> TextConfig:
        """Text flags; the variables of the chat template default to those of training."""
        return replace(config, chat_template_kwargs=config.chat_template_kwargs or self.chat_template_kwargs)


def find_source(config: ModelConfig) -> Source:
    """Find the parts of a model; --model is a Hugging Face directory or a checkpoint of this project."""
    path = config.path
    if not checkpoint.is_checkpoint(path):
        return Source(path, None, None, read_formats(path))
    checkpoint_files.verify(path)
    if checkpoint.is_reward_model(path):
        raise UserError(
            f"--model {path} is a checkpoint of a reward model, which predicts no tokens: give a language "
            "model's"
        )
    flags = checkpoint.run_flags(path)
    if flags.get("lora_rank") or flags.get("adapter"):
        raise UserError(
            f"--model {path} holds adapters only: `python -m tools.prepare_model export` merges them, give "
            "its --output"
        )
    start = ModelConfig(model=flags["model"]).path
    if not (start / "config.json").is_file():
        raise UserError(
            f"--model {path}: its run began with --model {flags['model']}, and there is no "
            f"{start}/config.json: start this command where the run was started"
        )
    variables = flags.get("chat_template_kwargs", "")
    run = path.parent.parent  # SFT and self-rewarding store the format of their rows there
    if not (run / "prompt_format.json").is_file():
        return Source(start, path, None, read_formats(start), variables)
    return Source(start, path, run, read_formats(run), variables)


def read_formats(directory: Path) -> dict:
    """The prompt_format.json of a directory, empty if there is none."""
    return read_object(directory / "prompt_format.json", required=False)


# ---- prompts -------------------------------------------------------------------------------------


def encode_text(
    text: str, tokenizer: Tokenizer, fmt: PromptFormat, template: str | None, raw: bool
) -> np.ndarray:
    """Ids [n] int32 of the text of --prompt. Raises UserError.

    `template`: of training rows without messages; it goes before the chat template, and `raw` before both.
    """
    if template is not None and not raw:
        return jsonl.located("--prompt", encode_in_template, text, tokenizer, fmt, template)
    messages = [{"role": "user", "content": text}]
    row = {"messages": messages} if tokenizer.chat_template and not raw else {"prompt": text}
    return jsonl.located("--prompt", prompts.format_prompt, row, tokenizer, fmt)


def encode_in_template(text: str, tokenizer: Tokenizer, fmt: PromptFormat, template: str) -> np.ndarray:
    """Ids [n] int32 before the response of a row with `text` in its first field and empty others."""
    first, *others = [field for _, field in template_pieces(template)]
    if not others:
        raise UserError(f"the template {template!r} has no field for a prompt: use --raw")
    row = dict.fromkeys(others, "") | {first: text}
    rules = FormatConfig(template, first, add_bos=fmt.add_bos, max_seq_len=10**9)
    ids, trained, _ = format_template(row, tokenizer, rules)
    check_bos(ids, tokenizer)
    return np.array(ids, np.int32)[~np.array(trained)]


def read_prompts(path: Path, tokenizer: Tokenizer, fmt: PromptFormat, arch: Architecture) -> list[Prompt]:
    """Read the rows of --input. Raises UserError with file and line for an invalid row."""
    rows = []
    for where, row in jsonl.read_jsonl(path):
        ids = jsonl.located(where, prompts.format_prompt, row, tokenizer, fmt)
        jsonl.located(where, check_ids, ids, arch)
        rows.append(Prompt(ids, row))
    return rows


def check_ids(ids: np.ndarray, arch: Architecture) -> None:
    """Raise UserError for a prompt [n] that this model cannot continue."""
    check_prompt(ids, arch.max_positions)
    packing.check_ids([Example(ids, np.zeros(len(ids), bool))], arch.vocab_size)


# ---- tasks ---------------------------------------------------------------------------------------


def ask(generator: Generator, ids: np.ndarray, stream: int, samples: int = 1) -> list[Sample]:
    """Sample responses to a prompt [n] and print them on rank 0, token by token if possible. Collective.

    With several copies of the model rank 0 may get the response of another copy, at its end only.
    """
    stop, chat_format = generator.sampling.stop, generator.tokenizer.chat
    held = (*stop, chat_format.end("")) if chat_format else stop  # an end of turn is shown once more follows
    shown, start = Shown(generator.tokenizer, held), time.perf_counter()

    def show(prompt: int, number: int, token: int) -> None:
        emit(shown.add(token), end="")

    streams = samples == 1 and generator.replicas == 1 and parallel.is_main()
    [responses] = generator.generate([ids], [(stream,)], samples, show if streams else None)
    for number, sample in enumerate(responses, start=1):
        if samples > 1:
            emit(f"---- answer {number} of {samples} ({sample.finish}, {len(sample.ids)} tokens)")
        emit(sample.text(generator.tokenizer, generator.sampling.stop)[shown.length :])
    finish = "" if samples > 1 else f"{responses[0].finish}, "
    say(f"({finish}{pace(responses, time.perf_counter() - start)})")
    return responses


def emit(text: str, end: str = "\n") -> None:
    """Print a part of a response on rank 0's stdout. Raises UserError if that fails."""
    if parallel.is_main() and (error := console.write(text, end)):
        raise UserError(f"the answer cannot be printed: {error}; --input and --output write to a file")


def pace(samples: list[Sample], seconds: float) -> str:
    """Number of tokens, and tokens per second, for the log."""
    tokens = sum(len(sample.ids) for sample in samples)
    return f"{tokens:,} tokens, {tokens / seconds:,.1f} tokens/s"


class Shown:
    """Printable part of a growing response: no half of a character, no part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.length = 0  # characters shown

    def add(self, token: int) -> str:
        """Text that becomes printable with the next token."""
        if token not in self.tokenizer.stop_ids:
            self.ids.append(token)
        text = settled(self.tokenizer.decode(self.ids), self.stop)
        # by length: where bytes are decoded together, a line end that is shown may become U+FFFD later
        new = text[self.length :]
        self.length += len(new)
        return new


def settled(text: str, stop: tuple[str, ...]) -> str:
    """The start of an unfinished text that later tokens do not change, before any part of a stop string.

    Tokens may hold a part of a character's bytes, which decode to U+FFFD until the character is complete.
    """
    text = text.rstrip("\ufffd")
    ends = [text.index(end) for end in stop if end in text]
    beginnings = [len(text) - n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])]
    return text[: min(ends + beginnings, default=len(text))]


def respond_to_file(generator: Generator, rows: list[Prompt], output: Path, samples: int) -> None:
    """Sample responses to the rows of --input and write them to --output. Collective."""
    progress = Progress(len(rows), generator.replicas) if parallel.is_main() else None
    start, streams = time.perf_counter(), [(number,) for number in range(len(rows))]
    by_row = generator.generate([row.ids for row in rows], streams, samples, progress)
    responses = [sample for of_row in by_row for sample in of_row]
    say(f"{len(responses):,} responses, {pace(responses, time.perf_counter() - start)}")
    if parallel.is_main():
        lines = []
        for row, of_row in zip(rows, by_row, strict=True):
            texts = [sample.text(generator.tokenizer, generator.sampling.stop) for sample in of_row]
            fields: dict[str, list] = {"response": texts, "finish": [sample.finish for sample in of_row]}
            result = {name: values if samples > 1 else values[0] for name, values in fields.items()}
            lines.append(json.dumps(row.row | result, ensure_ascii=False) + "\n")
        # half of a surrogate pair in a row has no UTF-8 form; its backslash escape is valid JSON
        write_atomically(output, "".join(lines).encode("utf-8", "backslashreplace").decode())
    say(f"the responses are in {output}")


def prepare_output(output: Path, source: Path) -> None:
    """Check that --output can be written, and make its directory. Collective."""
    check_files([output], source)
    if output.exists() and not output.is_file():
        raise UserError(f"--output {output} is no regular file, and a file takes its place: give another")
    parallel.on_main(lambda: output.parent.mkdir(parents=True, exist_ok=True))


class Progress:
    """Log of progress, called for each token of rank 0's copy of the model."""

    def __init__(self, prompts: int, copies: int):
        self.prompts, self.tokens, self.begun = prompts, 0, 0
        self.who = "" if copies == 1 else f" by one of {copies} copies of the model"
        self.start = self.logged = time.perf_counter()

    def __call__(self, prompt: int, number: int, token: int) -> None:
        self.tokens += 1
        self.begun = max(self.begun, prompt + 1)  # prompts are taken in their order
        now = time.perf_counter()
        if now - self.logged >= PROGRESS_S:
            self.logged = now
            speed = self.tokens / (now - self.start)
            say(f"{self.begun:,} of {self.prompts:,} prompts begun, {speed:,.1f} tokens/s{self.who}")


def chat(generator: Generator, fmt: PromptFormat) -> None:
    """Respond to the lines of rank 0's stdin, each with the conversation before it. Collective."""
    history: list[dict[str, str]] = []
    turn, context = 0, generator.policy.arch.max_positions
    say("a line is a message, /new starts over, an empty line ends")
    while line := read_line():
        if line == "/new":
            history = []
            say("a new conversation")
            continue
        history.append({"role": "user", "content": line})
        ids = prompts.format_prompt({"messages": history}, generator.tokenizer, fmt)
        if len(ids) >= context and len(history) > 1:
            say(f"the conversation has {len(ids)} tokens, the model's context {context}: starting over")
            history = history[-1:]
            ids = prompts.format_prompt({"messages": history}, generator.tokenizer, fmt)
        if len(ids) >= context:
            say(f"this message has {len(ids)} tokens, the model's context {context}: it is not asked")
            history = []
            continue
        check_ids(ids, generator.policy.arch)
        [sample] = ask(generator, ids, turn)
        response = sample.text(generator.tokenizer, generator.sampling.stop)
        history.append({"role": "assistant", "content": response})
        turn += 1


def read_line() -> str:
    """The next line of rank 0's stdin on every rank, without spaces around it; empty at the end. Collective.

    A thread reads it, so that collectives meanwhile keep the ranks from a timeout.
    """
    lines: list[bytes] = []
    reader = threading.Thread(target=lambda: lines.append(sys.stdin.buffer.readline()), daemon=True)

    def wait() -> list[bytes]:
        reader.join(POLL_S)
        return lines

    if parallel.is_main():
        console.write("> ", end="", to="stderr")
        reader.start()
    while not (line := parallel.on_main(wait)):
        watchdog.tick("chat")  # a user may take any time
    return line[0].decode("utf-8", "replace").strip()


if __name__ == "__main__":
    launch.run(main, Config)
