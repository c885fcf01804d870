# The agent: one binary, no root, a read-only file system but for /var/lib/coffer.
#   docker build -f docker/agent.Dockerfile -t pg_coffer/agent .
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p coffer

FROM debian:12-slim
# pg_dump takes the schema with each base, pg_restore and psql bring it back.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates postgresql-client-15 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10187 --home-dir /var/lib/coffer coffer \
 && install -d -o coffer -g coffer -m 0700 /var/lib/coffer /var/lib/coffer/spool
COPY --from=build /src/target/release/coffer /usr/local/bin/coffer
USER 10187:10187
VOLUME /var/lib/coffer
EXPOSE 9187
HEALTHCHECK --interval=30s --timeout=10s CMD ["coffer", "status", "--json"]
ENTRYPOINT ["coffer"]
CMD ["run"]
