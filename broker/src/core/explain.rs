//! Why somebody was refused, for operators: the last refusals are remembered with what was known
//! of the peer, and judged anew by the policy in force.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::{Core, Refusal, Why};
use crate::audit::Seq;
use crate::connection::ConnectionName;
use crate::metrics;
use crate::peer::Peer;
use crate::policy::{Action, Described, Evidence, Explanation, Operator};

/// Refusals that are remembered; the audit log has all of them.
const REMEMBERED: usize = 4096;

/// What was asked for, in configured words only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    /// Absent where the request was wrong before it came to that.
    pub(crate) action: Option<Action>,
    /// Absent where there is none of the name that was typed.
    pub(crate) connection: Option<ConnectionName>,
}

impl Asked {
    pub(super) fn about(action: Action, connection: &ConnectionName) -> Self {
        Self { action: Some(action), connection: Some(connection.clone()) }
    }

    pub(super) fn unknown(action: Action) -> Self {
        Self { action: Some(action), connection: None }
    }
}

/// What an operator asks.
#[derive(Debug)]
pub(crate) enum Question {
    /// About a refusal.
    Refusal(Seq),
    /// About a peer that need not be there.
    Peer { peer: Described, action: Action, connection: String },
}

/// Whom it is about.
#[derive(Clone, Debug)]
pub(crate) enum Who {
    /// As the kernel described it when it asked. Without its process.
    Peer(Peer),
    /// As an operator describes it.
    Described(Described),
}

impl Who {
    pub(crate) fn evidence(&self) -> &dyn Evidence {
        match self {
            Self::Peer(peer) => peer,
            Self::Described(described) => described,
        }
    }
}

/// The answer.
#[derive(Debug)]
pub(crate) struct Explained {
    pub(crate) who: Who,
    pub(crate) asked: Asked,
    /// Of a refusal: why, and when.
    pub(crate) refused: Option<(String, SystemTime)>,
    /// By the policy in force. Absent where there is nothing for a policy to judge.
    pub(crate) explanation: Option<Explanation>,
    pub(crate) advice: Vec<String>,
}

#[derive(Clone, Debug)]
struct Remember {
    seq: Seq,
    at: SystemTime,
    peer: Peer,
    asked: Asked,
    reason: String,
}

/// The last refusals.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    ring: Mutex<VecDeque<Remember>>,
}

impl Remembered {
    /// Whether it is a new one: coalesced refusals share a number, and the first stands for all.
    pub(super) fn remember(&self, seq: Seq, peer: &Peer, asked: Asked, reason: &str) -> bool {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.back().is_some_and(|last| last.seq >= seq) && ring.iter().any(|r| r.seq == seq) {
            return false;
        }
        if ring.len() == REMEMBERED {
            ring.pop_front();
        }
        let (at, peer) = (SystemTime::now(), peer.without_process());
        ring.push_back(Remember { seq, at, peer, asked, reason: reason.to_owned() });
        true
    }

    fn find(&self, seq: Seq) -> Option<Remember> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.iter().find(|remembered| remembered.seq == seq).cloned()
    }
}

impl Core {
    /// Explains a refusal, or what a peer may do.
    pub(crate) fn explain(
        &self,
        operator: &Operator,
        question: Question,
    ) -> Result<Explained, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Explain);
        let explained = self.answer(operator, question)?;
        timed.done();
        Ok(explained)
    }

    fn answer(&self, operator: &Operator, question: Question) -> Result<Explained, Refusal> {
        match question {
            Question::Refusal(seq) => {
                let Some(refusal) = self.shared.refusals.find(seq) else {
                    let must = "be the ref of one of the last 4096 refusals since the broker started; the audit log has older ones";
                    let why = Why::InvalidRequest { field: "ref", must };
                    return Err(self.refuse(operator.peer(), None, why));
                };
                let Remember { at, peer, asked, reason, .. } = refusal;
                let explanation = self.judge(&peer, &asked);
                let who = Who::Peer(peer);
                let mut advice = advice(&reason, &asked);
                if let Some(explanation) = &explanation {
                    advice.extend(explanation.advice.iter().cloned());
                }
                Ok(Explained { who, asked, refused: Some((reason, at)), explanation, advice })
            }
            Question::Peer { peer, action, connection } => {
                let name =
                    self.settings().connections.get_key_value(&*connection).map(|(n, _)| n.clone());
                let asked = Asked { action: Some(action), connection: name };
                let explanation = self.judge(&peer, &asked);
                let advice = match &explanation {
                    Some(explanation) => explanation.advice.clone(),
                    None => vec![
                        "there is no connection of that name: `credbroker show` lists them"
                            .to_owned(),
                    ],
                };
                let who = Who::Described(peer);
                Ok(Explained { who, asked, refused: None, explanation, advice })
            }
        }
    }

    fn judge(&self, peer: &dyn Evidence, asked: &Asked) -> Option<Explanation> {
        let (action, connection) = (asked.action?, asked.connection.as_ref()?);
        Some(self.settings().policy.explain(peer, action, connection))
    }
}

/// What to do about refusals that are not the policy's.
fn advice(reason: &str, asked: &Asked) -> Vec<String> {
    let text = match reason {
        "HANDLE_INVALID" => {
            "the handle was unknown, revoked, used up, or another peer's: the client must issue a new one, as the uid (and, if bound, the process) that redeems it"
        }
        "HANDLE_EXPIRED" => "the client must renew its handle in time, or issue a new one",
        "LIMIT_REACHED" => {
            "raise the limit in [limits] or in the grant (max_sessions, rate_per_second), or find out who uses it up: `credbroker sessions`"
        }
        "SUSPENDED" => "`credbroker resume` ends the suspension",
        "AUDIT_UNAVAILABLE" => {
            "the audit log could not be written: look at its disk; the broker goes on by itself when it can"
        }
        "UPSTREAM_REFUSED" => {
            "the database refuses the broker's credential, or there is none: `credbroker put`, or mend the source, then `credbroker validate`"
        }
        "UPSTREAM_UNTRUSTED" => {
            "the database did not prove who it is: look at tls.ca_file and the host's name"
        }
        "UPSTREAM_UNREACHABLE" => "the database did not answer: look at host, port and network",
        "INVALID_REQUEST" => "the request itself was wrong; its own error says what it must be",
        _ if asked.connection.is_none() => {
            "the client named a connection that is not configured, or the policy never came into it"
        }
        _ => return Vec::new(),
    };
    vec![text.to_owned()]
}
