#!/usr/bin/env bash
# A Ray cluster on this machine alone: a head without task CPUs and workers with a raylet each, all on loopback.
#
#   bash cluster/local.sh start [WORKERS]    2 workers unless told otherwise; prints the dashboard's address
#   bash cluster/local.sh status
#   bash cluster/local.sh stop               ends what `start` started here, and no other Ray
#
# In the environment, with the defaults:
#   WORKER_CPUS=1  WORKER_GPUS=0             of each worker; GPUs by name only, unless the machine has them
#   STORE_BYTES=268435456                    object store of each raylet
#   GCS_PORT=6379  DASHBOARD_PORT=8265
#   RAY_AUTH_MODE=disabled                   `token`: the cluster asks for a token, which is made where there is none;
#                                            `disabled` will do where no one else can log in to this machine
#   CLUSTER_FOLDER=${TMPDIR:-/tmp}/epic-ray-cluster-USERID    process ids and logs
set -euo pipefail

WORKER_CPUS=${WORKER_CPUS:-1}
WORKER_GPUS=${WORKER_GPUS:-0}
STORE_BYTES=${STORE_BYTES:-268435456}
GCS_PORT=${GCS_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
CLUSTER_FOLDER=${CLUSTER_FOLDER:-${TMPDIR:-/tmp}/epic-ray-cluster-$(id -u)}
HOST=127.0.0.1
WAIT_SECONDS=60
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled} RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS    # it would send `ray start` elsewhere

say() { printf '%s\n' "$*" >&2; }

# A process id is reused some day: the time of its start tells whether it is still ours.
# One that has ended and that nobody has asked after (state Z) is gone.
started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }'; }

is_ours() {    # FILE
    local pid stamp
    { read -r pid; read -r stamp; } <"$1"
    [[ -n $stamp && $(started_at "$pid") == "$stamp" ]]
}

launch() {    # NAME RAY-START-ARGUMENTS...
    local name=$1 pid
    shift
    # a session of its own, which holds every process of this raylet
    setsid ray start --block --node-ip-address="$HOST" --object-store-memory="$STORE_BYTES" \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 "$@" >"$CLUSTER_FOLDER/$name.log" 2>&1 </dev/null &
    pid=$!
    printf '%s\n%s\n' "$pid" "$(started_at "$pid")" >"$CLUSTER_FOLDER/$name.pid"
}

answers() {    # PORT
    (exec 3<>"/dev/tcp/$HOST/$1") 2>/dev/null
}

has_started() {    # NAME
    grep -q "Ray runtime started" "$CLUSTER_FOLDER/$1.log"
}

await() {    # NAME COMMAND...
    local name=$1 left=$WAIT_SECONDS
    shift
    until "$@"; do
        if ! is_ours "$CLUSTER_FOLDER/$name.pid" || ((left-- == 0)); then
            say "$name did not come up; its last lines:"
            tail -n 8 "$CLUSTER_FOLDER/$name.log" >&2
            stop
            exit 4
        fi
        sleep 1
    done
}

start() {
    local workers=${1:-2} number
    if ! [[ $workers =~ ^[0-9]+$ ]]; then
        say "WORKERS: expected a whole number, not $workers"
        exit 2
    fi
    [[ -r /proc/self/stat ]] || { say "this script needs Linux"; exit 2; }
    command -v ray >/dev/null || { say "ray is not on PATH; activate the environment that has epic-ray"; exit 2; }
    mkdir -p -m 700 "$CLUSTER_FOLDER"
    if compgen -G "$CLUSTER_FOLDER/*.pid" >/dev/null; then
        say "a cluster was started from $CLUSTER_FOLDER; stop it first"
        exit 2
    fi
    for number in "$GCS_PORT" "$DASHBOARD_PORT"; do
        if answers "$number"; then
            say "port $number is taken; set GCS_PORT or DASHBOARD_PORT"
            exit 2
        fi
    done
    if [[ $RAY_AUTH_MODE == token ]]; then
        ray get-auth-token --generate >/dev/null
    fi
    launch head --head --port="$GCS_PORT" --num-cpus=0 --num-gpus=0 \
        --dashboard-host="$HOST" --dashboard-port="$DASHBOARD_PORT" --include-dashboard=true
    await head answers "$GCS_PORT"
    await head answers "$DASHBOARD_PORT"
    for ((number = 1; number <= workers; number++)); do
        launch "worker-$number" --address="$HOST:$GCS_PORT" --num-cpus="$WORKER_CPUS" --num-gpus="$WORKER_GPUS" \
            --include-log-monitor=false
        await "worker-$number" has_started "worker-$number"    # those that start at once get in one another's way
    done
    say "$workers workers; logs in $CLUSTER_FOLDER"
    if [[ $RAY_AUTH_MODE == token ]]; then
        say "the cluster asks for a token: export RAY_CLUSTER_TOKEN=\$(ray get-auth-token), and token_env in the file"
    fi
    printf 'http://%s:%s\n' "$HOST" "$DASHBOARD_PORT"
}

status() {
    local file code=3
    for file in "$CLUSTER_FOLDER"/*.pid; do
        [[ -e $file ]] || break
        code=0
        if is_ours "$file"; then
            printf '%s runs\n' "$(basename "$file" .pid)"
        else
            printf '%s ended; see %s\n' "$(basename "$file" .pid)" "${file%.pid}.log"
            code=4
        fi
    done
    ((code == 3)) && printf 'nothing was started\n'
    return "$code"
}

end_session() {    # FILE
    local pid left=10
    read -r pid <"$1"
    if is_ours "$1"; then
        kill -TERM "$pid" 2>/dev/null || true
        while is_ours "$1" && ((left-- > 0)); do sleep 1; done
        # what is left of the session that this process leads
        pkill -KILL -s "$pid" 2>/dev/null || true
    fi
    rm -f "$1"
}

stop() {
    local file
    for file in "$CLUSTER_FOLDER"/worker-*.pid "$CLUSTER_FOLDER/head.pid"; do
        [[ -e $file ]] && end_session "$file"
    done
    return 0
}

case ${1:-} in
    start) start "${2:-}" ;;
    status) status ;;
    stop) stop ;;
    *)
        say "usage: bash cluster/local.sh start [WORKERS] | status | stop"
        exit 2
        ;;
esac
