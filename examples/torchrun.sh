#!/usr/bin/env bash
# ImageNet64 on several machines with torchrun. Run this on each machine, with its number:
#   NODES=2 NODE=0 MAIN=first-machine examples/torchrun.sh --data-root /data
#   NODES=2 NODE=1 MAIN=first-machine examples/torchrun.sh --data-root /data
# GPUS is the number of devices per machine. Further arguments are those of `rnode-cli train`.
set -euo pipefail

exec torchrun --nnodes "${NODES:-2}" --node-rank "${NODE:-0}" --nproc-per-node "${GPUS:-4}" \
    --master-addr "${MAIN:?set MAIN to the name of the first machine}" --master-port "${PORT:-29500}" \
    -m rnode_plugin train "${RECIPE:-imagenet64}" "$@"
