#!/bin/bash
# A table of pre-optimized tokens on a Slurm cluster: an array of shards, one card each, then one job that merges.
#
#   export FACES=/shared/faces TABLE=/shared/table
#   array=$(sbatch --parsable --array=0-31 recipes/launchers/slurm.sh --base /shared/sd15)
#   sbatch --dependency=afterok:$array recipes/launchers/slurm.sh --base /shared/sd15 --merge
#
# FACES and TABLE lie on a file system that all nodes share. A task that is preempted is requeued and goes on from its chunk's checkpoint;
# a task more or less changes nothing about the rows. Written for Slurm 20.11 or later; it was never run on a cluster by the authors.
#SBATCH --job-name=preoptimize
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
set -euo pipefail
shard=${SLURM_ARRAY_TASK_ID:-0}/${SLURM_ARRAY_TASK_COUNT:-1}
exec hyperdreambooth preoptimize "$FACES" -o "$TABLE" --shard "$shard" --chunk 32 "$@"
