"""Verifiable reward for GSM8K: 1 for a response with the right final answer, else 0.

Rows are those of `prepare_data.py gsm8k`, with the number after #### in their field "answer". The package
math-verify parses and compares answers: fractions, LaTeX, units, thousands separators.
"""

import re
import threading

TIME_LIMIT_S = 2  # of parsing, and of comparing; in the main thread only, as math-verify uses signals


def reward(prompt: str, response: str, row: dict) -> float:
    """1 if the answer of the response equals the row's "answer", else 0.

    The answer is the rest of the line after the last ####; without one, math-verify's choice: the \\boxed
    expression, else the last one.
    """
    # here: only runs with this reward import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    limit = TIME_LIMIT_S if threading.current_thread() is threading.main_thread() else None
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    texts = (str(row["answer"]), response)
    right, answer = (parse(plain(text), kinds, parsing_timeout=limit) for text in texts)
    return float(bool(answer) and verify(right, answer, timeout_seconds=limit))


def plain(text: str) -> str:
    """The part of a text with its answer, in signs that math-verify parses."""
    text = text.rpartition("####")[2].partition("\n")[0] if "####" in text else text
    text = text.replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    return re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)  # .5 as 0.5
