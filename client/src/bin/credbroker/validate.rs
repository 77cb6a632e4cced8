//! `credbroker validate`: whether a connection works, and what its role may do that it should
//! not.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{or_dash, pairs};

/// Log in with a connection's credential, look at the role, and log out (operators)
#[derive(Args, Debug)]
pub(crate) struct Validate {
    /// Name of the connection
    name: String,
}

#[derive(Serialize)]
struct View<'a> {
    valid: bool,
    server_version: &'a str,
    took_ms: u128,
    method: &'a str,
    warnings: &'a [String],
}

pub(crate) fn run(command: &Validate, global: &Global) -> Result<ExitCode, Failure> {
    let found = global.with_admin(async |admin| Ok(admin.validate(&command.name).await?))?;
    let took_ms = found.took.as_millis();
    let view = View {
        valid: true,
        server_version: &found.server_version,
        took_ms,
        method: &found.method,
        warnings: &found.warnings,
    };
    global.output.print(&view, || {
        let mut rows = vec![
            ("login", format!("works, in {took_ms} ms")),
            ("method", or_dash(Some(&found.method))),
            ("server", found.server_version.clone()),
        ];
        rows.extend(found.warnings.iter().map(|warning| ("warning", warning.clone())));
        pairs(&rows)
    })?;
    Ok(ExitCode::SUCCESS)
}
