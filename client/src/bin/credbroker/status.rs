//! `credbroker status`: how the broker is.

use std::collections::BTreeMap;
use std::process::ExitCode;

use credbroker_client::Status;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{age, or_dash, pairs, rfc3339, yes_or_no};

#[derive(Serialize)]
struct View<'a> {
    version: &'a str,
    started: String,
    configured: Option<String>,
    last_reload_problem: Option<&'a str>,
    connections: u32,
    handles: u32,
    sessions: u32,
    suspended: &'a [String],
    audit: Audit<'a>,
    arena: Arena,
    posture: BTreeMap<&'a str, &'a str>,
    warnings: &'a [String],
}

#[derive(Serialize)]
struct Audit<'a> {
    writable: bool,
    seq: Option<u64>,
    hash: Option<&'a str>,
    signed_to: Option<u64>,
}

#[derive(Serialize)]
struct Arena {
    capacity: u64,
    own: u64,
    registered: u64,
}

pub(crate) fn run(global: &Global) -> Result<ExitCode, Failure> {
    let status = global.with_admin(async |admin| Ok(admin.status().await?))?;
    global.output.print(&view(&status), || text(&status))?;
    Ok(ExitCode::SUCCESS)
}

fn view(status: &Status) -> View<'_> {
    let head = status.audit_head.as_ref();
    let problem = status.last_reload_problem.as_str();
    View {
        version: &status.version,
        started: rfc3339(status.started),
        configured: status.configured.map(rfc3339),
        last_reload_problem: Some(problem).filter(|problem| !problem.is_empty()),
        connections: status.connections,
        handles: status.handles,
        sessions: status.sessions,
        suspended: &status.suspended,
        audit: Audit {
            writable: status.audit_writable,
            seq: head.map(|head| head.seq),
            hash: head.map(|head| head.hash.as_str()),
            signed_to: head.map(|head| head.signed_to),
        },
        arena: Arena {
            capacity: status.arena.capacity,
            own: status.arena.own,
            registered: status.arena.registered,
        },
        posture: status.posture.iter().map(|(name, fact)| (name.as_str(), fact.as_str())).collect(),
        warnings: &status.warnings,
    }
}

fn text(status: &Status) -> String {
    let arena = status.arena;
    let since = |at| format!("{} ({} ago)", rfc3339(at), age(at));
    let head = status.audit_head.as_ref();
    let mut rows = vec![
        ("version", status.version.clone()),
        ("started", since(status.started)),
        ("configured", status.configured.map(since).unwrap_or_default()),
        ("last reload", status.last_reload_problem.clone()),
        ("connections", status.connections.to_string()),
        ("handles", status.handles.to_string()),
        ("sessions", status.sessions.to_string()),
        ("suspended", or_dash(Some(status.suspended.join(" ")))),
        ("audit writable", yes_or_no(status.audit_writable)),
        // The form that `audit verify --head` takes.
        ("audit head", or_dash(head.map(|head| format!("{}:{}", head.seq, head.hash)))),
        ("audit signed to", or_dash(head.map(|head| head.signed_to))),
        (
            "arena",
            format!(
                "{} of {} bytes, {} of them registered",
                arena.own.saturating_add(arena.registered),
                arena.capacity,
                arena.registered
            ),
        ),
    ];
    rows.extend(status.posture.iter().map(|(name, fact)| (name.as_str(), fact.clone())));
    rows.extend(status.warnings.iter().map(|warning| ("warning", warning.clone())));
    pairs(&rows)
}
