"""Run by test_huggingface.py under torchrun: memory that reading a rank's half of a model takes, to files."""

import json
import os
import re
import sys
from pathlib import Path

from align.distributed import parallel
from align.model import architecture, config, gpt, huggingface


def private_bytes() -> int:
    """Memory of this process that is not a mapped file, whose pages the kernel may drop at any time.

    align.distributed.megatron_on_cpu keeps freed memory, so this is also the largest value so far.
    """
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


directory, output = map(Path, sys.argv[1:])
layout = parallel.ParallelConfig(tp=2)
with parallel.start(layout):
    arch = architecture.read_config(directory)
    before = private_bytes()
    policy = gpt.build_policy(arch, config.ModelConfig(str(directory), "fp32"), layout)
    huggingface.load(policy, huggingface.open_source(directory, arch, 0))
    peak = private_bytes() - before
    shard = sum(parameter.nbytes for parameter in policy.parameters())
    (output / f"{os.environ['RANK']}.json").write_text(json.dumps({"shard": shard, "peak": peak}))
