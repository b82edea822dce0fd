#!/usr/bin/env bash
# One task a node, and in it torchrun with a process a GPU:
#   sbatch --nodes 2 --gpus-per-node 8 training/launch/slurm.sh training/run_clm.py clm.yaml
# Add engines as on one node: --deepspeed training/configs/zero3.json, --distributed_config '{"fsdp_size": 16, ...}'.
#SBATCH --job-name sparse-moe
#SBATCH --ntasks-per-node 1
#SBATCH --cpus-per-task 32
#SBATCH --time 24:00:00
#SBATCH --signal B:USR1@120
#SBATCH --requeue
#SBATCH --output %x-%j.out
set -euo pipefail

# The recipe goes on from its last checkpoint when the job is started again.
trap 'scontrol requeue "${SLURM_JOB_ID}"' USR1

first_node=$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "${SLURM_JOB_NUM_NODES}" \
  --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_id "${SLURM_JOB_ID}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "${first_node}:29500" \
  "$@" &
wait
