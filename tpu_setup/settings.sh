# What the other scripts share; every value may be set in the environment. Sourced, not run.
: "${NAME:=dpo}"                    # of the queued resource and of its nodes
: "${ZONE:=us-central2-b}"
: "${TYPE:=v4-32}"                  # accelerator type of one slice
: "${RUNTIME:=tpu-ubuntu2204-base}" # v5e, v5p and v6e have runtimes of their own: v2-alpha-tpuv5-lite, ...
: "${SLICES:=1}"
: "${SPOT:=0}"                      # 1: cheaper, and may be taken away at any time
: "${BUCKET:=}"                     # Cloud Storage bucket to mount at $SHARED on every worker
: "${SHARED:=/mnt/runs}"            # folder that all workers see: data, models, runs

nodes() {
  if [ "$SLICES" -gt 1 ]; then
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  else
    echo "$NAME"
  fi
}

# Run a command on every worker of every slice at once; its failure is that of a slice that failed.
everywhere() {
  local jobs=() failed=0 node job
  for node in $(nodes); do
    gcloud compute tpus tpu-vm ssh "$node" --zone "$ZONE" --worker=all --command="$1" </dev/null &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=$?; done
  return "$failed"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format='value(state.state)' 2>/dev/null || true
}
