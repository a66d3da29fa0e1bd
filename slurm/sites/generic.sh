# shellcheck shell=bash disable=SC2034
# Any cluster, on CPUs: nothing is loaded, nothing is tuned. A site file may
#
#   load modules, and export variables      it is read by the batch script and once more in every task
#   site_srun=(...) site_mpirun=(...)       words for srun and mpirun, binding above all
#   site_launchers="..."                    other launchers than pmix pmi2 mpirun gloo, or in another order
#
# hvdtrain places the ranks of a node on its cores itself where the launcher leaves them all cores (HVDTRAIN_BIND=none:
# never), so binding is left alone here.
site_mpirun=(--bind-to none)
