#!/usr/bin/env bash
# ImageNet64 on two machines with four GPUs each: sbatch examples/slurm.sh --data-root /data
#SBATCH --job-name=imagenet64
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=72:00:00
#SBATCH --signal=TERM@120
# Two minutes before the limit a signal makes the run write a checkpoint. `rnode-cli train --resume` continues from it.
set -euo pipefail

srun rnode-cli train "${RECIPE:-imagenet64}" --devices "${SLURM_NTASKS_PER_NODE:-4}" --num-nodes "${SLURM_NNODES:-2}" "$@"
