#!/usr/bin/env bash
# The Debian packages that the tests with two hosts and with Slurm's queue need, for root; without them those tests are
# skipped, and say so.
set -euo pipefail
PATH="/usr/sbin:/sbin:$PATH"
missing=no
for command in pdsh sshd ip mpirun slurmctld slurmd; do command -v "$command" >/dev/null || missing=yes; done
if [[ "$missing" == no ]]; then exit; fi
[[ "$(id -u)" == 0 ]] || exit 1
# No daemon is to start: they are for the tests' own networks alone.
policy=/usr/sbin/policy-rc.d
if [[ ! -e "$policy" ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
packages=(pdsh openssh-server iproute2 openmpi-bin slurmctld slurmd slurm-client)
install() { apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null 2>&1; }
install || { apt-get update -qq >/dev/null 2>&1 && install; }
