# shellcheck shell=bash
# Is every GPU of this node there, sound and free? launch.sh runs it on each node before training starts:
# a run over many nodes is as fast as its slowest GPU and fails with the first that fails.
# Argument: how many GPUs there must be. Ends with status 1, and the node's name on each line, if they are not.

set -euo pipefail

wanted=$1
busy_mib=${BUSY_MIB:-2048} # used memory from which on a GPU is somebody else's
sound=1

problem() {
    echo "$(hostname): $*" >&2
    sound=0
}

ours=(${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"}) # others of a shared node are not our concern
if ! rows=$(nvidia-smi "${ours[@]}" --query-gpu=index,memory.used,ecc.errors.uncorrected.volatile.total \
    --format=csv,noheader,nounits); then
    problem "nvidia-smi fails: $rows"
    exit 1
fi
found=0
while IFS=', ' read -r index used errors; do
    found=$((found + 1))
    if [[ $used =~ ^[0-9]+$ ]] && ((used > busy_mib)); then
        problem "GPU $index: $used MiB are in use by others (BUSY_MIB=$busy_mib)"
    fi
    if [[ $errors =~ ^[0-9]+$ ]] && ((errors > 0)); then # [N/A] without error correction
        problem "GPU $index: $errors uncorrected memory errors since its last reset"
    fi
done <<<"$rows"
if ((found < wanted)); then
    problem "$found GPUs of $wanted answer"
fi
((sound)) || exit 1
echo "$(hostname): $found GPUs, sound and free"
