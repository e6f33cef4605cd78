#!/usr/bin/env bash
# Install SLURM and munge for tests/slurm; nothing to do where they are. The tests start daemons of their own, with
# configuration, keys and logs in a temporary directory: what the packages set up for the system is not used.
set -euo pipefail

missing=()
# Debian keeps the daemons out of an ordinary user's PATH.
PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd sbatch munged; do
  command -v "$program" >/dev/null || missing+=("$program")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

if ! command -v apt-get >/dev/null || [[ $(id -u) != 0 ]]; then
  echo "error: ${missing[*]} not found. On Debian or Ubuntu, run this as root: bash tests/slurm/install.sh" >&2
  echo "       Elsewhere, install SLURM (slurmctld, slurmd and the commands) and munge with the system's packages." >&2
  exit 2
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge procps
