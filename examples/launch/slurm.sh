#!/bin/bash
# GRPO on two nodes of eight GPUs under Slurm: `sbatch examples/launch/slurm.sh`.
#
# One process a node sees all of its GPUs.  JAX finds the processes by what srun sets.  `runs/` must
# be on a file system that all nodes share.  Ten minutes before the time limit Slurm sends SIGTERM:
# all processes stop after the same step, saved, and the job goes on where it was, put back in the
# queue.
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# A job that was begun before goes on.
RESUME=$([ -e runs/grpo/config.yaml ] && echo true || echo false)

code=0
srun --kill-on-bad-exit=1 rlhf grpo \
  --model Qwen/Qwen2.5-7B-Instruct --dataset gsm8k --columns '{question: prompt, answer: solution}' --reward accuracy \
  --batch_size 32 --num_samples 8 --fsdp 16 --dtype bfloat16 --remat full \
  --save_every 50 --output runs/grpo --resume "$RESUME" || code=$?

# 130: told to stop, and saved.
if [ "$code" = 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
else
  exit "$code"
fi
