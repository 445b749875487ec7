#!/usr/bin/env bash
# A run under Slurm that survives time limits and preemption:
#   RUN=runs/pool12 sbatch launch_configs/slurm.sh run pool12 --data.root=/shards/imagenet
# Slurm sends SIGUSR1 before the end; the ranks finish their step, save and leave, and the job queues again and resumes.
# Everything after the script's name goes to `lgp`. docs/preemption.md has the reasons.
#SBATCH --job-name=lgp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

set -u
: "${RUN:?name the run directory, on a file system that all nodes share: RUN=runs/NAME sbatch $0 ...}"
CONFIG=${CONFIG:-launch_configs/multinode.yaml}              # its num_processes is that of all nodes
MAX_RESTARTS=${MAX_RESTARTS:-100}
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1          # launchers pass these on to their ranks,
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE_S:-280}        # which have so many seconds until they are killed

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
options=(--config_file "$CONFIG" --num_machines "$SLURM_NNODES" --main_process_ip "$head"
    --main_process_port "${PORT:-29500}" -m lgp_dist "$@" --run-dir="$RUN")

rm -f "$RUN/outcome.json" # that of an earlier start
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' node "${options[@]}" &
step=$!
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # to the tasks of srun, not to this script
while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do :; done

# The launcher makes 1 of every status of a rank, so that how the run ended is in its folder.
outcome=$(sed -n 's/^ *"outcome": "\([a-z]*\)",*$/\1/p' "$RUN/outcome.json" 2>/dev/null)
echo "slurm.sh: the run is ${outcome:-without an outcome}, status $status, restart ${SLURM_RESTART_COUNT:-0}"
case "$outcome" in
complete) exit 0 ;;
preempted)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 75
    ;;
esac
exit "$((status ? status : 1))"
