#!/bin/bash
# 1 run of Isobatch on 4 nodes x 2 workers, as `python launch.py cluster=slurm` submits it.
#SBATCH --job-name=digits-1
#SBATCH --output="/scratch/runs/a b/logs/slurm-%j.out"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:2
#SBATCH --mem=66048M
#SBATCH --time=90
#SBATCH --signal=USR2@300
#SBATCH --partition=gpu
#SBATCH --account=lab-7
#SBATCH --qos=high
#SBATCH --constraint=a100&nvlink
#SBATCH --exclude=n[1-3],n7
#SBATCH --nodelist=n9
#SBATCH --reservation=e
#SBATCH --dependency=afterok:12
#SBATCH --comment="say \"hi\"; $(touch x) \\\\ #1"
#SBATCH --mail-user=me@example.org
#SBATCH --mail-type=END,FAIL,REQUEUE,INVALID_DEPEND
#SBATCH --exclusive
#SBATCH --gres-flags=enforce-binding

run=(run.dir=/scratch/0 'run.config='"'"'/scratch/it\'"'"'s 0.yaml'"'"'')

# One task a node starts that node's workers. When the job has to stop, Slurm signals them: they save, and
# end. This shell outlives them, looks how they ended, and queues the job again where they were stopped.
trap : TERM

# cluster.setup
module load cuda
source "my env/bin/activate"

srun --ntasks-per-node=1 --cpus-per-task=16 --kill-on-bad-exit=0 --wait=600 python /opt/isobatch/launch.py "${run[@]}" &
until wait "$!"; code=$?; ! kill -0 "$!" 2> /dev/null; do :; done
trap '' TERM
ISOBATCH_STEP_CODE=$code exec python /opt/isobatch/launch.py "${run[@]}" action=requeue
