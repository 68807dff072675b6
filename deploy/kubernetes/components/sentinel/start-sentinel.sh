#!/bin/sh
# Starts this pod's Sentinel. Sentinel rewrites its file, so the file lies on the pod's volume and is made only once.
set -eu
domain=nermill-valkey
file=/data/sentinel.conf
if [ ! -f "$file" ]; then
    umask 077
    cat > "$file" <<CONF
port 26379
dir /tmp
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $HOSTNAME.$domain
sentinel monitor nermill nermill-valkey-0.$domain 6379 2
sentinel auth-pass nermill $VALKEY_PASSWORD
sentinel down-after-milliseconds nermill 5000
sentinel failover-timeout nermill 30000
sentinel parallel-syncs nermill 1
CONF
fi
exec valkey-sentinel "$file"
