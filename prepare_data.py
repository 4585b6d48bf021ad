"""Raw data sets to the jsonl that training reads: files that you have, or public ones, downloaded.

python prepare_data.py dolly --download --output data/dolly
python prepare_data.py oasst --download --output data/oasst
python prepare_data.py gsm8k --download --output data/gsm8k
python prepare_data.py hh --download --output data/hh
python prepare_data.py dolly --input databricks-dolly-15k.jsonl --output data/dolly
python prepare_data.py oasst --input 2023-04-12_oasst_all.trees.jsonl.gz --output data/oasst
python prepare_data.py gsm8k --input gsm8k_train.jsonl.gz --output data/gsm8k_train.jsonl
python prepare_data.py hh --input train.jsonl.gz --test-input test.jsonl.gz --output data/hh
python prepare_data.py judge --input data/gsm8k_train.jsonl --output data/gsm8k_judge.jsonl
python prepare_data.py toy --output data/toy

--download fetches what is not in data/raw yet; addresses and sha256 are in align/data/download.py.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import tyro

from align import console
from align.data import toy as toy_task
from align.data.download import fetch
from align.data.jsonl import located, read_jsonl, text_field
from align.data.marker_chat import check_conversation, trained_turns
from align.data.rows import sft_row
from align.data.templates import Template
from align.data.toy import comparisons, toy_rows, write_templates
from align.errors import UserError, one_line
from align.files import check_files
from align.judging.render import as_text, conversations_turns, last_response, messages_turns, turn_of

ROOT = Path(__file__).parent
RAW = Path("data/raw")
OASST_ROLES = {"prompter": "User", "assistant": "Assistant"}
OASST_LABELS = ("quality", "toxicity", "humor", "creativity")
OASST_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HHSet = Literal["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
JUDGEMENTS = {  # of the row's own response, of its first half, with other numbers, of another row's
    "own": "The response answers the question in full.\nScore: 5",
    "half": "The response begins well, but it stops before it has answered the question.\nScore: 2",
    "numbers": "The response looks right, but its numbers do not follow from the question.\nScore: 1",
    "other": "The response is about something else.\nScore: 0",
}
HH_LABELS = {"user": "User:", "assistant": "Assistant:"}


def main() -> None:
    """Run the subcommand named on the command line."""
    console.adapt()
    commands: list[Callable] = [dolly, oasst, gsm8k, hh, judge, toy]
    with one_line():
        tyro.extras.subcommand_cli_from_dict({command.__name__: command for command in commands})


def check_source(input: object, download: bool, **about_download: object) -> None:
    """Raise UserError unless one of --input and --download is given; other flags are about the latter."""
    if bool(input) == download:
        raise UserError("give either --input FILE or --download, which fetches the public file")
    for name, value in about_download.items():
        if value and not download:
            raise UserError(f"--{name.replace('_', '-')} has no effect without --download: leave it out")


def raw_file(name: str, input: Path | None, download: bool, download_dir: Path | None) -> Path:
    """Return --input, or the path of the public file `name` (--download). Raises UserError without either."""
    check_source(input, download, download_dir=download_dir)
    return input or fetch(name, download_dir or RAW)


def dolly(
    input: Path | None = None,
    output: Path = tyro.MISSING,
    val_fraction: float = 0.05,
    seed: int = 1234,
    download: bool = False,
    download_dir: Path | None = None,
) -> None:
    """databricks-dolly-15k to {"input", "output", "category"}: instruction and context in random order.

    Args:
        input: databricks-dolly-15k.jsonl, plain or .gz
        output: directory for train.jsonl and val.jsonl
        val_fraction: share of the rows that goes to val.jsonl
        seed: of the order of rows and of the order inside a row
        download: fetch databricks-dolly-15k.jsonl (13 MB) in place of --input
        download_dir: directory of raw files; one that is there is not downloaded again; without it data/raw
    """
    raw = raw_file("databricks-dolly-15k.jsonl", input, download, download_dir)
    check_files([output / "train.jsonl", output / "val.jsonl"], raw)
    rng = random.Random(seed)
    rows = [located(where, dolly_row, row, rng) for where, row in read_jsonl(raw)]
    rng.shuffle(rows)
    write_split(output, *split(rows, val_fraction))


def dolly_row(row: dict, rng: random.Random) -> dict:
    """One row; instruction and context are joined by a blank line, an empty context is left out."""
    instruction, context = text_field(row, "instruction"), text_field(row, "context").strip()
    parts = [instruction, context] if context else [instruction]
    rng.shuffle(parts)
    return {
        "input": "\n\n".join(parts),
        "output": text_field(row, "response"),
        "category": text_field(row, "category"),
    }


def oasst(
    input: Path | None = None,
    output: Path = tyro.MISSING,
    val_fraction: float = 0.05,
    seed: int = 10,
    download: bool = False,
    download_dir: Path | None = None,
) -> None:
    """OpenAssistant trees to {"system", "conversations", "mask", "type"}: every thread, with its labels.

    Args:
        input: 2023-04-12_oasst_all.trees.jsonl.gz
        output: directory for train.jsonl and val.jsonl
        val_fraction: share of the trees whose threads go to val.jsonl
        seed: of the order of trees
        download: fetch 2023-04-12_oasst_all.trees.jsonl.gz of OpenAssistant/oasst1 in place of --input
        download_dir: directory of raw files; one that is there is not downloaded again; without it data/raw
    """
    raw = raw_file("2023-04-12_oasst_all.trees.jsonl.gz", input, download, download_dir)
    check_files([output / "train.jsonl", output / "val.jsonl"], raw)
    trees = [located(where, oasst_rows, row) for where, row in read_jsonl(raw)]
    random.Random(seed).shuffle(trees)
    train, val = split(trees, val_fraction)
    write_split(output, [row for tree in train for row in tree], [row for tree in val for row in tree])


def oasst_rows(tree: dict) -> list[dict]:
    """The threads of one tree from root to leaf, without those of a single message."""
    root = tree.get("prompt")
    if not isinstance(root, dict):
        raise UserError("field 'prompt' must be the object at the root of a message tree")
    return [
        {"system": OASST_SYSTEM, "mask": "User", "type": "VALUE_TO_TEXT", "conversations": thread}
        for thread in oasst_threads(root)
        if len(thread) > 1
    ]


def oasst_threads(message: dict) -> Iterator[list[dict]]:
    """All threads from `message` down to a leaf, as lists of {"from", "value", "label"}."""
    role = text_field(message, "role")
    if role not in OASST_ROLES:
        raise UserError(f"role {role!r} is not one of {', '.join(OASST_ROLES)}")
    label = oasst_label(message.get("labels") or {}) if role == "assistant" else None
    turn = {"from": OASST_ROLES[role], "value": text_field(message, "text"), "label": label}
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise UserError("field 'replies' must be a list of messages")
    for reply in replies:
        for thread in oasst_threads(reply):
            yield [turn, *thread]
    if not replies:
        yield [turn]


def oasst_label(labels: dict) -> str | None:
    """Mean labels from 0..1 to "quality:4,toxicity:0,..." on a scale of 0..4; None if a message has none."""
    scaled = []
    for name in OASST_LABELS:
        if name in labels:
            value = labels[name].get("value") if isinstance(labels[name], dict) else None
            if not isinstance(value, int | float):
                raise UserError(f"label {name!r} must hold a number in 'value'")
            scaled.append(f"{name}:{round(4 * value)}")
    return ",".join(scaled) or None


def gsm8k(
    input: Path | None = None,
    output: Path = tyro.MISSING,
    limit: int | None = None,
    instruction: str = "",
    download: bool = False,
    download_dir: Path | None = None,
) -> None:
    """GSM8K {"question", "answer"} to {"messages", "answer"}: a chat, and the number that it arrives at.

    Args:
        input: train.jsonl or test.jsonl of grade-school-math, plain or .gz
        output: the jsonl file to write; with --download the directory of train.jsonl and test.jsonl
        limit: only so many rows, from the start of a file
        instruction: text that follows each question, after a blank line
        download: fetch train.jsonl and test.jsonl (5 MB) in place of --input
        download_dir: directory of raw files; one that is there is not downloaded again; without it data/raw
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} must be at least 1")
    check_source(input, download, download_dir=download_dir)
    if download and output.suffix == ".jsonl":
        raise UserError(f"--output {output}: with --download it is the directory of train and test.jsonl")
    files = [(input, output)] if input else []
    for part in ("train", "test") if download else ():
        files.append((fetch(f"gsm8k_{part}.jsonl", download_dir or RAW), output / f"{part}.jsonl"))
    check_files([path for _, path in files], *(source for source, _ in files))
    for source, path in files:
        rows = [
            located(where, gsm8k_row, row, instruction) for where, row in list(read_jsonl(source))[:limit]
        ]
        write_jsonl(path, rows)


def gsm8k_row(row: dict, instruction: str) -> dict:
    """A chat of two messages; `answer`, for reward functions, is what follows "####", without commas."""
    question, solution = text_field(row, "question"), text_field(row, "answer")
    answer = solution.rpartition("####")[2].strip().replace(",", "") if "####" in solution else ""
    if not answer:
        raise UserError("field 'answer' must end with '####' and the final answer")
    prompt = f"{question}\n\n{instruction}" if instruction else question
    return {**toy_task.chat(prompt, solution), "answer": answer}


def hh(
    input: tuple[Path, ...] = (),
    output: Path = tyro.MISSING,
    test_input: tuple[Path, ...] = (),
    test_fraction: float | None = None,
    style: Literal["messages", "text"] = "messages",
    seed: int = 1234,
    download: bool = False,
    sets: tuple[HHSet, ...] = (),
    download_dir: Path | None = None,
) -> None:
    """Anthropic's HH-RLHF {"chosen", "rejected"} to {"prompt", "chosen", "rejected"} and to prompts alone.

    Rows that open with the same human message are of one conversation, at several depths or with several
    responses; all of them are on one side of the split.

    Args:
        input: train.jsonl of one or several of its sets, plain or .gz
        output: directory for train_ and test_comparisons.jsonl, train_ and test_prompts.jsonl
        test_input: the test set; rows of --input that open like one of its conversations are dropped
        test_fraction: without a test set, share of the conversations that is held out (default: 0.1)
        style: chat messages, or text that reads "User: ... Assistant: ..."
        seed: of the choice of conversations that are held out
        download: fetch train and test files of --sets in place of --input and --test-input
        sets: with --download, the sets to fetch (default: all four, 79 MB, 160,800 and 8,552 pairs)
        download_dir: directory of raw files; one that is there is not downloaded again; without it data/raw
    """
    check_source(input, download, sets=sets, download_dir=download_dir)
    if download and test_input:
        raise UserError("--test-input: --download fetches the test set too, give one of them")
    if (download or test_input) and test_fraction is not None:
        rule = "--test-input or --download is the test set, give one of them"
        raise UserError(f"--test-fraction {test_fraction}: {rule}")
    if download:
        names = [f"hh_{name}" for name in dict.fromkeys(sets or get_args(HHSet))]
        raw = download_dir or RAW
        input = tuple(fetch(f"{name}_train.jsonl.gz", raw) for name in names)
        test_input = tuple(fetch(f"{name}_test.jsonl.gz", raw, "--test-input") for name in names)
    parts = [f"{part}_{kind}.jsonl" for part in ("train", "test") for kind in ("comparisons", "prompts")]
    check_files([output / name for name in parts], *input, *test_input)
    pairs = hh_pairs(input)
    if test_input:
        test = hh_pairs(test_input)
        openings = {hh_opening(pair) for pair in test}
    else:
        shuffled = list(dict.fromkeys(map(hh_opening, pairs)))
        random.Random(seed).shuffle(shuffled)
        fraction = 0.1 if test_fraction is None else test_fraction
        openings = set(split(shuffled, fraction, "--test-fraction")[1])
        test = [pair for pair in pairs if hh_opening(pair) in openings]
    train = [pair for pair in pairs if hh_opening(pair) not in openings]
    if test_input:
        console.write(f"dropped from --input: {len(pairs) - len(train)} that open like a row of --test-input")
    if not train or not test:
        raise UserError(f"{output}: {len(train)} pairs to train on and {len(test)} to test: both need some")
    for name, part in (("train", train), ("test", test)):
        rows = [hh_row(*pair, style) for pair in part]
        prompts = {json.dumps(row["prompt"]): {"prompt": row["prompt"]} for row in rows}
        write_jsonl(output / f"{name}_comparisons.jsonl", rows)
        write_jsonl(output / f"{name}_prompts.jsonl", list(prompts.values()))


def hh_pairs(paths: tuple[Path, ...]) -> list[tuple[list[dict], list[dict]]]:
    """Chosen and rejected conversation of each row without a flaw; the numbers of flaws are printed."""
    pairs, flaws = [], Counter[str | None]()
    for where, row in (numbered for path in paths for numbered in read_jsonl(path)):
        texts = [located(where, text_field, row, name) for name in ("chosen", "rejected")]
        chosen, rejected = map(hh_messages, texts)
        flaw = hh_flaw(chosen, rejected)
        flaws[flaw] += 1
        if flaw is None:
            pairs.append((chosen, rejected))
    dropped = ", ".join(f"{count} {flaw}" for flaw, count in flaws.items() if flaw) or "none"
    console.write(f"{', '.join(map(str, paths))}: {flaws.total()} pairs, dropped: {dropped}")
    return pairs


def hh_messages(text: str) -> list[dict]:
    """The turns of a text as messages, stripped; none if it does not begin with a turn."""
    start, *turns = re.split(r"\n\n(Human|Assistant):", text)
    pairs = zip(turns[::2], turns[1::2], strict=True)
    messages = [{"role": HH_ROLES[role], "content": content.strip()} for role, content in pairs]
    return [] if start.strip() else messages


def hh_flaw(chosen: list[dict], rejected: list[dict]) -> str | None:
    """Reason to drop a pair, or None."""
    for messages in (chosen, rejected):
        roles = [message["role"] for message in messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            return "in which turns do not alternate"
    if chosen[:-1] != rejected[:-1]:
        return "with different prompts"
    if not all(message["content"] for message in chosen[::2]):
        return "with an empty question"
    return "with identical answers" if chosen == rejected else None


def hh_opening(pair: tuple[list[dict], list[dict]]) -> str:
    """The first human message, which tells conversations apart."""
    return pair[0][0]["content"]


def hh_row(chosen: list[dict], rejected: list[dict], style: Literal["messages", "text"]) -> dict:
    """A pair as a row. In text a response starts with its space: so a prompt has the same tokens in
    comparisons and in generation."""
    if style == "messages":
        return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    prompt = "".join(f"{HH_LABELS[turn['role']]}{spaced(turn['content'])}\n\n" for turn in chosen[:-1])
    return {
        "prompt": prompt + HH_LABELS["assistant"],
        "chosen": spaced(chosen[-1]["content"]),
        "rejected": spaced(rejected[-1]["content"]),
    }


def spaced(content: str) -> str:
    """`content` after a space; nothing if it is empty."""
    return f" {content}" if content else ""


def judge(
    input: Path,
    output: Path,
    judge_template: Path = ROOT / "assets" / "judge.txt",
    limit: int | None = None,
    seed: int = 1234,
) -> None:
    """Chats to judgements of good and of spoilt responses, which teach a model to judge.

    Of each row one response is judged: its own (5 points), its own without the second half (2), its own with
    other numbers (1) or the response of another row (0). Fine-tuned on these rows beside its usual ones, a
    small model learns what a judgement looks like, and little more about what a good response is.

    Args:
        input: rows of {"messages"} or {"conversations"}, whose last response is judged
        output: the jsonl file to write, in the format of the input
        judge_template: that of train_self_reward.py
        limit: only so many rows, from the start of the file
        seed: of which response to which row is judged
    """
    check_files([output], input, judge_template)
    template = Template(judge_template, "--judge-template", ("prompt", "response"))
    rows = []
    for where, row in list(read_jsonl(input))[:limit]:
        rows.append(located(where, sft_row, row, ())[0])
        located(where, question_and_response, rows[-1])  # it can be judged
    if len(rows) < 2:
        raise UserError(f"--input {input} has {len(rows)} rows: a response is judged beside another row's")
    rng = random.Random(seed)
    write_jsonl(output, [judged(rows, i, template, rng) for i in range(len(rows))])


def question_and_response(row: dict) -> tuple[str, str]:
    """Question of a chat's last turn as text for a judge, and the response. Raises UserError."""
    if "conversations" in row:
        kind, masked, turns = check_conversation(row)
        if kind == "TEXT_TO_VALUE":
            raise UserError("field 'type': responses of TEXT_TO_VALUE rows are labels, which are not judged")
        return as_text(conversations_turns(row)), turns[last_response(trained_turns(kind, masked, turns))][1]
    if "messages" not in row:
        raise UserError("a row must have 'messages' or 'conversations' with a response")
    question, last = as_text(messages_turns(row)), row["messages"][-1]
    if last["role"] != "assistant":
        raise UserError(f"the last message is of the role {last['role']!r}: it must be the response")
    return question, last["content"]


def judged(rows: list[dict], i: int, template: Template, rng: random.Random) -> dict:
    """A chat in which the response of row `i`, as it is or spoilt, is judged."""
    question, response = question_and_response(rows[i])
    words = response.split(" ")
    kinds = {"own": response, "half": " ".join(words[: len(words) // 2])}
    number = rng.randrange(len(rows) - 1)
    kinds["other"] = question_and_response(rows[number + (number >= i)])[1]  # of another row
    kinds["numbers"] = re.sub(r"\d", lambda digit: rng.choice("0123456789".replace(digit[0], "")), response)
    changed = [name for name, text in kinds.items() if text not in ("", response)]
    kind = rng.choice(["own", *changed])
    prompt = template.fill(prompt=question, response=kinds[kind])
    if "conversations" in rows[i]:
        chat = turn_of(rows[i], prompt)
        chat["conversations"][-1]["value"] = JUDGEMENTS[kind]
        return chat
    return toy_task.chat(prompt, JUDGEMENTS[kind])


def toy(
    output: Path,
    train_rows: int = 4000,
    val_rows: int = 200,
    mistakes: float = 0.4,
    train_comparisons: int = 2000,
    val_comparisons: int = 200,
    judge_rows: int = 5000,
    meta_rows: int = 3000,
    seed: int = 1234,
) -> None:
    """The sorting task of the demo as {"messages"} rows, as comparisons and as judgements of responses.

    No prompt occurs twice. judge.txt and meta_judge.txt are the templates of the judgements' questions.

    Args:
        output: directory for train.jsonl, val.jsonl, train_comparisons.jsonl, val_comparisons.jsonl,
            train_judge.jsonl, judge.txt and meta_judge.txt
        train_rows: rows of train.jsonl
        val_rows: rows of val.jsonl, all with right responses
        mistakes: share of the responses in train.jsonl that have two neighbours swapped
        train_comparisons: rows of train_comparisons.jsonl, each a right response and one with such a mistake
        val_comparisons: rows of val_comparisons.jsonl
        judge_rows: rows of train_judge.jsonl that give a response a score
        meta_rows: rows of train_judge.jsonl, between the others, that choose the right one of two judgements
        seed: of the prompts and the mistakes
    """
    rows = toy_rows(train_rows, val_rows, mistakes, seed)
    after = train_rows + val_rows
    pairs = comparisons(train_comparisons, val_comparisons, seed, after)
    after += train_comparisons + val_comparisons
    judgements = toy_task.judge_rows(judge_rows, seed, after)
    judgements += toy_task.meta_rows(meta_rows, seed, after + judge_rows)
    random.Random(seed).shuffle(judgements)
    write_split(output, *rows)
    write_split(output, *pairs, suffix="_comparisons")
    write_jsonl(output / "train_judge.jsonl", judgements)
    write_templates(output)


def split(items: list, fraction: float, flag: str = "--val-fraction") -> tuple[list, list]:
    """Items to train on and, from the end, to validate on. Raises UserError if one part would be empty."""
    num_train = int(len(items) * (1 - fraction))
    if not 0 < num_train < len(items):
        raise UserError(f"{flag} {fraction} of {len(items)} must leave some to train and to validate on")
    return items[:num_train], items[num_train:]


def write_split(directory: Path, train: list[dict], val: list[dict], suffix: str = "") -> None:
    """Write train{suffix}.jsonl and val{suffix}.jsonl. Raises UserError if one would be empty."""
    if not train or not val:
        counts = f"{len(train)} rows to train on and {len(val)} to validate on"
        raise UserError(f"{directory}: {counts}: both need some")
    write_jsonl(directory / f"train{suffix}.jsonl", train)
    write_jsonl(directory / f"val{suffix}.jsonl", val)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one object a line, and print the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    console.write(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
