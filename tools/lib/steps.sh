# shellcheck shell=bash disable=SC2154
# Sourced by tools/test: runs the steps of its table, times them, counts their tests, sums up.

steps_main() {
    local keep_going='' only=''
    while [ $# -gt 0 ]; do
        case $1 in
        --keep-going) keep_going=1 ;;
        --only=*) only=${1#*=} ;;
        --only)
            [ $# -gt 1 ] || steps_bad_usage "--only needs a step"
            only=$2
            shift
            ;;
        --list) steps_list && return ;;
        --help) usage && return ;;
        --inside)
            # How a step's own process starts: see steps_run.
            setup_environment
            export CARGO_TERM_COLOR=never
            # A machine that builds once gains nothing from incremental files.
            [ -z "${CI-}" ] || export CARGO_INCREMENTAL=0
            "step_$2"
            return
            ;;
        *) steps_bad_usage "unknown argument $1" ;;
        esac
        shift
    done
    steps_check_names "$only"
    steps_run_all "$only" "$keep_going"
}

steps_bad_usage() {
    printf 'test: %s (see --help)\n' "$*" >&2
    exit 64
}

steps_list() {
    local name limit kind what
    while read -r name limit kind what; do
        printf '%-8s %5s s  %s\n' "$name" "$limit" "$what"
    done < <(printf '%s\n' "${steps[@]}")
}

steps_check_names() {
    local name
    for name in ${1//,/ }; do
        declare -F "step_$name" >/dev/null || steps_bad_usage "no step named $name"
    done
}

# Runs the wanted steps in the table's order; returns whether all passed.
steps_run_all() {
    local only=$1 keep_going=$2 name limit kind what stopped=''
    passed=0 failed=0 table=() logs=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$logs'" EXIT
    while read -r name limit kind what <&3; do
        case ,$only, in ,, | *,"$name",*) ;; *) continue ;; esac
        if [ -n "$stopped" ]; then
            table+=("$(printf '%-8s %-8s' "$name" 'not run')")
            continue
        fi
        steps_run "$name" "$limit" "$kind" "$what" || [ -n "$keep_going" ] || stopped=1
    done 3< <(printf '%s\n' "${steps[@]}")
    printf '\n%-8s %-8s %8s %8s\n' step result seconds passed
    printf '%s\n' "${table[@]}"
    printf '\n%s passed, %s failed\n' "$passed" "$failed"
    [ "$failed" = 0 ]
}

# Runs one step in a process of its own, so that a time limit can end it, whatever it started.
steps_run() {
    local name=$1 limit=$2 kind=$3 what=$4 log=$logs/$1.log start=$SECONDS status=0 result=ok
    local step_passed step_failed
    printf '\n==> %s: %s\n' "$name" "$what"
    timeout --kill-after=10 "$limit" "$BASH" "$0" --inside "$name" </dev/null 2>&1 | tee "$log" ||
        status=${PIPESTATUS[0]}
    read -r step_passed step_failed < <(steps_count "$log")
    [ "$status" != 124 ] || printf '%s: not done after %s s\n' "$name" "$limit"
    if [ "$status" = 0 ] && [ "$kind" = tests ] && [ "$step_passed" = 0 ]; then
        printf '%s: no test was run\n' "$name"
        status=1
    fi
    if [ "$status" = 0 ] && [ "$step_failed" != 0 ]; then
        printf '%s: failed tests, but the exit status was 0\n' "$name"
        status=1
    fi
    # A step that has no tests of its own counts as one, and so does a failure that no test told.
    [ "$status" != 0 ] || [ "$step_passed" != 0 ] || step_passed=1
    [ "$status" = 0 ] || [ "$step_failed" != 0 ] || step_failed=1
    [ "$status" = 0 ] || result=FAILED
    passed=$((passed + step_passed)) failed=$((failed + step_failed))
    table+=("$(printf '%-8s %-8s %8s %8s' "$name" "$result" $((SECONDS - start)) "$step_passed")")
    printf -- '--- %s: %s, %s s\n' "$name" "$result" $((SECONDS - start))
    return "$status"
}

# Prints how many tests passed and failed by a log: the lines of Rust's own test runner, and the
# closing line of our scripts.
steps_count() {
    awk '
        /^test result: / {
            for (i = 2; i <= NF; i++) {
                if ($i == "passed;") passed += $(i - 1)
                if ($i == "failed;") failed += $(i - 1)
            }
        }
        /^[0-9]+ passed, [0-9]+ failed$/ { passed += $1; failed += $3 }
        END { print passed + 0, failed + 0 }
    ' "$1"
}
