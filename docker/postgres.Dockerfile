# PostgreSQL 15 of Debian 12 with the pg_coffer extension.
#   docker build -f docker/postgres.Dockerfile -t pg_coffer/postgres:15 .
FROM rust:1.95-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends postgresql-server-dev-15 libclang-dev libssl-dev pkg-config \
 && rm -rf /var/lib/apt/lists/*
ENV CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1
RUN cargo install cargo-pgrx --version =0.18.1 --locked --debug \
 && cargo pgrx init --pg15 /usr/lib/postgresql/15/bin/pg_config
WORKDIR /src
COPY . .
RUN cargo pgrx package -p pg_coffer --manifest-path pg_extension/Cargo.toml \
      --pg-config /usr/lib/postgresql/15/bin/pg_config --out-dir /package

FROM postgres:15-bookworm
COPY --from=build /package/usr/ /usr/
# The official image's own entry point; only what the extension needs is added. output_plugin_libraries is set for the
# agent's role by coffer.setup_agent, not here: servers of before August 2026 do not know the setting.
CMD ["postgres", "-c", "wal_level=logical", "-c", "max_wal_senders=10", "-c", "max_replication_slots=10"]
