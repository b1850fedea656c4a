#!/usr/bin/env bash
# Two hospitals and a server on this machine, first without TLS, then with TLS and registered keys:
#
#   bash flower/try_it.sh [FOLDER]        logs, keys and run folders go to FOLDER, which must be new
#
# Everything listens on 127.0.0.1 alone, ends after at most LIMIT seconds a run, and is stopped when the script
# ends. Other data, ports or settings: DATA=... PORT=... OVERRIDES="rounds=5 ..." TIMEOUT=... bash flower/try_it.sh
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-runs/flower}")
port=${PORT:-18000}
limit=${LIMIT:-900}
export FLWR_HOME="$folder" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
if [ -e "$folder" ]; then echo "error: $folder: is there already, give another folder" >&2; exit 2; fi
for taken in "$port" $((port + 1)) $((port + 2)); do
  if (: < "/dev/tcp/127.0.0.1/$taken") 2> /dev/null; then echo "error: port $taken is in use, set PORT" >&2; exit 2; fi
done
mkdir -p "$folder"

# The data: two of the four generated sites, unless DATA names a folder with the sites east and north.
data=${DATA:-$PWD/data/demo_nuclei}
[ -n "${DATA:-}" ] || python -c "from sites.demo_data import ensure; ensure('nuclei')"

# What was started, and is stopped again whatever happens.
started=()
stop() { [ ${#started[@]} -eq 0 ] || kill "${started[@]}" 2> /dev/null || true; wait 2> /dev/null || true; started=(); }
trap stop EXIT
start() { local log=$1; shift; timeout "$limit" "$@" &> "$folder/$log.log" & started+=($!); }

# A run: the server, what `prepare` does there, the two hospitals, and the rounds, shown as they come.
federate() {
  local name=$1
  printf '[superlink.loop]\naddress = "127.0.0.1:%s"\n%s\n' "$port" "$trust" > "$folder/config.toml"
  FEDBCS_OUT="$folder/$name" start "$name" flower-superlink "${link[@]}" --host 127.0.0.1 --port "$port" --database "$folder/$name.db"
  until grep -qs "running on" "$folder/$name.log"; do  # its own log, for another's server answers at a port as well
    kill -0 ${started[0]} 2> /dev/null || { cat "$folder/$name.log" >&2; echo "error: the server did not start, see above" >&2; exit 1; }
    sleep 0.5
  done
  prepare
  hospital "$name" east $((port + 1)) "${east[@]}"
  hospital "$name" north $((port + 2)) "${north[@]}"
  timeout "$limit" flwr run . loop --stream --run-config \
    "timeout=${TIMEOUT:-600} overrides='${OVERRIDES:-rounds=3}'"
  stop
  [ -e "$folder/$name/result.json" ] || { echo "error: the run $name did not end well, see $folder/$name*.log" >&2; exit 1; }
}
hospital() {  # run, site, port, how it knows the server and proves itself; for signed code alone see README.md
  local name=$1 site=$2 own=$3; shift 3
  start "${name}_$site" flower-supernode "$@" --superlink "127.0.0.1:$port" --host 127.0.0.1 --port "$own" \
    --node-config "site='$site' data='$data/$site' out='$folder/${name}_$site'"
}

# 1. Without TLS: for a machine of one's own alone.
trust='insecure = true'
link=(--insecure) east=(--insecure) north=(--insecure)
prepare() { :; }
federate plain

# 2. With TLS and keys: a node without a key, or with one that is not registered, never joins.
keys="$folder/keys"
python -m flower.make_certificates "$keys" east north
trust="root-certificates = '$keys/ca.crt'"
link=(--ssl-ca-certfile "$keys/ca.crt" --ssl-certfile "$keys/server.pem" --ssl-keyfile "$keys/server.key" --enable-supernode-auth)
node=(--root-certificates "$keys/ca.crt" --auth-supernode-private-key)
east=("${node[@]}" "$keys/east") north=("${node[@]}" "$keys/north")
prepare() { for site in east north; do flwr supernode register "$keys/$site.pub" loop --name "$site"; done; }
federate tls
echo "both runs ended well: $folder/plain and $folder/tls, the hospitals' own folders beside them"
