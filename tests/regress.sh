#!/usr/bin/env bash
# The golden SQL tests of the extension, by PostgreSQL's own pg_regress, against a private cluster of each version.
#   tests/regress.sh [15] [18] [test…]        default: every version that target/env.sh names, every test
# Reads COFFER_PG15_BIN, COFFER_PG15_PACKAGE, COFFER_PG15_LIB, COFFER_PG18_BIN, COFFER_PG18_SHARE, COFFER_PG18_LIB
# (target/env.sh, which tests/setup.sh writes). Differences are printed; what the tests printed stays in target/regress.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
if [ -z "${COFFER_PG15_BIN:-}" ] && [ -f target/env.sh ]; then . target/env.sh; fi
SUITE=(setup registry accounts large_objects strategies path claims partitions names schemas events decoding decode_types decode_edges reading row_jsonb durability jobs doctor security)

versions=() tests=()
for a in "$@"; do
  case $a in 15 | 18) versions+=("$a") ;; *) tests+=("$a") ;; esac
done
if [ ${#versions[@]} = 0 ]; then
  [ -z "${COFFER_PG15_BIN:-}" ] || versions+=(15)
  [ -z "${COFFER_PG18_BIN:-}" ] || versions+=(18)
fi
[ ${#versions[@]} -gt 0 ] || { echo "error: no PostgreSQL is named; run tests/setup.sh test" >&2; exit 2; }
[ ${#tests[@]} -gt 0 ] || tests=("${SUITE[@]}")

# The PyPI wheel of PostgreSQL 18 has no pg_regress; the one of 15 does for both.
PG_REGRESS=${PG_REGRESS:-$(dirname "$("$COFFER_PG15_BIN/pg_config" --pgxs)")/../test/regress/pg_regress}

as_postgres() { (cd / && if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi); }

DIR=
BIN=
finish() {
  if [ -n "$DIR" ]; then
    as_postgres "$BIN/pg_ctl" -D "$DIR/data" -m immediate -w stop >/dev/null 2>&1 || true
    rm -rf "$DIR"
    DIR=
  fi
}
trap finish EXIT

failed=0
for v in "${versions[@]}"; do
  DIR=$(mktemp -d "${TMPDIR:-/tmp}/coffer-regress.XXXXXX")
  mkdir -p "$DIR/run"
  if [ "$(id -u)" = 0 ]; then chown -R postgres "$DIR"; fi
  chmod 755 "$DIR"
  if [ "$v" = 15 ]; then
    BIN=$COFFER_PG15_BIN
    where="extension_destdir = '$COFFER_PG15_PACKAGE'
dynamic_library_path = '$COFFER_PG15_LIB:\$libdir'"
  else
    BIN=$COFFER_PG18_BIN
    where="extension_control_path = '$COFFER_PG18_SHARE:\$system'
dynamic_library_path = '$COFFER_PG18_LIB:\$libdir'"
  fi
  as_postgres "$BIN/initdb" -D "$DIR/data" -U postgres -A trust --locale=C -E UTF8 --no-sync >/dev/null
  {
    echo "$where"
    echo "listen_addresses = ''"
    echo "unix_socket_directories = '$DIR/run'"
    echo "wal_level = logical"
    echo "fsync = off"
    echo "max_prepared_transactions = 5"
  } >>"$DIR/data/postgresql.conf"
  # Minors from before August 2026 refuse to start with a setting that they do not know.
  if as_postgres "$BIN/postgres" -D "$DIR/data" -C output_plugin_libraries >/dev/null 2>&1; then
    echo "output_plugin_libraries = 'pgoutput, test_decoding, pg_coffer'" >>"$DIR/data/postgresql.conf"
  fi
  as_postgres "$BIN/pg_ctl" -D "$DIR/data" -l "$DIR/run/log" -w -t 60 start >/dev/null || { cat "$DIR/run/log" >&2; exit 1; }

  OUT=$ROOT/target/regress/$v
  rm -rf "$OUT"
  mkdir -p "$OUT"
  echo "golden SQL tests, PostgreSQL $v"
  if ! "$PG_REGRESS" --bindir="$BIN" --host="$DIR/run" --user=postgres --dbname=coffer_regress \
    --inputdir=pg_extension/tests/pg_regress --outputdir="$OUT" "${tests[@]}" >"$OUT/summary" 2>&1; then
    failed=1
    cat "$OUT/summary" "$OUT/regression.diffs" >&2 2>/dev/null || true
  else
    grep -E '^( All|# All|ok|test )' "$OUT/summary" || cat "$OUT/summary"
  fi
  finish
done
exit $failed
