#!/usr/bin/env bash
# All stages of a recipe, one after the other, over the nodes of a Slurm job:
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 1 scripts/slurm.sh recipes/my-recipe
# A job that is cut off resumes from the last checkpoint when it is submitted again.
# ACCELERATE_CONFIG names another accelerate config, e.g. recipes/accelerate/fsdp2.yaml; MASTER_PORT another port.
set -euo pipefail
recipe=${1:?"usage: slurm.sh RECIPE_FOLDER"}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
for stage in pretrain sft reward ppo; do
  [ -f "$recipe/$stage.yaml" ] || continue
  srun --kill-on-bad-exit=1 bash -c "accelerate launch --config_file ${ACCELERATE_CONFIG:-recipes/accelerate/multinode.yaml} \
    --num_machines $SLURM_NNODES --num_processes $processes --machine_rank \$SLURM_NODEID \
    --main_process_ip $head --main_process_port ${MASTER_PORT:-29500} pipeline/$stage.py --config $recipe/$stage.yaml"
done
