#!/bin/bash
# The same without Slurm. On every node:
#   NODES=8 GPUS=8 HEAD=node0:29500 docker/torchrun.sh align workdir=/shared/x
set -euo pipefail
stage=$1
shift
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# --max-restarts: when a node is lost the rest start again and go on from the last checkpoint.
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
    --rdzv-id prefgen --max-restarts 3 --module prefgen fit --stage "$stage" trainer.accelerator=gpu \
    trainer.devices="$GPUS" trainer.num_nodes="$NODES" trainer.strategy=ddp loader.num_workers=6 "$@"
