#!/usr/bin/env bash
# Two nodes on one machine: two network namespaces joined by a cable (veth), each with a loopback of its own.
#   unshare -Urnpf --mount-proc --kill-child tests/distributed/two_nodes.sh ACCELERATE_LAUNCH_WITH_ITS_ARGUMENTS...
# Node 0 has 10.77.0.1, node 1 has 10.77.0.2. In the arguments NODE becomes the number of the node. Ends with the
# status of node 0, or of node 1 where only that failed; a line of JSON says what node 1 received over the cable.
set -u
ip link set dev lo up
ip link add name lgp0 type veth peer name lgp1

# shellcheck disable=SC2016  # $1 and $@ are the inner shell's
GLOO_SOCKET_IFNAME=lgp1 unshare -n bash -c '
    until ip link show dev lgp1 > /dev/null 2>&1; do sleep 0.1; done
    ip link set dev lo up
    ip address add 10.77.0.2/24 dev lgp1
    ip link set dev lgp1 up
    "$@"
    status=$?
    ip -s -j link show dev lgp1 # before it goes with this namespace
    exit "$status"' node "${@//NODE/1}" &
other=$!
until [ "$(readlink "/proc/$other/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link set dev lgp1 netns "$other"
ip address add 10.77.0.1/24 dev lgp0
ip link set dev lgp0 up

GLOO_SOCKET_IFNAME=lgp0 "${@//NODE/0}"
status=$?
wait "$other" || status=$((status ? status : $?))
exit "$status"
