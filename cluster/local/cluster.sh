#!/usr/bin/env bash
# A Ray cluster of several nodes on one machine, to try jobs and losses before there is a real one.
#
#   cluster/local/cluster.sh up [NODES]     a head and NODES - 1 (1) more nodes; token on, everything on 127.0.0.1
#   eval "$(cluster/local/cluster.sh env)"  let this shell submit jobs to it
#   cluster/local/cluster.sh kill N         SIGKILL all processes of node N (0: the head), as if its plug were pulled
#   cluster/local/cluster.sh start N        bring node N back
#   cluster/local/cluster.sh down           stop what this script has started, and nothing else
#
# MPSCL_CLUSTER_DIR   folder for logs, sockets and the token; short, since sockets lie in it (/tmp/mpscl-UID)
# MPSCL_CLUSTER_PORT  first of the ports, of which it takes this one to this one + 100 (7400), and 1000 above for workers
# MPSCL_CLUSTER_CPUS  CPUs that each node says to have; they are only counted (2)
# MPSCL_CLUSTER_HOST  address that nodes and dashboard listen on (127.0.0.1)
set -euo pipefail

dir=${MPSCL_CLUSTER_DIR:-/tmp/mpscl-$(id -u)}
port=${MPSCL_CLUSTER_PORT:-7400}
cpus=${MPSCL_CLUSTER_CPUS:-2}
host=${MPSCL_CLUSTER_HOST:-127.0.0.1}
wait_s=120

usage() {
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0" >&2
    exit 2
}

processes() { # pids of all processes of node $1: they have its mark in their environment, and pass it on
    local file
    grep -lsz "^MPSCL_CLUSTER_NODE=$dir/$1\$" /proc/[0-9]*/environ | while read -r file; do
        file=${file#/proc/}
        echo "${file%/environ}"
    done || true
}

environment() { # what a process needs to talk to this cluster
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token RAY_USAGE_STATS_ENABLED=0
    unset RAY_AUTH_TOKEN RAY_ADDRESS
}

start_node() {
    local attempt
    [ -z "$(processes "$1")" ] || { echo "node $1 runs already" >&2; exit 1; }
    for attempt in 1 2 3; do # Ray gives its parts half a minute, which a busy machine may exceed
        if begin_node "$1"; then return; fi
        stop_node "$1"
    done
    echo "node $1 did not start in $attempt attempts; its log $dir/node-$1.log ends with:" >&2
    tail -n 20 "$dir/node-$1.log" >&2
    exit 1
}

begin_node() {
    local node=$1 base=$((port + 10 * ($1 + 1))) workers=$((port + 1000 + 300 * $1)) place
    if [ "$node" -eq 0 ]; then
        place=(--head --port "$port" --dashboard-host "$host" --dashboard-port $((port + 1))
            --ray-client-server-port $((port + 2)) --temp-dir "$dir/ray")
    else
        place=(--address "$host:$port")
    fi
    # A job that is stopped gets a minute for its checkpoint. Without draining a node ends at once.
    MPSCL_CLUSTER_NODE=$dir/$node RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-60} \
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 \
        nohup ray start --block "${place[@]}" --node-ip-address "$host" --num-cpus "$cpus" \
        --object-store-memory 200000000 --disable-usage-stats \
        --dashboard-agent-listen-port "$base" --dashboard-agent-grpc-port $((base + 1)) \
        --runtime-env-agent-port $((base + 2)) --metrics-export-port $((base + 3)) \
        --node-manager-port $((base + 4)) --object-manager-port $((base + 5)) \
        --min-worker-port "$workers" --max-worker-port $((workers + 299)) \
        >"$dir/node-$node.log" 2>&1 </dev/null &
    echo $! >"$dir/node-$node.pid"
    for ((i = 0; i < wait_s * 5; i++)); do
        if grep -q "will now block forever" "$dir/node-$node.log"; then return; fi
        kill -0 "$(cat "$dir/node-$node.pid")" 2>/dev/null || return 1
        sleep 0.2
    done
    return 1
}

stop_node() { # SIGTERM to the command that holds the node, which ends the others; SIGKILL for those that are left
    local pid left
    pid=$(cat "$dir/node-$1.pid")
    # shellcheck disable=SC2046  # one word a pid
    if processes "$1" | grep -qx "$pid"; then kill "$pid" || true; fi
    for ((i = 0; i < 100; i++)); do
        [ -n "$(processes "$1")" ] || break
        sleep 0.2
    done
    left=$(processes "$1")
    # shellcheck disable=SC2086  # one word a pid
    if [ -n "$left" ]; then kill -9 $left 2>/dev/null || true; fi
    rm -f "$dir/node-$1.pid"
}

case ${1:-} in
up)
    mkdir -p "$dir"
    chmod 700 "$dir"
    if [ ! -s "$dir/token" ]; then
        (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32))' >"$dir/token")
    fi
    environment
    for ((node = 0; node < ${2:-2}; node++)); do start_node "$node"; done
    echo "the cluster runs; next:"
    echo "  eval \"\$($0 env)\""
    echo "  ray job submit --working-dir . -- python -m mpscl_ray.train run.storage=\$HOME/runs"
    echo "dashboard: http://$host:$((port + 1)), which asks for the token in $dir/token"
    ;;
env)
    echo "export RAY_API_SERVER_ADDRESS=http://$host:$((port + 1)) RAY_ADDRESS=$host:$port"
    echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token RAY_USAGE_STATS_ENABLED=0"
    ;;
kill)
    [ $# -eq 2 ] || usage
    for ((i = 0; i < wait_s * 5; i++)); do # again, for those that were being started meanwhile, until all are gone
        left=$(processes "$2")
        [ -n "$left" ] || break
        # shellcheck disable=SC2086  # one word a pid
        kill -9 $left 2>/dev/null || true
        sleep 0.2
    done
    ;;
start)
    [ $# -eq 2 ] || usage
    environment
    start_node "$2"
    ;;
down)
    for file in $(find "$dir" -maxdepth 1 -name 'node-*.pid' 2>/dev/null | sort -r); do
        node=${file##*/node-}
        stop_node "${node%.pid}"
    done
    rm -rf "$dir/ray" "$dir/token"
    ;;
*)
    usage
    ;;
esac
