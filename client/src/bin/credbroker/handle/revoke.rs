//! `credbroker handle revoke`: ends a handle and its sessions, or, for operators, those of many.

use std::io::{self, Read as _};
use std::process::ExitCode;

use clap::Args;
use credbroker_client::{HandleFilter, Token};
use serde::Serialize;

use crate::args::Global;
use crate::failure::{Exit, Failure};

const STANDARD_INPUT: &str = "-";
const ID_PREFIX: &str = "hdl_";
/// A token has 47 characters; so much bounds what a wrong pipe can send.
const MAX_INPUT: u64 = 1024;

/// End a handle and every session opened with it, or those of others (operators)
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Revoke {
    /// The handle's id (hdl_…), or `-` to read its token from standard input
    #[arg(value_name = "ID")]
    which: Option<String>,
    /// Every handle of this connection, whoever holds it
    #[arg(long, value_name = "NAME")]
    connection: Option<String>,
    /// Every handle
    #[arg(long)]
    all: bool,
}

#[derive(Serialize)]
struct View {
    revoked: bool,
    sessions_cut: u32,
}

#[derive(Serialize)]
struct ManyView {
    handles_revoked: u32,
    sessions_cut: u32,
}

enum Which {
    Id(String),
    Token(Token),
}

pub(crate) fn run(command: Revoke, global: &Global) -> Result<ExitCode, Failure> {
    match (command.which, command.connection) {
        (Some(which), _) => one(&Which::find(which)?, global),
        (None, Some(name)) => many(HandleFilter::of_connection(name), global),
        (None, None) => many(HandleFilter::All, global),
    }
}

fn one(which: &Which, global: &Global) -> Result<ExitCode, Failure> {
    let sessions_cut = global.with_client(async |client| {
        Ok(match which {
            Which::Id(id) => client.revoke_id(id).await?,
            Which::Token(token) => client.revoke_token(token).await?,
        })
    })?;
    let view = View { revoked: true, sessions_cut };
    global.output.print(&view, || format!("revoked, sessions cut: {sessions_cut}"))?;
    Ok(ExitCode::SUCCESS)
}

fn many(filter: HandleFilter, global: &Global) -> Result<ExitCode, Failure> {
    let cut = global.with_admin(async |admin| Ok(admin.revoke_handles(filter).await?))?;
    let view = ManyView { handles_revoked: cut.handles, sessions_cut: cut.sessions };
    global.output.print(&view, || {
        format!("handles revoked: {}, sessions cut: {}", cut.handles, cut.sessions)
    })?;
    Ok(ExitCode::SUCCESS)
}

impl Which {
    fn find(argument: String) -> Result<Self, Failure> {
        if argument == STANDARD_INPUT {
            let mut text = String::new();
            io::stdin().lock().take(MAX_INPUT).read_to_string(&mut text).map_err(|error| {
                Failure::new(Exit::Io, "INPUT", format!("cannot read the token: {error}"))
            })?;
            return Ok(Self::Token(Token::parse(text.trim_end_matches(['\r', '\n']))?));
        }
        if argument.starts_with(ID_PREFIX) {
            return Ok(Self::Id(argument));
        }
        Err(Failure::usage("a handle's id begins with hdl_; `credbroker handle list` shows them"))
    }
}
