#!/usr/bin/env bash
# The whole way from nothing to a report, on the mini preset: data, four stages, evaluation.
# WORK is the folder everything goes into; run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
work="${WORK:-work/demo}"

for part in pipeline/model_index.json text_adapter.safetensors mllm/config.json judge.safetensors; do
    if [[ ! -f src/prefgen/assets/mini/$part ]]; then
        echo "demo: error: src/prefgen/assets/mini/$part is missing; run 'make foundation' first (hours)" >&2
        exit 2
    fi
done

step() {
    printf '\n== %s\n' "$*"
    local began=$SECONDS
    "$@"
    printf '== done in %d s\n' $((SECONDS - began))
}

if [[ ! -f $work/raw/history.jsonl ]]; then
    step prefgen data agents --out "$work/raw"
fi
if [[ ! -f $work/shards/index.json ]]; then
    step prefgen data build --history "$work/raw/history.jsonl" --out "$work/shards"
fi
step prefgen fit --stage vqa workdir="$work"
step prefgen fit --stage probe workdir="$work"
step prefgen predict --stage probe workdir="$work"
step prefgen fit --stage align workdir="$work"
# What the report compares with: the other pairing, and an adapter of its own on one liked image.
step prefgen fit --stage align workdir="$work" run_dir="$work/align_independent" align.pairing=independent
# Retrieval on test users, whom nothing was chosen by.
step prefgen test --stage align workdir="$work"
step prefgen test --stage align workdir="$work" run_dir="$work/align_independent" align.pairing=independent
step prefgen fit --stage inject workdir="$work"
step prefgen fit --stage inject --config configs/mini/inject_image_only.yaml workdir="$work"
step prefgen evaluate workdir="$work"
