# shellcheck shell=bash
# What the batch scripts of this folder have in common, as functions; they source it, and so does every task (step.sh).
# HVDTRAIN_HOME is the folder above this one.

say() { echo "hvdtrain job: $*"; }
fail() { # wrong use; the package's code for it, which may not be known yet (read_exit_codes)
    say "$*" >&2
    exit 2
}

# forget PATTERN...: unset the variables of the environment whose names match.
forget() {
    local name pattern
    for name in $(compgen -e); do
        for pattern; do
            # shellcheck disable=SC2053 # a pattern
            [[ $name != $pattern || $name == SLURM_CONF ]] || unset "$name"
        done
    done
}
# What a launcher tells the ranks that it starts, and nobody else. PMI_* and PMIX_MCA_* hold settings of users too.
of_ranks=(PMI_RANK PMI_SIZE PMI_FD PMI_PORT PMI_ID PMI_JOBID PMI_SPAWNED PMI_CONTROL_PORT PMI_SHARED_SECRET 'PMI2_*'
    'PMIX_[!M]*' 'PALS_*' 'MPI_LOCAL*' 'OMPI_COMM_WORLD_*' 'OMPI_MCA_orte_*' 'OMPI_MCA_ess*' 'HOROVOD_*RANK'
    'HOROVOD_*SIZE' 'HOROVOD_GLOO_RENDEZVOUS_*')

# forget_outer_job: drop what another job has left. sbatch hands on the variables that it finds, and may have been typed
# in a job or a step. That one's binding would bind these ranks wrongly; its memory, beside this job's, would end srun.
# Before the site's file is read.
forget_outer_job() { forget "${of_ranks[@]}" 'SLURM_STEP_*' SLURM_STEPID 'SLURM_CPU_BIND*' 'SLURM_MEM_BIND*' 'SLURM_MEM_PER_*'; }

# forget_this_job: drop this job's variables. To be called before sbatch: the next job must not take them for its own.
forget_this_job() { forget "${of_ranks[@]}" 'SLURM_*' SRUN_CPUS_PER_TASK HVDTRAIN_{RANKS,END_TIME,RENDEZVOUS,LINK}; }

# enter_environment: the site's modules and variables, then the environment's programs first on the PATH.
#   HVDTRAIN_SITE   a file of slurm/sites, without .sh, or a path (default: generic)
#   HVDTRAIN_VENV   the environment (default: .venv in the folder of submission or of the project, if there is one)
enter_environment() {
    local site=${HVDTRAIN_SITE:-generic} venv=${HVDTRAIN_VENV:-} folder
    [[ $site == */* ]] || site=$HVDTRAIN_HOME/slurm/sites/$site.sh
    [ -r "$site" ] || fail "HVDTRAIN_SITE: cannot read $site; there are $(cd "$HVDTRAIN_HOME/slurm/sites" && echo *.sh)"
    site_srun=() site_mpirun=(--bind-to none) site_launchers=
    set +u # modules are seldom written for it
    # shellcheck source=/dev/null
    . "$site" || fail "$site failed"
    set -u
    if [ -z "$venv" ]; then
        for folder in "${SLURM_SUBMIT_DIR:-$PWD}" "$HVDTRAIN_HOME"; do
            [ ! -x "$folder/.venv/bin/python" ] || { venv=$folder/.venv && break; }
        done
    fi
    if [ -n "$venv" ]; then
        [ -x "$venv/bin/python" ] || fail "HVDTRAIN_VENV: there is no $venv/bin/python; build it with make env"
        case :$PATH: in ":$venv/bin:"*) ;; *) PATH=$venv/bin:$PATH ;; esac
        export PATH
    fi
    command -v python >/dev/null || fail "no python on the PATH: run make env, or set HVDTRAIN_VENV"
}

# read_exit_codes: sets EXIT_OK, EXIT_USAGE, ... and FINAL_EXITS, after which a run is not started again, as
# hvdtrain/errors.py has them. After enter_environment.
read_exit_codes() {
    local codes status=0
    codes=$(python -m hvdtrain.jobs.exit_codes) || status=$?
    if ((status > 128)); then # killed, as on a node without memory; the run will be, too: then the job may start again
        codes="EXIT_OK=0 EXIT_STOPPED_EARLY='' EXIT_CRASH=$status EXIT_IO=$status FINAL_EXITS=''"
    elif ((status)); then
        fail "$(command -v python) cannot load hvdtrain: run make env, or set HVDTRAIN_VENV"
    fi
    eval "$codes"
}

# launch_words LAUNCHER NODES TASKS: sets `launch`, the words before a program that start it in every task.
launch_words() {
    local step=(bash "$HVDTRAIN_HOME/slurm/step.sh")
    local srun=(srun --nodes="$2" --ntasks="$3" --kill-on-bad-exit=1 --wait=60)
    srun+=(--distribution=block ${site_srun[@]+"${site_srun[@]}"})
    case $1 in
    alone) launch=("${srun[@]}" --mpi=none "${step[@]}") ;;
    pmix | pmi2 | cray_shasta) launch=("${srun[@]}" "--mpi=$1" "${step[@]}") ;;
    mpirun) launch=(mpirun -np "$3" ${site_mpirun[@]+"${site_mpirun[@]}"} "${step[@]}") ;;
    gloo) launch=("${srun[@]}" --mpi=none "${step[@]}" python -m hvdtrain.comm.rendezvous exec) ;;
    *) fail "HVDTRAIN_LAUNCHER: $1 is none of pmix, pmi2, mpirun, gloo" ;;
    esac
}

# can_start LAUNCHER: is it there, and do two tasks that it starts find one another through this environment's MPI?
# Slurm may offer a PMI that this MPI was not built for: each rank would then train alone.
can_start() {
    local launch said why
    case $1 in
    pmix | pmi2 | cray_shasta) [[ $(srun --mpi=list 2>&1) =~ (^|[[:space:]])$1([[:space:]]|$) ]] || return ;;
    mpirun) command -v mpirun >/dev/null || return ;;
    gloo) return ;; # needs nothing but a network
    esac
    launch_words "$1" $((nodes > 1 ? 2 : 1)) 2
    said=$(HVDTRAIN_RANKS=2 timeout -k 5 60 "${launch[@]}" python -m hvdtrain.comm.probe 2>&1) && return
    why=$(grep -m 1 '^hvdtrain: ' <<<"$said") || why=$(grep -m 1 -i -E 'error|not built|unable' <<<"$said") || why=
    say "not by $1: it does not join this environment's ranks${why:+ ($why)}"
    return 1
}

# choose_launcher LAUNCHER...: the first that works, best first; sets nodes, tasks, launcher and launch.
#   HVDTRAIN_LAUNCHER   takes one without trying it, or the first of several that works: "pmi2 mpirun"
choose_launcher() {
    local candidates=${HVDTRAIN_LAUNCHER:-${site_launchers:-$*}} name
    set -- "$@" cray_shasta # the one that only a site file or the user asks for
    nodes=$SLURM_JOB_NUM_NODES
    tasks=
    if ((${SLURM_RESTART_COUNT:-0})); then # SLURM_NTASKS is as submitted; the job may have been made smaller since
        tasks=$(timeout 30 scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* NumTasks=\([0-9]*\).*/\1/p' | head -n 1)
    fi
    tasks=${tasks:-${SLURM_NTASKS:-$((nodes * ${SLURM_NTASKS_PER_NODE:-1}))}}
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it
    export SLURM_EXPORT_ENV=ALL                         # nor, after sbatch --export=NONE, anything at all
    # mpirun gives the ranks 1 s between TERM and KILL, too short for saving. It always waits the whole time, and twice.
    export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-3}
    launcher=
    if ((tasks == 1)); then
        launcher=alone
    elif [[ $candidates != *" "* ]]; then
        launcher=$candidates
    else
        for name in $candidates; do
            if [[ " $* " == *" $name "* ]] && can_start "$name"; then
                launcher=$name
                break
            fi
        done
    fi
    [ -n "$launcher" ] || fail "none of $candidates starts this environment's ranks; see python -m hvdtrain doctor"
    [[ $launcher == alone || " $* " == *" $launcher "* ]] || fail "HVDTRAIN_LAUNCHER=$launcher: expected one of $*"
    launch_words "$launcher" "$nodes" "$tasks"
    case $launcher in
    alone) say "one task, no launcher" ;;
    mpirun) say "launcher mpirun" ;;
    gloo) say "launcher srun with a rendezvous for Gloo: on CPUs slower than MPI" ;;
    *) say "launcher srun --mpi=$launcher" ;;
    esac
}

# serve_rendezvous: where the launcher is gloo, start what its ranks meet at. It serves one step.
serve_rendezvous() {
    local towards=127.0.0.1 last out
    [ "$launcher" = gloo ] || return 0
    if ((nodes > 1)); then # the ranks' own network: the one that leads to the last node
        last=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
        towards=$(scontrol --oneliner show node "$last" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    fi
    exec {out}< <(exec python -m hvdtrain.comm.rendezvous serve "$towards")
    rendezvous=$!
    read -r -t 60 HVDTRAIN_RENDEZVOUS <&"$out" || fail "the rendezvous for Gloo did not start"
    export HVDTRAIN_RENDEZVOUS
}

# run WORDS...: start them and wait for their end; sets `code`, theirs. USR2 and TERM, for which the script sets
# `trap ask_to_stop USR2 TERM`, are handed on to the ranks as USR2: now, or as soon as there are some.
run() {
    (trap '' USR2 && exec "$@") & # until srun has its own handler, the signal would end it
    launched=$! asker='' launched_s=$SECONDS
    ((!asked)) || ask_to_stop
    interrupted=1
    # shellcheck disable=SC2034  # again.sh reads code
    while ((interrupted)); do # a trap ends the wait, not the program
        interrupted=0
        wait "$launched" && code=0 || code=$?
    done
    launched=''
    [ -z "$asker" ] || kill "$asker" 2>/dev/null || :
    [ -z "${rendezvous:-}" ] || kill "$rendezvous" 2>/dev/null || :
}
asked=${asked:-0} launched='' asker=''
ask_to_stop() {
    asked=1 interrupted=1
    [ -n "$launched" ] && [ -z "$asker" ] || return 0
    say "signal: the ranks shall save and stop"
    # Again and again: a rank that is still loading has not heard it. srun and mpirun pass USR2 on.
    (
        trap - USR2 TERM
        exec {never}<> <(:) # nothing comes from there: a pause without a process of its own
        early=$((launched_s + 4 - SECONDS)) # s; a task just born does not ignore it yet (step.sh)
        ((early <= 0)) || read -r -t "$early" -u "$never" || :
        while kill -USR2 "$launched" 2>/dev/null; do read -r -t 5 -u "$never" || :; done
    ) &
    asker=$!
}
