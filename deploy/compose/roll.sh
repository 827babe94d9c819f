#!/bin/sh
# Replaces the containers of services by new ones of the image and the settings as they are now, one
# service after the other, without failing a request:
#
#   deploy/compose/roll.sh tokenizer engine gateway
#
# Which Compose files: COMPOSE_FILE, as Compose itself reads it (files joined by colons). A gateway
# can only be rolled where GATEWAY_PORT and GATEWAY_HTTP_PORT are ranges with a port to spare.
set -eu
cd "$(dirname "$0")/.."
export COMPOSE_FILE="${COMPOSE_FILE:-compose.yaml}"
compose=${COMPOSE:-docker compose}
# Callers look names up every second and then connect.
settle_s=4
timeout_s=${ROLL_TIMEOUT_S:-180}

for service in "$@"; do
  old=$($compose ps -q "$service")
  count=$(echo "$old" | wc -w)
  $compose up --detach --no-deps --no-recreate --scale "$service=$((2 * count))" "$service"
  for container in $($compose ps -q "$service"); do
    case $old in *"$container"*) continue ;; esac
    waited_s=0
    until docker exec "$container" meshserve probe "$service" >/dev/null 2>&1; do
      if [ "$waited_s" -ge "$timeout_s" ]; then
        echo "$service: the new container $container is not healthy; the old ones stay" >&2
        docker logs --tail 20 "$container" >&2
        exit 1
      fi
      sleep 1
      waited_s=$((waited_s + 1))
    done
  done
  sleep "$settle_s"
  # Each finishes what it has.
  # shellcheck disable=SC2086
  docker stop $old >/dev/null
  # shellcheck disable=SC2086
  docker rm $old >/dev/null
  echo "$service: $count replaced"
done
