#!/usr/bin/env bash
# Everything that asks a GPU, in under nine minutes and without a network: `bash benchmarks/gpu.sh` (docs/gpu.md).
# What is missing of the wheels in ./wheels is installed first; the rest is `benchmarks/gpu.py`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if compgen -G "wheels/*.whl" >/dev/null; then
    names=()
    for wheel in wheels/*.whl; do
        name=${wheel##*/}
        names+=("${name%%-*}") # by name: what the machine has already stays as it is
    done
    PIP_BREAK_SYSTEM_PACKAGES=1 "$python" -m pip install -q --no-index --no-deps --find-links wheels "${names[@]}"
fi
export PYTHONPATH="$PWD:$PWD/kernels"
exec "$python" benchmarks/gpu.py "$@"
