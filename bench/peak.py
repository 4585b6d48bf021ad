"""The ceiling of the matrix unit: measured matrix-multiply rates for the shapes of SmolLM2-135M.

A training step cannot run faster than its matrix multiplications, so the benchmarks state every trainer's
speed as a share of this ceiling too.

    python bench/peak.py --threads 1
"""

import time

import torch
import tyro

TOKENS = 1024
SHAPES = {
    "attention q, k, v": (576, 960),
    "attention output": (576, 576),
    "mlp gate, up": (576, 3072),
    "mlp gate or up": (576, 1536),
    "mlp down": (1536, 576),
    "head": (576, 49152),
}
"""Input and output features of the linear layers, each of which multiplies TOKENS rows."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gemm_peak(dtype: str, threads: int) -> float:
    """Return the highest rate among SHAPES in GFLOP/s. `dtype` is fp32 or bf16."""
    return max(gemm_rate(shape, dtype, threads) for shape in SHAPES.values())


def gemm_rate(shape: tuple[int, int], dtype: str, threads: int, repeats: int = 15) -> float:
    """Return the rate of one linear layer in GFLOP/s: the fastest of `repeats` calls.

    One thread is timed by its own CPU seconds, so that other jobs on the machine do not count; several by
    the wall clock, which needs a quiet machine. Sets torch's number of threads.
    """
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    inputs, outputs = shape
    x = torch.randn(TOKENS, inputs).to(DTYPES[dtype])
    weight = torch.randn(outputs, inputs).to(DTYPES[dtype])
    seconds = []
    for _ in range(repeats):
        start = clock()
        torch.nn.functional.linear(x, weight)
        seconds.append(clock() - start)
    return 2 * TOKENS * inputs * outputs / min(seconds) / 1e9


def main(threads: int = 1) -> None:
    """Print the rate of every shape in fp32 and bf16.

    Args:
        threads: CPU threads to use.
    """
    print(f"matrix multiply of {TOKENS} rows, {threads} thread(s), GFLOP/s")
    print(f"{'layer':<20}{'in x out':>14}{'fp32':>8}{'bf16':>8}")
    for name, shape in SHAPES.items():
        rates = [gemm_rate(shape, dtype, threads) for dtype in DTYPES]
        print(f"{name:<20}{shape[0]:>6} x {shape[1]:<5}{rates[0]:>8.0f}{rates[1]:>8.0f}")


if __name__ == "__main__":
    tyro.cli(main)
