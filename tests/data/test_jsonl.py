"""Files of JSON lines, plain and compressed."""

import gzip
import json
from pathlib import Path

import pytest

from align.data import jsonl
from align.errors import UserError


def test_broken_gzip(tmp_path: Path):
    whole = gzip.compress(b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(1000)))
    spoilt = whole[:200] + bytes(200) + whole[400:]
    for content in (b'{"not": "gzip"}', whole[: len(whole) // 2], spoilt):
        (tmp_path / "d.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="d.jsonl.gz: cannot be read"):
            list(jsonl.read_jsonl(tmp_path / "d.jsonl.gz"))


def test_read_jsonl(tmp_path: Path):
    text = '{"n": 1}\n\n  \n{"n": "\\u00e9é"}'
    (tmp_path / "d.jsonl").write_text(text)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("d.jsonl", "d.jsonl.gz"):
        path = tmp_path / name
        assert list(jsonl.read_jsonl(path)) == [(f"{path}:1", {"n": 1}), (f"{path}:4", {"n": "éé"})]
