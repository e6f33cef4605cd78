# What a job of pretrain.sbatch or posttrain.sbatch does; they source it with
#
#   program         what torchrun starts: launch/pretrain.py or launch/posttrain.py
#   configuration   the class of its configuration
#   script          the batch script, for messages
#
# and the batch script's arguments.

set -uo pipefail

# Exit codes of the program.
CONFIG_ERROR=2
STOPPED=75

refuse() {
  echo "error: $*" >&2
  exit "$CONFIG_ERROR"
}

[[ -n ${SLURM_JOB_ID:-} ]] ||
  refuse "this is not a SLURM job; submit it: sbatch $script CONFIG.yaml [--key value ...]"
[[ $# -ge 1 && $1 != -* ]] ||
  refuse "no configuration file; submit with one: sbatch $script CONFIG.yaml [--key value ...]"
[[ -f $1 ]] || refuse "the configuration file $1 does not exist; check the path"
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || refuse "there is no $python; run make install, or set PYTHON to an interpreter"

arguments=(--config "$@")
run_dir=$(
  "$python" -c 'import importlib, sys; from trainer.cli import guess
module, _, name = sys.argv[1].rpartition(".")
print(guess(sys.argv[2:], "run.dir") or getattr(importlib.import_module(module), name)().run.dir)' \
    "$configuration" "${arguments[@]}"
) || refuse "$python cannot import the trainer; run make install, or set PYTHON to an interpreter that can"

# Inode and time of status.json: what an earlier start left there says nothing of this one.
status_mark() {
  # By an open descriptor, since opening a file is what makes NFS look at it again.
  [[ -f $run_dir/status.json ]] && stat --format='%i %y' - <"$run_dir/status.json"
}
newest_checkpoint() {
  compgen -G "$run_dir/checkpoints/step_*" | sort | tail -n 1
}
status_before=$(status_mark)
checkpoint_before=$(newest_checkpoint)

# The address by which SLURM itself reaches the first node: mostly its name.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first_node" | grep --only-matching ' NodeAddr=[^ ]*' | cut -d = -f 2)
# Jobs that share a node need ports of their own; these lie below Linux's range for outgoing connections.
port=$((10000 + SLURM_JOB_ID % 20000))
ranks_per_node=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"' EXIT

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)," \
  "$ranks_per_node ranks on each, rendezvous at $address:$port, run directory $run_dir"

# What each node runs: torchrun, its process id left where this script finds it. torchrun ignores USR1, and so does each
# rank until it can save.
node_program='
trap "" USR1
pid_file=$1 python=$2
shift 2
is_host=false
if [[ $SLURM_NODEID == 0 ]]; then
  is_host=true
  echo $$ >"$pid_file"
fi
exec "$python" -m torch.distributed.run --rdzv-conf "is_host=$is_host,read_timeout=600" "$@"
'
torchrun_options=(
  --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks_per_node"
  --rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
)
srun_options=(
  --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1
  # A task is a whole node's ranks: they share out its cores themselves.
  --cpu-bind none
  # When one node's ranks end, the others' have a minute to write down why.
  --kill-on-bad-exit=0 --wait 60
  --export ALL
)
srun "${srun_options[@]}" bash -c "$node_program" node_program "$scratch/torchrun.pid" "$python" \
  "${torchrun_options[@]}" "$program" "${arguments[@]}" &
step=$!

# One rank that hears of it stops them all, so the first node's are told. Not by scancel, whose signals also go to what
# a rank has started (a compiler, say), which they would end. Again and again, since a rank does not listen while it
# sets up.
stop_run() {
  while kill -0 "$step" 2>/dev/null; do
    [[ -s $scratch/torchrun.pid ]] && pkill -USR1 --parent "$(<"$scratch/torchrun.pid")"
    sleep 2
  done
}
requeue=no
trap 'echo "stopping: the time is nearly up"; requeue=yes; stop_run &' USR1
trap 'echo "stopping: the job is cancelled, or its time is up"; requeue=no; stop_run &' TERM

while true; do
  wait "$step"
  code=$?
  # Above 128 it may be the waiting that a signal ended.
  ((code > 128)) && kill -0 "$step" 2>/dev/null || break
done

# torchrun turns every failure into 1: the run directory tells what it was.
state=failed
if [[ $(status_mark) != "$status_before" ]]; then
  state=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$run_dir/status.json")
elif ((code == 0)); then
  state=done
fi
echo "job $SLURM_JOB_ID: the run is $state"

case $state in
  done) exit 0 ;;
  config_error) exit "$CONFIG_ERROR" ;;
  stopped) ;;
  *) exit 1 ;;
esac
if [[ $requeue == no ]]; then
  echo "not queued again; submit the same command to go on"
elif [[ $(newest_checkpoint) == "$checkpoint_before" ]]; then
  echo "not queued again: no step was taken in the time there was; submit with a longer --time to go on"
else
  scontrol requeue "$SLURM_JOB_ID" || echo "not queued again; submit the same command to go on"
fi
exit "$STOPPED"
