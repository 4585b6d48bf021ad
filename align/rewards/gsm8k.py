"""A reward that can be checked: does a response to a GSM8K question arrive at its answer?

Rows come from `prepare_data.py gsm8k`, which leaves the number that follows #### in their field "answer".
Answers are read and compared by the package math-verify: fractions, LaTeX, units, thousands separators.
"""

import re
import threading

TIME_LIMIT_S = 2  # of reading, and of comparing; in the main thread only, as math-verify uses signals


def reward(prompt: str, response: str, row: dict) -> float:
    """1 if the answer of the response equals the row's "answer", else 0.

    The answer is what follows the last ####, to the end of its line; without one, what math-verify finds:
    what is \\boxed, else the last expression.
    """
    # here, so that sympy is imported in runs with this reward only
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    limit = TIME_LIMIT_S if threading.current_thread() is threading.main_thread() else None
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    right, found = (
        parse(plain(text), kinds, parsing_timeout=limit) for text in (str(row["answer"]), response)
    )
    return float(bool(found) and verify(right, found, timeout_seconds=limit))


def plain(text: str) -> str:
    """The part of a text that holds its answer, with signs as math-verify reads them."""
    text = text.rpartition("####")[2].partition("\n")[0] if "####" in text else text
    text = text.replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    return re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)  # .5 as 0.5
