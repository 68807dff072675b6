#!/bin/bash
# Loads the CANN and MindIE environments that are there, then becomes the worker, so that signals reach it.
set -eo pipefail
for environment in \
    /usr/local/Ascend/ascend-toolkit/set_env.sh \
    /usr/local/Ascend/mindie/set_env.sh \
    /usr/local/Ascend/aie/set_env.sh; do
    if [ -f "$environment" ]; then
        # shellcheck disable=SC1090
        source "$environment"
    fi
done
exec nermill-worker "$@"
