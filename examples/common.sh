# shellcheck shell=bash
# Sourced by the scripts beside it. Settings are variables of the environment, paths from the project's root:
OUTPUT=${OUTPUT:-runs/examples} # prepared data, and a directory per run
DATA=${DATA:-}                  # directory of raw files that you have, in place of downloads
DEVICES=${DEVICES:-1}           # trainer.devices=8; one process uses all cores of a CPU. num_nodes: slurm/README.md
PRECISION=${PRECISION:-auto}    # trainer.precision=bf16; auto: bf16 on GPUs, fp32 on CPUs (many are slow in bf16)
VENV=${VENV:-}                  # a Python environment of your own (default: .venv, made by make)

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n $VENV ]] || make --silent .venv/ready
PATH=$(realpath "${VENV:-.venv}")/bin:$PATH

# SFT tutorial, 'Prerequisite: Obtaining a pretrained model': sets MODEL, which is smollm2 (135M parameters; the
# default), tiny (random weights, a token is a byte) or a Hugging Face directory, or makes it of a .nemo archive.
obtain_model() {
    MODEL=${MODEL:-smollm2}
    if [[ -n ${NEMO:-} ]]; then # such as GPT-2B-001_bf16_tp1.nemo; tar -xvf and convert_gpt_nemo_to_mcore.py
        MODEL=models/$(basename "$NEMO" .nemo)
        [[ -d $MODEL ]] || python -m tools.prepare_model nemo --input "$NEMO" --output "$MODEL"
    elif [[ $MODEL == smollm2 ]]; then # convert_llama_hf_to_nemo.py: a Hugging Face directory needs no conversion
        MODEL=models/smollm2-135m-instruct
        python -m tools.smollm2 --output "$MODEL"
    fi
}

# metrics RUN NAME...: the values of metrics in RUN/metrics.jsonl, in order, as wandb would plot them.
metrics() {
    python - "$@" <<'END'
import json, pathlib, sys
rows = [json.loads(line) for line in pathlib.Path(sys.argv[1], "metrics.jsonl").read_text().splitlines()]
for name in sys.argv[2:]:
    print(f"{name}:", " -> ".join(f"{row[name]:.4g}" for row in rows if name in row) or "no step has it")
END
}
