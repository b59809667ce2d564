#!/usr/bin/env bash
# The same arguments as run.sh; makes the pod again whenever it is taken away, until the run has ended by itself.
set -uo pipefail
here=$(dirname "$0")
source "$here/settings.sh"
: "${ATTEMPTS:=50}"

for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  if [ "$(state)" != ACTIVE ]; then
    [ -n "$(state)" ] && gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
    bash "$here/create.sh" && bash "$here/install.sh" || { sleep 60; continue; }
  fi
  # The same command goes on from the newest whole checkpoint in --out.
  bash "$here/run.sh" "$@" && exit 0
  [ $? -eq 2 ] && exit 2 # wrong use does not get better
  echo "attempt $attempt ended with an error"
  sleep 60
done
exit 1
