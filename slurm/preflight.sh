# shellcheck shell=bash
# shellcheck disable=SC2154  # what job.sh and again.sh set: code, exit codes, launch, tasks, run_dir, recipe_words
# The first step of a training job, as a function: are its nodes fit? train.sbatch sources it.

# preflight WORDS...: goes on where they are, ends the job where they are not. WORDS: what a next job is started with.
#   HVDTRAIN_PREFLIGHT=0     without it
#   HVDTRAIN_EXCLUDE_BAD=1   where nodes are bad, submit a next job that does without them
preflight() {
    [ "${HVDTRAIN_PREFLIGHT:-1}" != 0 ] || return 0
    local found=$run_dir/jobs/preflight-$SLURM_JOB_ID.json bad=
    mkdir -p "$run_dir/jobs" || exit "$EXIT_IO"
    serve_rendezvous
    # A node that hangs or never comes must not hold up the job for ever.
    # USR2 is for the training: it is remembered till then.
    HVDTRAIN_RANKS=$tasks run bash -c 'trap "" USR2 && exec "$@"' bash \
        timeout --kill-after=10 "${HVDTRAIN_PREFLIGHT_S:-300}" "${launch[@]}" \
        python -m hvdtrain doctor --job --run-dir "$run_dir" --json "$found" "${recipe_words[@]}"
    case $code in
    "$EXIT_OK") return ;;
    124 | 137) say "not started: the preflight has not ended in time; a node hangs" && code=$EXIT_CRASH ;;
    *) say "not started: the preflight ended with exit code $code" ;;
    esac
    if [ "$code" = "$EXIT_CRASH" ] && [ -e "$found" ]; then
        bad=$(python -c 'import json, sys; print(*json.load(open(sys.argv[1]))["bad_nodes"], sep=",")' "$found")
    fi
    [ -n "$bad" ] || exit "$code"
    if [ "${HVDTRAIN_EXCLUDE_BAD:-0}" = 1 ]; then
        next_link "--exclude=$bad" "$@"
    else
        say "without them: sbatch --exclude=$bad ...; HVDTRAIN_EXCLUDE_BAD=1 does so by itself"
    fi
    exit "$code"
}
