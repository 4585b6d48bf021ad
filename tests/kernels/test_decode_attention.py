"""Attention while decoding on GPUs: its kernels in Triton's interpreter, and compiled for an H100."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.support.files import ROOT
from tests.support.launch import environment

triton = pytest.importorskip("triton", reason="Triton is for Linux: tests/requirements.txt")

SHARED_BYTES = 227 * 1024  # of a multiprocessor's memory that a program can have
TOLERANCE = {"float32": 2e-6, "float16": 4e-3}  # of outputs of about 1


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list]:
    """Results of workers/decode_attention.py; the interpreter must be chosen before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "tests/workers/decode_attention.py"],
        cwd=ROOT,
        env=environment() | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_attention_is_that_of_loops_in_float64(interpreted):
    """1 to 16 queries of a group, d 8 to 256, windows, lengths from 1 to all there is room for."""
    for *case, dtype, result in interpreted["attend"]:
        assert result["error"] <= TOLERANCE[dtype], (case, dtype, result)
    assert len(interpreted["attend"]) == 22


@pytest.mark.slow
def test_keys_are_divided_evenly_by_the_length_of_each_sequence(interpreted):
    """As many programs have keys as there can be with 256 each, in whole blocks; 16 in the short cases."""
    for lengths, _, d, window, programs, dtype, result in interpreted["attend"]:
        long, width = max(lengths) > 288, max(triton.next_power_of_2(d), 16)
        block = min(max(8192 // (width * (4 if dtype == "float32" else 2)), 16), 128)
        least = 256 if long else 16
        most = programs // (2 * len(lengths)) or 1
        most = min(most, math.ceil(min(max(lengths), (window or 10**6) + block) / least))
        for length, parts in zip(lengths, result["parts"], strict=True):
            first = max(length - window, 0) // block * block if window else 0
            blocks_each = max(math.ceil((length - first) / most / block), least // block, 1)
            assert parts == math.ceil((length - first) / (blocks_each * block))
    assert [1, 1, 1, 3, 8, 9, 9, 9] in [result["parts"] for *_, result in interpreted["attend"]]
    assert interpreted["attend"][16][-1]["parts"] == [4, 32]  # 1,000 and 8,192 keys


@pytest.mark.slow
def test_keys_and_values_are_kept_in_their_places(interpreted):
    """And queries and keys rotated, those of views of one product; nothing else of the cache is touched."""
    for queries, d, dtype, error in interpreted["append"]:
        assert error <= (1e-6 if dtype == "float32" else 0.04), (queries, d, dtype)
    assert len(interpreted["append"]) == 18


@pytest.mark.parametrize(
    ("sequences", "keys", "expected"),
    [
        (1, 256, 1),  # not below 256 keys each
        (1, 257, 2),
        (8, 8192, 32),
        (8, 32768, 64),  # no more
        (64, 8192, 12),
        (256, 8192, 3),
        (792, 8192, 1),
        (4096, 8192, 1),
    ],
)
def test_number_of_programs_that_share_keys(sequences, keys, expected):
    from align.kernels import decode_attention

    assert decode_attention.num_splits(sequences, keys) == expected  # of 6 x 132


# ---- the real compiler ---------------------------------------------------------------------------


def compiled(kernel: "triton.JITFunction", dtype: str, **constants: object) -> "triton.CompiledKernel":
    """A kernel as machine code of an H100 (sm_90), for pointers and strides that are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = {"positions": "*i64", "partial": "*fp32", "scale": "fp32"}
    known |= {name: f"*{dtype}" for name in ("query", "cache", "out", "qk", "v", "cos", "sin")}
    types = {name: known.get(name, "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name] not in ("constexpr", "fp32") and name not in ("splits", "qk_row")
    }
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there is nothing to compile then")
@pytest.mark.parametrize(
    ("dtype", "queries", "d"), [("bf16", 3, 64), ("bf16", 2, 24), ("bf16", 16, 256), ("fp32", 4, 128)]
)
def test_kernels_compile_for_an_h100(dtype, queries, d, tmp_path, monkeypatch):
    """They fit into a multiprocessor, and keys come through asynchronous copies of 16 bytes."""
    from align.kernels import decode_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    width = triton.next_power_of_2(d)
    block = min(decode_attention.TILE // (width * (2 if dtype == "bf16" else 4)), 128)
    shape = dict(QUERIES=queries, D=d, ROWS=16, WIDTH=width, LEAST=256)
    rows = dict(ROWS=queries + 1, HALF=d // 2, HALF_BLOCK=triton.next_power_of_2(d // 2))
    rows["ROW_BLOCK"] = triton.next_power_of_2(queries + 1)
    divided = compiled(decode_attention.attend_kernel, dtype, **shape, BLOCK=block, WINDOW=0)
    whole = compiled(decode_attention.attend_kernel, dtype, **shape, BLOCK=block, WINDOW=40, partial=None)
    for kernel in (divided, whole):
        assert kernel.asm["cubin"] and kernel.metadata.shared < SHARED_BYTES
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"]
    for kernel in (
        compiled(decode_attention.combine_kernel, dtype, D=d, WIDTH=width, MOST=decode_attention.MOST),
        compiled(decode_attention.append_kernel, dtype, **rows),
    ):
        assert kernel.asm["cubin"]
