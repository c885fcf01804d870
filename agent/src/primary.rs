//! Which of a source's hosts the log follows.
//!
//! After a promotion two servers may call themselves primaries: the one that was left behind comes back and takes writes,
//! and whoever dials a list of hosts from its beginning meets that one. So no host is followed for its place in the list.
//! Each is asked who it is, and compared with what the log knows of the timelines; among those that fit, the newest
//! timeline is followed. Two servers that were promoted apart from each other have the same number for different
//! timelines: where they were left tells them apart.

use crate::dsn::{Dsn, Host, Server};
use crate::error::{Error, Kind, Result};
use crate::replication::client::{Identity, ReplicationClient, Switch};
use crate::sql;
use coffer_wire::Lsn;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::time::Duration;

/// How long the other hosts may take to say who they are once one fits: a host that is down holds no stream up.
const OTHERS: Duration = Duration::from_secs(3);
/// How long a host may take to say who it is, once it is connected.
const ANSWER: Duration = Duration::from_secs(30);

/// What the log says of the server that it follows.
#[derive(Clone, Debug, Default)]
pub struct Followed {
    pub source: String,
    pub system_identifier: u64,
    pub timeline: u32,
    /// Where timelines before it were left, as far as it is known.
    pub switches: Vec<Switch>,
    pub durable: Lsn,
}

/// A server that can be followed.
pub struct Found {
    pub client: ReplicationClient,
    pub server: Server,
    pub identity: Identity,
    /// How its timeline came about; empty where nobody needs to know.
    pub history: Vec<Switch>,
}

/// Connects to the host to follow; without a log, to the primary with the newest timeline.
///
/// # Errors
/// When none will do, what is the matter with each. `Unreachable` as long as one of several may become the one.
pub async fn find(dsn: &Dsn, log: Option<&Followed>) -> Result<Found> {
    let (mut fits, others) = ask(dsn.hosts.iter().map(|host| look(dsn, host, log))).await;
    fits.sort_by_key(|(i, f)| (std::cmp::Reverse(f.identity.timeline), *i));
    let Some((_, found)) = fits.into_iter().next() else { return Err(none_of(others)) };
    for e in others {
        tracing::debug!("passed over: {e}");
    }
    Ok(found)
}

/// One host of several for a command, which has no stream to go by: the primary with the newest timeline. Where there is
/// none, connecting says why.
pub async fn newest(dsn: &Dsn) -> Result<Dsn> {
    if dsn.hosts.len() < 2 {
        return Ok(dsn.clone());
    }
    let (mut met, _) = ask(dsn.hosts.iter().map(|host| sql::meet(dsn, host))).await;
    met.sort_by_key(|(i, s)| (std::cmp::Reverse(s.timeline), *i));
    Ok(met.first().map_or_else(|| dsn.clone(), |(_, s)| dsn.with_host(&s.host)))
}

/// What every host answers, with its place in the list: those that fit, and what is the matter with the others. Once one
/// fits, the others have a moment left.
async fn ask<T>(hosts: impl Iterator<Item = impl Future<Output = Result<T>>>) -> (Vec<(usize, T)>, Vec<Error>) {
    let mut asked: FuturesUnordered<_> = hosts.enumerate().map(|(i, host)| async move { (i, host.await) }).collect();
    let (mut fits, mut others) = (Vec::new(), Vec::new());
    let mut until = None;
    loop {
        let next = match until {
            None => asked.next().await,
            Some(t) => tokio::time::timeout_at(t, asked.next()).await.unwrap_or(None),
        };
        match next {
            None => break,
            Some((i, Ok(found))) => {
                fits.push((i, found));
                until.get_or_insert(tokio::time::Instant::now() + OTHERS);
            }
            Some((i, Err(e))) => others.push((i, e)),
        }
    }
    others.sort_by_key(|(i, _)| *i);
    (fits, others.into_iter().map(|(_, e)| e).collect())
}

async fn look(dsn: &Dsn, host: &Host, log: Option<&Followed>) -> Result<Found> {
    let mut client = ReplicationClient::connect_at(dsn, host).await?;
    let asking = async {
        let identity = client.identify().await?;
        let is_standby = client.is_standby();
        if let Some(log) = log {
            log.same_system(host, &identity)?;
        }
        refuse_standby(host, is_standby)?;
        let mut history = Vec::new();
        if let Some(log) = log {
            log.not_older(host, &identity)?;
            history = history_of(&mut client, &identity, log).await?;
            log.descends(host, &identity, &history)?;
        }
        let started_us = started_us(&mut client).await?;
        let Identity { system_identifier, timeline, .. } = identity;
        Ok::<_, Error>((identity, history, Server { host: host.clone(), system_identifier, timeline, started_us }))
    };
    let (identity, history, server) = tokio::time::timeout(ANSWER, asking)
        .await
        .map_err(|_| Error::new(Kind::Unreachable, format!("{host} does not say who it is")))??;
    Ok(Found { client, server, identity, history })
}

async fn started_us(client: &mut ReplicationClient) -> Result<i64> {
    let sql = "SELECT (EXTRACT(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::int8";
    let rows = client.query(sql).await?;
    let text = rows.first().and_then(|r| r.first()).cloned().flatten();
    text.and_then(|t| t.parse().ok()).ok_or_else(|| Error::other("the server does not say when it started"))
}

async fn history_of(client: &mut ReplicationClient, identity: &Identity, log: &Followed) -> Result<Vec<Switch>> {
    if identity.timeline < 2 {
        return Ok(Vec::new());
    }
    match client.timeline_history(identity.timeline).await {
        // There is nothing that it could be compared with.
        Err(e) if e.kind() != Kind::Unreachable && identity.timeline == log.timeline && log.switches.is_empty() => {
            tracing::debug!("the history of timeline {} is not known: {e}", identity.timeline);
            Ok(Vec::new())
        }
        r => r,
    }
}

/// Later versions decode on a standby. Bases need a primary, and a marker, so nothing is begun there.
fn refuse_standby(host: &Host, is_standby: bool) -> Result<()> {
    if !is_standby {
        return Ok(());
    }
    Err(Error::new(Kind::Refused, format!("the server {host} is a standby: tenants are backed up from the primary"))
        .code("standby")
        .hint("let [source.NAME] url name the primary; with several hosts in it, add target_session_attrs=primary"))
}

impl Followed {
    fn same_system(&self, host: &Host, server: &Identity) -> Result<()> {
        if server.system_identifier == self.system_identifier {
            return Ok(());
        }
        Err(Error::new(
            Kind::Refused,
            format!(
                "the server {host} is system {}, the log of source {} is of system {}",
                server.system_identifier, self.source, self.system_identifier
            ),
        )
        .code("other_system")
        .hint("the connection string leads to another cluster; a new cluster is a new [source.NAME]"))
    }

    fn not_older(&self, host: &Host, server: &Identity) -> Result<()> {
        if server.timeline < self.timeline {
            let what = format!("{host}: the server is on timeline {}, the log on {}", server.timeline, self.timeline);
            return Err(Error::new(Kind::Fenced, what)
                .code("old_timeline")
                .hint("this server was left behind by a promotion: point the source at the new primary"));
        }
        if server.timeline == self.timeline && server.flushed < self.durable {
            return Err(went_back(host, server, self.durable));
        }
        Ok(())
    }

    fn descends(&self, host: &Host, server: &Identity, history: &[Switch]) -> Result<()> {
        let left = |timeline| history.iter().find(|s| s.timeline == timeline);
        if server.timeline > self.timeline && left(self.timeline).is_none() {
            let what = format!(
                "{host}: timeline {} does not descend from the log's timeline {}",
                server.timeline, self.timeline
            );
            return Err(Error::new(Kind::Refused, what)
                .code("other_history")
                .hint("the server was restored from elsewhere; a new history is a new [source.NAME]"));
        }
        for known in self.switches.iter().filter(|s| s.timeline < server.timeline) {
            let theirs = match left(known.timeline) {
                Some(s) if s.at == known.at => continue,
                Some(s) => format!("left timeline {} at {}", s.timeline, s.at),
                None => format!("was never on timeline {}", known.timeline),
            };
            let what = format!(
                "{host}: timeline {} there {theirs}, and the log of source {} left timeline {} at {}: the two were \
                 promoted apart from each other",
                server.timeline, self.source, known.timeline, known.at
            );
            return Err(Error::new(Kind::Refused, what)
                .code("timeline_diverged")
                .hint("point the source at the server that the log follows; a new history is a new [source.NAME]"));
        }
        Ok(())
    }
}

/// The server's log ends before what was read of it.
pub fn went_back(host: &Host, server: &Identity, read: Lsn) -> Error {
    Error::new(
        Kind::Refused,
        format!(
            "{host}: the server's log ends at {} on timeline {}, and was read up to {read}: the server was put \
             back to an earlier state, and would use the same positions for other changes",
            server.flushed, server.timeline
        ),
    )
    .code("went_back")
    .hint(
        "a new history is a new [source.NAME]; only recovery to a point in time, with nothing written before it ends, \
         gives the server a timeline that this log can follow",
    )
}

/// Whether an error may pass by itself.
pub fn may_pass(e: &Error) -> bool {
    match e.kind() {
        Kind::Unreachable | Kind::Other | Kind::Verification | Kind::NotFound => true,
        // Another agent, or the server has not noticed yet that our last connection is gone.
        Kind::Fenced => e.is_code("slot_in_use"),
        _ => false,
    }
}

/// One error of those that each host gave.
fn none_of(mut all: Vec<Error>) -> Error {
    if all.len() < 2 {
        return all.pop().unwrap_or_else(|| Error::usage("the connection string names no host"));
    }
    let text = all.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let what = format!("none of {} hosts is the server that is followed: {text}", all.len());
    let standbys = all.iter().filter(|e| e.is_code("standby")).count();
    // A standby beside a server that was left behind is about to be promoted, or was and is not up yet.
    if all.iter().any(may_pass) || (1..all.len()).contains(&standbys) {
        return Error::new(Kind::Unreachable, what);
    }
    let first = all.swap_remove(0);
    first.saying(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host { name: "db".into(), addr: None, port: 5432 }
    }

    fn server(timeline: u32, flushed: u64) -> Identity {
        Identity { system_identifier: 7, timeline, flushed: Lsn(flushed), dbname: "d".into() }
    }

    fn switch(timeline: u32, at: u64) -> Switch {
        Switch { timeline, at: Lsn(at) }
    }

    /// The code of the refusal, or nothing.
    fn judged(log: &Followed, server: &Identity, history: &[Switch]) -> Option<&'static str> {
        let all = log
            .same_system(&host(), server)
            .and_then(|()| log.not_older(&host(), server))
            .and_then(|()| log.descends(&host(), server, history));
        let codes = ["other_system", "old_timeline", "went_back", "other_history", "timeline_diverged"];
        all.err().map(|e| codes.into_iter().find(|c| e.is_code(c)).expect("a code"))
    }

    #[test]
    fn a_timeline_is_told_by_where_it_began() {
        let log = Followed {
            source: "shop".into(),
            system_identifier: 7,
            timeline: 2,
            switches: vec![switch(1, 100)],
            durable: Lsn(150),
        };
        assert_eq!(judged(&log, &server(2, 200), &[switch(1, 100)]), None);
        assert_eq!(judged(&log, &server(3, 120), &[switch(1, 100), switch(2, 110)]), None);
        assert_eq!(judged(&log, &server(2, 200), &[switch(1, 90)]), Some("timeline_diverged"));
        assert_eq!(judged(&log, &server(3, 200), &[switch(1, 90), switch(2, 110)]), Some("timeline_diverged"));
        assert_eq!(judged(&log, &server(2, 200), &[]), Some("timeline_diverged"));
        assert_eq!(judged(&log, &server(3, 200), &[switch(1, 90)]), Some("other_history"));
        assert_eq!(judged(&log, &server(1, 900), &[]), Some("old_timeline"));
        assert_eq!(judged(&log, &server(2, 140), &[switch(1, 100)]), Some("went_back"));
        assert_eq!(judged(&log, &Identity { system_identifier: 8, ..server(2, 200) }, &[]), Some("other_system"));
        // What the log does not know cannot be compared.
        let young = Followed { switches: Vec::new(), ..log };
        assert_eq!(judged(&young, &server(2, 200), &[switch(1, 90)]), None);
    }

    #[test]
    fn of_several_hosts_one_that_may_come_keeps_the_agent_waiting() {
        let old = || Error::new(Kind::Fenced, "a: on timeline 1").code("old_timeline");
        let standby = || Error::new(Kind::Refused, "b: a standby").code("standby");
        let away = || Error::new(Kind::Unreachable, "c: away");
        assert!(none_of(vec![old()]).is_code("old_timeline"));
        for waits in [vec![old(), away()], vec![standby(), old()]] {
            let e = none_of(waits);
            assert_eq!(e.kind(), Kind::Unreachable);
            assert!(e.message().contains("a: on timeline 1"), "{e}");
        }
        let e = none_of(vec![old(), old()]);
        assert!(e.is_code("old_timeline") && e.kind() == Kind::Fenced, "{e}");
        assert!(none_of(vec![standby(), standby()]).is_code("standby"));
    }
}
