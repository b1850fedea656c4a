#!/usr/bin/env bash
# All sites of a folder on this machine, by Flower's simulation runtime, which starts no terminal a site:
#
#   bash flower/simulate.sh DATA OUT [key=value ...]     DATA: one folder a site; OUT: the run folder, new
#
# It needs flower/requirements-simulation.txt. CPUS and GPUS are what one site takes at a time, so that as many train
# at once as fit; TIMEOUT is the seconds that a round may take; PORT is used on 127.0.0.1 alone. Of what the sites print
# only errors and warnings are shown; their results lie in OUT_sites.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '4p' "$0" >&2; exit 2; }
[ -d "$1" ] || { echo "error: $1: there is no such folder of sites" >&2; exit 2; }
data=$(realpath "$1") out=$(realpath -m "$2"); shift 2
cd "$(dirname "$0")/.."
port=${PORT:-18000}
if (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then echo "error: port $port is in use, set PORT" >&2; exit 2; fi
export FLWR_HOME; FLWR_HOME=$(mktemp -d)
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export RAY_USAGE_STATS_ENABLED=0 RAY_DEDUP_LOGS=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
sites=$(find -L "$data" -mindepth 1 -maxdepth 1 -type d -not -name '.*' | wc -l)

# The server; it is stopped, and its folder removed, whatever happens.
flower-superlink --insecure --simulation --host 127.0.0.1 --port "$port" &> "$FLWR_HOME/superlink.log" &
server=$!
trap 'kill $server 2> /dev/null || true; wait $server 2> /dev/null || true; rm -rf "$FLWR_HOME"' EXIT
until grep -qs "running on" "$FLWR_HOME/superlink.log"; do  # its own log, for another's server answers at a port as well
  kill -0 $server 2> /dev/null || { cat "$FLWR_HOME/superlink.log" >&2; echo "error: the server did not start, see above" >&2; exit 1; }
  sleep 0.5
done
printf '[superlink.simulation]\naddress = "127.0.0.1:%s"\ninsecure = true\n' "$port" > "$FLWR_HOME/config.toml"

flwr run . simulation --stream \
  --federation-config \
  "num-supernodes=$sites client-resources-num-cpus=${CPUS:-1} client-resources-num-gpus=${GPUS:-0}" \
  --run-config "sites=$sites timeout=${TIMEOUT:-3600} overrides='\"data=$data\" \"out=$out\" $*'" \
  | awk '!/ClientAppActor/ || /rror|arning/ { print; fflush() }'
[ "$out/result.json" -nt "$FLWR_HOME/config.toml" ] && exit  # one of an earlier run does not count
mkdir -p "$(dirname "$out")" && cp "$FLWR_HOME/superlink.log" "$out.log"
echo "error: the run did not end well, see above and $out.log" >&2
exit 1
