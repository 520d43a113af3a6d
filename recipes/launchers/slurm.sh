#!/bin/bash
# Makes a table of pre-optimized tokens on a Slurm cluster: a job array with one shard and one GPU for each task, then one job that merges.
#
#   export FACES=/shared/faces TABLE=/shared/table
#   array=$(sbatch --parsable --array=0-31 recipes/launchers/slurm.sh --base /shared/sd15)
#   sbatch --dependency=afterok:$array recipes/launchers/slurm.sh --base /shared/sd15 --merge
#
# FACES and TABLE must be on a file system that all nodes share. A preempted task is requeued and resumes from its chunk's checkpoint.
# The rows don't depend on the number of tasks. Written for Slurm 20.11 or later; the authors haven't run it on a cluster.
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
