"""Run by test_generate_script.py: generate.py several times in one start, and what it prints to a file."""

import contextlib
import io
import json
import sys
from pathlib import Path

import tyro

import generate
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from tests.support import grids


def run(flags: list[str], typed: str) -> tuple[str, str]:
    """stdout and stderr of generate.py with these flags and this stdin."""
    config = tyro.cli(generate.Config, args=flags, config=(tyro.conf.OmitArgPrefixes,))
    grids.change(config.parallel)
    out, shown = io.StringIO(), io.StringIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode()))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(shown):
        generate.main(config)
    return out.getvalue(), shown.getvalue()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with parallel.start(ParallelConfig()):
        commands = json.loads((folder / "commands.json").read_text())
        printed = {name: run(*command) for name, command in commands.items()}
        if parallel.is_main():
            (folder / "found.json").write_text(json.dumps(printed))
