#!/usr/bin/env bash
# Copy this working tree to every worker, install it there, mount the shared folder.
set -euo pipefail
source "$(dirname "$0")/settings.sh"
root=$(cd "$(dirname "$0")/.." && pwd)

packed=$(mktemp -t dpo_jax.XXXXXX)
trap 'rm -f "$packed"' EXIT
# What git tracks and nothing else: no environments, no runs.
git -C "$root" archive --format=tar.gz -o "$packed" HEAD
for node in $(nodes); do
  gcloud compute tpus tpu-vm scp "$packed" "$node:dpo_jax.tar.gz" --zone "$ZONE" --worker=all
done

# The images come with an older Python than is needed; uv brings one.
everywhere "set -e
  rm -rf ~/dpo_jax && mkdir ~/dpo_jax && tar -xzf ~/dpo_jax.tar.gz -C ~/dpo_jax && cd ~/dpo_jax
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --python 3.12 ~/venv
  python3 -m uv pip install --quiet --python ~/venv/bin/python -e '.[tpu]'"

if [ -n "$BUCKET" ]; then
  everywhere "set -e
    command -v gcsfuse >/dev/null || { echo 'install gcsfuse on the workers first'; exit 1; }
    sudo mkdir -p $SHARED && sudo chown \$USER $SHARED
    mountpoint -q $SHARED || gcsfuse --implicit-dirs $BUCKET $SHARED"
fi

everywhere "~/venv/bin/python -c 'import jax; jax.distributed.initialize(); print(jax.process_index(), jax.device_count())'"
