# shellcheck shell=bash
# shellcheck disable=SC2154  # nodes, tasks, code and the exit codes are set by job.sh, before by train.sbatch
# Whether and how a training job starts again, as functions; train.sbatch sources it after job.sh.

# find_run_dir WORDS...: sets run_dir, as `hvdtrain train WORDS...` will have it; recipe_words, the WORDS that are no
# options; and resume, what --resume must be instead, or nothing.
find_run_dir() {
    local recipe='' word option='' value
    run_dir='' resume='' recipe_words=()
    for word; do
        if [ -n "$option" ]; then
            value=$word
        elif [[ $word == --*=* ]]; then
            option=${word%%=*} value=${word#*=}
        elif [[ $word == --* ]]; then # its value is the next word
            option=$word
            continue
        else
            recipe=${recipe:-$word}
            recipe_words+=("$word")
            continue
        fi
        case $option in
        --ru*) run_dir=$value ;;
        --re*) resume=$value ;;
        esac
        option=''
    done
    recipe=${recipe##*/}
    run_dir=${run_dir:-runs/${recipe%.*}}
    # A job that goes on finds the run that it began itself.
    if [ "$resume" = never ] && ((${SLURM_RESTART_COUNT:-0} || ${HVDTRAIN_LINK:-0})); then
        resume=auto
    else
        resume=''
    fi
}

# refuse_shared_folder: the tasks of an array would all train in one run folder, unless its name has the task's number.
refuse_shared_folder() {
    local task=${SLURM_ARRAY_TASK_ID:-}
    if [ -z "$task" ] || [ "${SLURM_ARRAY_TASK_COUNT:-}" = 1 ]; then return; fi
    [[ ! $run_dir =~ (^|[^0-9])$task([^0-9]|$) ]] || return 0
    fail "task $task of array ${SLURM_ARRAY_JOB_ID:-}: all its tasks would train in $run_dir, which belongs to one job;" \
        "slurm/array.sbatch gives each a folder of its own, HVDTRAIN_CHAIN=1 makes jobs that follow one another"
}

which_attempt() {
    ((!${HVDTRAIN_LINK:-0})) || echo -n ", link $((HVDTRAIN_LINK + 1)) of its chain"
    ((!${SLURM_RESTART_COUNT:-0})) || echo -n ", restart $SLURM_RESTART_COUNT"
}

# newest_step: the step of the newest checkpoint of the run, or nothing.
newest_step() {
    local manifests
    shopt -s nullglob
    manifests=("$run_dir"/checkpoints/step-*/manifest.json)
    shopt -u nullglob
    ((!${#manifests[@]})) || basename "$(dirname "${manifests[-1]}")"
}

# field NAME: a field of `scontrol show job`; nothing where it is not set.
field() {
    local value
    value=$(timeout 30 scontrol show job "$SLURM_JOB_ID" | sed -n "s/^\(.* \)\?$1=\([^ ]*\).*/\2/p" | head -n 1)
    [[ $value == "(null)" || $value == N/A ]] || echo "$value"
}

# log_of_job: where this job's output goes.
log_of_job() { timeout 30 scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p'; }

# ended_by_slurm: has Slurm ended the job in a way after which it shall not start again by itself? Says why. Whether
# that was a user's scancel, the time limit or preemption, Slurm writes only into the job's log.
ended_by_slurm() {
    local state reason
    state=$(timeout 30 squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || :)
    [ "$state" != RUNNING ] || return
    if (($(field Restarts) > ${SLURM_RESTART_COUNT:-0})); then
        say "Slurm has requeued it"
        return
    fi
    reason=$(tail -n 50 "$(log_of_job)" | grep -o "JOB $SLURM_JOB_ID ON .* DUE TO .*" | tail -n 1)
    case $reason in
    *"DUE TO TIME LIMIT"* | *"DUE TO PREEMPTION"*) say "ended ${reason#*AT }" && return 1 ;;
    esac
    say "not started again: the job was cancelled ($state)"
}

# go_on_or_end WORDS...: decides whether the job is started again, and starts it; ends with the exit code of the run.
# WORDS: what a next job is started with.
go_on_or_end() {
    local stalled=0 most=${HVDTRAIN_MAX_STALLED:-3} record=$run_dir/stalled
    # bad data, out of memory, diverged, ...: it would only happen again
    [[ " $FINAL_EXITS " != *" $code "* ]] || { say "exit code $code, not started again" && exit "$code"; }
    case $code in
    "$EXIT_OK") say "finished" && exit "$code" ;;
    "$EXIT_STOPPED_EARLY") say "stopped early; newest checkpoint: $(newest_step)" ;;
    *) say "exit code $code: a rank has died; newest checkpoint: $(newest_step)" ;;
    esac
    if [ -e "$run_dir/stop" ]; then
        say "not started again: there is $run_dir/stop"
        exit "$code"
    fi
    ! ended_by_slurm || exit "$code"
    if [ "$(newest_step)" = "$before" ]; then
        ((!${SLURM_RESTART_COUNT:-0} && !${HVDTRAIN_LINK:-0})) || stalled=$(cat "$record" 2>/dev/null || echo 0)
        stalled=$((stalled + 1))
    fi
    mkdir -p "$run_dir" && echo "$stalled" >"$record"
    if ((stalled > most)); then
        say "not started again: $stalled times in a row without a newer checkpoint (HVDTRAIN_MAX_STALLED=$most)"
        exit "$code"
    fi
    ((!stalled)) || say "no newer checkpoint, $stalled of at most $most times in a row"
    if [ "${HVDTRAIN_CHAIN:-0}" != 1 ]; then
        say "into the queue again"
        ! scontrol requeue "$SLURM_JOB_ID" || exit "$code"
    fi
    next_link "$@"
    exit "$code"
}

# next_link WORDS...: submit this script again, with what this job was given, to start when it has ended.
next_link() {
    local options pair value without='' log link
    if [[ ${1:-} == --exclude=* ]]; then
        without=${1#*=}
        shift
    fi
    log=$(log_of_job)
    options=(--dependency="afterany:$SLURM_JOB_ID" --job-name="$SLURM_JOB_NAME" --chdir="$PWD" --open-mode=append
        --nodes="$nodes" --ntasks="$tasks" --cpus-per-task="$SRUN_CPUS_PER_TASK" --output="${log//%/%%}")
    [ -z "${SLURM_NTASKS_PER_NODE:-}" ] || options+=(--ntasks-per-node="$SLURM_NTASKS_PER_NODE")
    for pair in partition=Partition account=Account qos=QOS reservation=Reservation constraint=Features \
        exclude=ExcNodeList time=TimeLimit mem=MinMemoryNode mem-per-cpu=MinMemoryCPU gres=TresPerNode; do
        value=$(field "${pair#*=}")
        if [ "$pair" = exclude=ExcNodeList ] && [ -n "$without" ]; then
            value=${value:+$value,}$without
        fi
        [ -z "$value" ] || options+=("--${pair%%=*}=${value//gres[:\/]/}")
    done
    link=$((${HVDTRAIN_LINK:-0} + 1))
    forget_this_job
    value=$(HVDTRAIN_LINK=$link sbatch --parsable "${options[@]}" "$0" "$@") || {
        say "could not submit the next link; the same sbatch command goes on"
        return
    }
    say "job $value goes on"
    # For `hvdtrain status`, until it has started.
    { mkdir -p "$run_dir/jobs" && echo "{\"job_id\": \"$value\"}" >"$run_dir/jobs/submit-$value.json"; } || :
}
