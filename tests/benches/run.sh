#!/usr/bin/env bash
# Builds the extension and the agent in release and runs the benchmarks; arguments choose by name.
# tests/setup.sh has run before, so that target/env.sh says where PostgreSQL and the packages are.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
. target/env.sh
export PGRX_HOME=$ROOT/target/pgrx CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1
export PATH=$ROOT/target/tools/bin:$PATH
JOBS=${CARGO_BUILD_JOBS:-$(nproc)}
say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

# What one of them compares with.
case " ${*:-one-of-100} " in *one*|*100*)
  if ! command -v pgbackrest >/dev/null; then
    SUDO=
    [ "$(id -u)" = 0 ] || SUDO=sudo
    say "installing the Debian package pgbackrest"
    $SUDO apt-get update -qq
    $SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends pgbackrest >/dev/null
  fi ;;
esac

say "building the extension in release"
OUT=target/package-release/15
mkdir -p target/package-release
cargo pgrx package -p pg_coffer --manifest-path pg_extension/Cargo.toml --pg-config "$COFFER_PG15_BIN/pg_config" \
  --out-dir "$OUT" >target/package-release.log 2>&1 || { cat target/package-release.log >&2; exit 1; }
say "building the agent in release"
cargo build -q --release -p coffer -j "$JOBS"
# What `compaction` compares with: the same crate's parts, alone.
COFFER_PARTS_BIN=$(cargo bench -q -p coffer --bench parts --no-run --message-format json -j "$JOBS" |
  sed -n 's/.*"executable":"\([^"]*\/parts-[^"]*\)".*/\1/p' | tail -1)
export COFFER_PARTS_BIN

# The packages lie where setup.sh found that the user of the clusters can read them.
BASE=$(dirname "$(dirname "$COFFER_PG15_PACKAGE")")
if [ "$BASE" != "$ROOT/target" ]; then
  mkdir -p "$BASE/package-release"
  cp -a --remove-destination "$OUT" "$BASE/package-release/"
  chmod -R a+rX "$BASE/package-release"
fi
export COFFER_PG15_PACKAGE=$BASE/package-release/15
export COFFER_PG15_LIB=$COFFER_PG15_PACKAGE/usr/lib/postgresql/15/lib
export COFFER_BIN=$ROOT/target/release/coffer
export COFFER_BENCH_JSON=$ROOT/target/bench.json
cargo bench -q -p coffer-tests --bench side_by_side -- "$@"
