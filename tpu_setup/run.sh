#!/usr/bin/env bash
# Run dpo-jax on every worker of every slice: run.sh train dpo --model ... --out /mnt/runs/dpo
set -euo pipefail
source "$(dirname "$0")/settings.sh"
[ $# -gt 0 ] || { echo "usage: run.sh train METHOD [options]"; exit 2; }

words=$(printf '%q ' "$@" --distributed)
[ "$SLICES" -gt 1 ] && words+="--mesh-slices $SLICES"

# A process left over from a lost connection would hold the chips: it is asked to end, saves, and is waited for.
everywhere "old=\$(cat ~/dpo_jax.pid 2>/dev/null || true)
  if [ -n \"\$old\" ] && grep -qs dpo-jax /proc/\$old/cmdline; then
    kill \$old; for i in \$(seq 60); do kill -0 \$old 2>/dev/null || break; sleep 2; done
    kill -9 \$old 2>/dev/null || true
  fi
  echo \$\$ > ~/dpo_jax.pid
  exec ~/venv/bin/dpo-jax $words"
