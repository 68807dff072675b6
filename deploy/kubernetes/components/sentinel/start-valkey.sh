#!/bin/sh
# Starts this pod's Valkey: as a replica of the primary that the sentinels name, else of pod 0, which starts as primary.
set -eu
domain=nermill-valkey
self="$HOSTNAME.$domain"
primary=""
for pod in 0 1 2; do
    answer="$(timeout 3 valkey-cli -h "nermill-valkey-$pod.$domain" -p 26379 sentinel get-master-addr-by-name nermill 2>/dev/null | head -n 1 || true)"
    case "$answer" in nermill-valkey-*) primary="$answer"; break ;; esac
done
primary="${primary:-nermill-valkey-0.$domain}"
set -- --dir /data --appendonly yes --appendfsync everysec --save "" --maxmemory 1gb --maxmemory-policy noeviction \
    --requirepass "$VALKEY_PASSWORD" --masterauth "$VALKEY_PASSWORD" --replica-announce-ip "$self" \
    --min-replicas-to-write 1 --min-replicas-max-lag 10
if [ "$primary" != "$self" ]; then
    set -- "$@" --replicaof "$primary" 6379
fi
exec valkey-server "$@"
