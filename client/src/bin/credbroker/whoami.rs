//! `credbroker whoami`: the caller as the broker sees it.

use std::process::ExitCode;

use credbroker_client::WhoAmI;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{or_dash, pairs};

#[derive(Serialize)]
struct View<'a> {
    uid: u32,
    gid: u32,
    groups: &'a [u32],
    pid: Option<u32>,
    grants: &'a [String],
    operator: bool,
    warnings: &'a [String],
    broker_version: &'a str,
    runtime_dir: String,
}

pub(crate) fn run(global: &Global) -> Result<ExitCode, Failure> {
    let (who, runtime_dir) = global.with_client(async |client| {
        Ok((client.who_am_i().await?, client.runtime_dir().display().to_string()))
    })?;
    let view = View {
        uid: who.uid,
        gid: who.gid,
        groups: &who.groups,
        pid: who.pid,
        grants: &who.grants,
        operator: who.operator,
        warnings: &who.warnings,
        broker_version: &who.broker_version,
        runtime_dir: runtime_dir.clone(),
    };
    global.output.print(&view, || text(&who, runtime_dir))?;
    Ok(ExitCode::SUCCESS)
}

fn text(who: &WhoAmI, runtime_dir: String) -> String {
    let groups: Vec<String> = who.groups.iter().map(u32::to_string).collect();
    let mut rows = vec![
        ("uid", who.uid.to_string()),
        ("gid", who.gid.to_string()),
        ("groups", or_dash(Some(groups.join(" ")))),
        ("pid", or_dash(who.pid)),
        ("grants", or_dash(Some(who.grants.join(" ")))),
        ("operator", if who.operator { "yes" } else { "no" }.to_owned()),
        ("broker", who.broker_version.clone()),
        ("runtime dir", runtime_dir),
    ];
    rows.extend(who.warnings.iter().map(|warning| ("warning", warning.clone())));
    pairs(&rows)
}
