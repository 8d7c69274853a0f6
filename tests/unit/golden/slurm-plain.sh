#!/bin/bash
# 1 run of Isobatch on 1 node x 2 workers, as `python launch.py cluster=slurm` submits it.
#SBATCH --job-name=digits-1
#SBATCH --output="/scratch/runs/a b/logs/slurm-%j.out"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --signal=USR2@120

run=(run.dir=/scratch/0 'run.config='"'"'/scratch/it\'"'"'s 0.yaml'"'"'')

# One task a node starts that node's workers. When the job has to stop, Slurm signals them: they save, and
# end. This shell outlives them, looks how they ended, and queues the job again where they were stopped.
trap : TERM
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=600 '/opt/my python' /opt/isobatch/launch.py "${run[@]}" &
until wait "$!"; code=$?; ! kill -0 "$!" 2> /dev/null; do :; done
trap '' TERM
ISOBATCH_STEP_CODE=$code exec '/opt/my python' /opt/isobatch/launch.py "${run[@]}" action=requeue
