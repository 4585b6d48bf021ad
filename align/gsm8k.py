"""A reward that can be checked: does a response to a GSM8K question arrive at its answer?

Rows come from `prepare_data.py gsm8k`, which leaves the number that follows #### in their field "answer".
"""

import re

NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")  # 10-4 holds 10 and 4, no -4


def reward(prompt: str, response: str, row: dict) -> float:
    """1 if the last number of the response is the row's answer, else 0."""
    return float(last_number(response) == float(row["answer"]))


def last_number(text: str) -> float | None:
    """The last number in a text, without its thousands separators; None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
