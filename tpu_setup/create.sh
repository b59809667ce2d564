#!/usr/bin/env bash
# Queue a TPU pod (or several slices) and wait until it is there.
set -euo pipefail
source "$(dirname "$0")/settings.sh"

size=(--node-id "$NAME")
[ "$SLICES" -gt 1 ] && size=(--node-count "$SLICES" --node-prefix "$NAME")
price=()
[ "$SPOT" = 1 ] && price=(--spot)

gcloud compute tpus queued-resources create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" \
  --runtime-version "$RUNTIME" "${size[@]}" ${price[@]+"${price[@]}"}

while true; do
  now=$(state)
  echo "$(date +%T) $NAME: ${now:-unknown}"
  case "$now" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) exit 1 ;;
  esac
  sleep 30
done
