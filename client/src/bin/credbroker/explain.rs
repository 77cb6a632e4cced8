//! `credbroker explain`: why somebody may or may not do something, and what to change.

use std::process::ExitCode;

use clap::Args;
use credbroker_client::{Explanation, PeerDescription};
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{pairs, rfc3339, yes_or_no};

/// `ref=81`, as refusals and logs have it.
const REFERENCE_PREFIX: &str = "ref=";

/// Say why something was refused, or what a peer may do, and what to change (operators)
#[derive(Args, Debug)]
#[command(override_usage = "credbroker explain REF\n       \
                            credbroker explain --uid UID [OPTIONS] NAME ACTION")]
pub(crate) struct Explain {
    /// The number that a refusal carries as `ref`, or a connection and what is to be done with
    /// it: list, issue, open, ambient, handoff, register or reveal
    #[arg(required = true, num_args = 1..=2, value_name = "REF | NAME ACTION")]
    what: Vec<String>,
    /// Of a peer with this uid
    #[arg(long)]
    uid: Option<u32>,
    /// With this gid
    #[arg(long, requires = "uid")]
    gid: Option<u32>,
    /// With this supplementary group
    #[arg(long, requires = "uid", value_name = "GID")]
    group: Vec<u32>,
    /// Running this program
    #[arg(long, requires = "uid", value_name = "PATH")]
    exe: Option<String>,
    /// In this systemd unit
    #[arg(long, requires = "uid")]
    unit: Option<String>,
}

#[derive(Serialize)]
struct View<'a> {
    allowed: bool,
    grant: Option<&'a str>,
    reason: Option<&'a str>,
    at: Option<String>,
    peer: Option<PeerView<'a>>,
    action: &'a str,
    connection: &'a str,
    considered: Vec<ConsideredView<'a>>,
    advice: &'a [String],
}

#[derive(Serialize)]
struct PeerView<'a> {
    uid: u32,
    gid: Option<u32>,
    groups: &'a [u32],
    exe: Option<&'a str>,
    unit: Option<&'a str>,
}

#[derive(Serialize)]
struct ConsideredView<'a> {
    grant: &'a str,
    missing: &'a [String],
}

enum Question {
    Refusal(u64),
    Peer { peer: PeerDescription, connection: String, action: String },
}

pub(crate) fn run(command: Explain, global: &Global) -> Result<ExitCode, Failure> {
    let question = command.into_question()?;
    let answer = global.with_admin(async |admin| {
        Ok(match question {
            Question::Refusal(reference) => admin.explain_refusal(reference).await?,
            Question::Peer { peer, connection, action } => {
                admin.explain_peer(peer, &action, &connection).await?
            }
        })
    })?;
    global.output.print(&view(&answer), || text(&answer))?;
    Ok(ExitCode::SUCCESS)
}

impl Explain {
    fn into_question(self) -> Result<Question, Failure> {
        match (self.uid, <[String; 2]>::try_from(self.what)) {
            (Some(uid), Ok([connection, action])) => {
                let Self { gid, group: groups, exe, unit, .. } = self;
                let peer = PeerDescription { uid, gid, groups, exe, unit };
                Ok(Question::Peer { peer, connection, action })
            }
            (None, Err(one)) => {
                let text = one.concat();
                let number = text.strip_prefix(REFERENCE_PREFIX).unwrap_or(&text).parse();
                number.map(Question::Refusal).map_err(|_no_number| {
                    Failure::usage("the ref of a refusal is a number, such as 81")
                })
            }
            (Some(_), Err(_)) => {
                Err(Failure::usage("with --uid, give the name of a connection and an action"))
            }
            (None, Ok(_)) => {
                Err(Failure::usage("say whose access to explain, with --uid, or give one ref"))
            }
        }
    }
}

fn given(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

fn view(answer: &Explanation) -> View<'_> {
    View {
        allowed: answer.allowed,
        grant: given(&answer.grant),
        reason: given(&answer.reason),
        at: answer.at.map(rfc3339),
        peer: answer.peer.as_ref().map(|peer| PeerView {
            uid: peer.uid,
            gid: peer.gid,
            groups: &peer.groups,
            exe: peer.exe.as_deref(),
            unit: peer.unit.as_deref(),
        }),
        action: &answer.action,
        connection: &answer.connection,
        considered: answer
            .considered
            .iter()
            .map(|grant| ConsideredView { grant: &grant.grant, missing: &grant.missing })
            .collect(),
        advice: &answer.advice,
    }
}

fn text(answer: &Explanation) -> String {
    let mut rows = vec![
        ("allowed now", yes_or_no(answer.allowed)),
        ("by grant", answer.grant.clone()),
        ("refused at", answer.at.map(rfc3339).unwrap_or_default()),
        ("reason", answer.reason.clone()),
        ("peer", answer.peer.as_ref().map(peer).unwrap_or_default()),
        ("action", answer.action.clone()),
        ("connection", answer.connection.clone()),
    ];
    for grant in &answer.considered {
        rows.push(("considered", format!("{}: {}", grant.grant, grant.missing.join("; "))));
    }
    rows.extend(answer.advice.iter().map(|advice| ("to do", advice.clone())));
    pairs(&rows)
}

fn peer(peer: &PeerDescription) -> String {
    let mut words = vec![format!("uid {}", peer.uid)];
    words.extend(peer.gid.map(|gid| format!("gid {gid}")));
    if !peer.groups.is_empty() {
        let groups: Vec<String> = peer.groups.iter().map(u32::to_string).collect();
        words.push(format!("groups {}", groups.join(" ")));
    }
    words.extend(peer.exe.as_ref().map(|exe| format!("exe {exe}")));
    words.extend(peer.unit.as_ref().map(|unit| format!("unit {unit}")));
    words.join(", ")
}
