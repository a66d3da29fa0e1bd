#!/usr/bin/env bash
# What every task of a job runs first: the environment, then the program in its place.
set -euo pipefail
trap '' USR2 # until the program has its own handler, the signal would end it; the batch script sends it again
HVDTRAIN_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export HVDTRAIN_HOME
. "$HVDTRAIN_HOME/slurm/job.sh"
enter_environment
exec "$@"
