//! A message as a client sent it, read in one way for every transport.
//!
//! What cannot be read is answered with what is wrong with it, and to the request that it was
//! where that can be told: who waits for an answer gets one. Nothing of it is repeated.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rmcp::ErrorData;
use rmcp::model::{
    ClientJsonRpcMessage, ClientRequest, GetMeta as _, ProtocolVersion, RequestId,
    ServerJsonRpcMessage,
};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::error::Category;

use super::MAX_MESSAGE;

/// What is no message, and whose request it was.
#[derive(Debug)]
pub(super) struct Refusal {
    id: Option<RequestId>,
    error: ErrorData,
}

/// As much of a message as tells whether somebody waits for an answer.
#[derive(Deserialize)]
struct Envelope {
    id: Option<RequestId>,
    result: Option<IgnoredAny>,
    error: Option<IgnoredAny>,
}

/// The requests of one client that are in the works.
#[derive(Debug, Clone, Default)]
pub(super) struct Working(Arc<Mutex<HashSet<RequestId>>>);

/// A request in the works; rides in its extensions, and ends with it.
#[derive(Debug, Clone)]
struct Entered(#[expect(dead_code, reason = "it is there to be dropped")] Arc<Leave>);

#[derive(Debug)]
struct Leave {
    working: Working,
    id: RequestId,
}

/// Reads a message.
pub(super) fn read(text: &[u8]) -> Result<ClientJsonRpcMessage, Refusal> {
    let message = serde_json::from_slice(text).map_err(|error| match error.classify() {
        Category::Syntax | Category::Eof => ErrorData::parse_error(
            "this is not JSON: one message in UTF-8, at most 127 levels deep",
            None,
        ),
        Category::Data | Category::Io => ErrorData::invalid_request(
            "this is not a JSON-RPC request, response or notification of MCP; send each alone, \
             with an id that is a text or a whole number",
            None,
        ),
    });
    let message = message.map_err(|error| Refusal { id: asker(text), error })?;
    // rmcp takes a request whose parameters do not fit for one of a method that it does not know.
    if let ClientJsonRpcMessage::Request(request) = &message
        && let ClientRequest::CustomRequest(unknown) = &request.request
        && let Some(wanted) = parameters(&unknown.method)
        // Since 2026-07-28 there is no greeting.
        && (unknown.method != "initialize" || request.request.get_meta().protocol_version().is_none())
    {
        let text = format!("{} takes {wanted}", unknown.method);
        let error = ErrorData::invalid_params(text, None);
        return Err(Refusal { id: Some(request.id.clone()), error });
    }
    Ok(message)
}

/// Whether a message begins a conversation: until one does, rmcp hangs up at a notification.
pub(super) fn begins(message: &ClientJsonRpcMessage) -> bool {
    let ClientJsonRpcMessage::Request(request) = message else { return false };
    let request = &request.request;
    if matches!(request, ClientRequest::PingRequest(_) | ClientRequest::DiscoverRequest(_)) {
        return false;
    }
    // Without a greeting, one that says all that each must say.
    let meta = request.get_meta();
    let known = |version: ProtocolVersion| ProtocolVersion::KNOWN_VERSIONS.contains(&version);
    let whole = meta.missing_required_keys(&ProtocolVersion::V_2026_07_28).is_empty()
        && meta.protocol_version().is_some_and(known);
    whole || matches!(request, ClientRequest::InitializeRequest(_))
}

impl Refusal {
    pub(super) fn too_long() -> Self {
        let text = format!("a message may have {MAX_MESSAGE} bytes");
        Self { id: None, error: ErrorData::invalid_request(text, None) }
    }

    /// For where an answer to this id would be taken for that to another request.
    pub(super) fn without_id(self) -> Self {
        Self { id: None, ..self }
    }

    /// The answer.
    pub(super) fn into_message(self) -> ServerJsonRpcMessage {
        ServerJsonRpcMessage::error(self.error, self.id)
    }
}

impl Working {
    /// Takes the id of a request until it is done with. A second one of that id would take the
    /// first one's answer away, and its cancellation.
    pub(super) fn enter(&self, message: &mut ClientJsonRpcMessage) -> Result<(), Refusal> {
        let ClientJsonRpcMessage::Request(request) = &*message else { return Ok(()) };
        let id = request.id.clone();
        if !self.ids().insert(id.clone()) {
            let error = ErrorData::invalid_request(
                "a request with this id is still in the works: give each an id of its own",
                None,
            );
            return Err(Refusal { id: Some(id), error });
        }
        let leave = Leave { working: self.clone(), id };
        message.insert_extension(Entered(Arc::new(leave)));
        Ok(())
    }

    fn ids(&self) -> MutexGuard<'_, HashSet<RequestId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.working.ids().remove(&self.id);
    }
}

/// Who waits for an answer to what is no message. Of an answer, the id is ours and not theirs.
fn asker(text: &[u8]) -> Option<RequestId> {
    // A list would be read as the fields of the envelope.
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    let envelope: Envelope =
        (first == Some(&b'{')).then(|| serde_json::from_slice(text).ok())??;
    envelope.id.filter(|_| envelope.result.is_none() && envelope.error.is_none())
}

/// What the requests that are served here take.
fn parameters(method: &str) -> Option<&'static str> {
    Some(match method {
        "initialize" => {
            "protocolVersion, a text; capabilities, an object; clientInfo, with name and version"
        }
        "tools/call" => "name, a text, and arguments, an object",
        "resources/read" => "uri, a text",
        "prompts/get" => "name, a text",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn refused(text: &[u8]) -> Value {
        serde_json::to_value(read(text).unwrap_err().into_message()).unwrap()
    }

    #[test]
    fn who_waits_for_an_answer_gets_one() {
        let asked = |id: &Value| json!({ "jsonrpc": "2.0", "id": id, "method": 5 }).to_string();
        for id in [json!(3), json!("three"), json!(-1), json!("")] {
            let answer = refused(asked(&id).as_bytes());
            assert_eq!((&answer["id"], &answer["error"]["code"]), (&id, &json!(-32600)));
        }
        for id in [json!(1.5), json!({}), json!(null), json!([1])] {
            assert!(refused(asked(&id).as_bytes()).get("id").is_none(), "{id}");
        }
        for text in [
            // Of ours, not of theirs.
            &br#"{"jsonrpc":"1.0","id":1,"result":{}}"#[..],
            br#"{"jsonrpc":"1.0","id":1,"error":{"code":1,"message":"x"}}"#,
            br#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#,
            b"[1]",
            br#"{"jsonrpc":"2.0","id":1,"id":2,"method":5}"#,
            br#"{"jsonrpc":"2.0","id":1,"method":"ping""#,
        ] {
            assert!(refused(text).get("id").is_none(), "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn parameters_that_do_not_fit_are_no_unknown_method() {
        for (method, params) in [
            ("initialize", json!({ "protocolVersion": "2025-11-25", "capabilities": {} })),
            ("tools/call", json!({ "arguments": {} })),
            ("tools/call", json!({ "name": "execute_sql", "arguments": "{\"hunter2\": 1}" })),
            ("resources/read", json!({})),
            ("prompts/get", json!({})),
        ] {
            let asked = json!({ "jsonrpc": "2.0", "id": 7, "method": method, "params": params });
            let answer = refused(asked.to_string().as_bytes());
            assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(7), &json!(-32602)));
            let text = answer["error"]["message"].as_str().unwrap();
            assert!(text.starts_with(&format!("{method} takes ")), "{text}");
            assert!(!answer.to_string().contains("hunter2"), "{answer}");
        }
        assert!(read(br#"{"jsonrpc":"2.0","id":7,"method":"no/such"}"#).is_ok());
        let meta = json!({ "io.modelcontextprotocol/protocolVersion": "2026-07-28" });
        let asked = json!({ "jsonrpc": "2.0", "id": 7, "method": "initialize",
            "params": { "_meta": meta } });
        assert!(read(asked.to_string().as_bytes()).is_ok());
    }

    #[test]
    fn an_id_is_free_again_when_its_request_is_done_with() {
        let working = Working::default();
        let ping = |id: i64| {
            let asked = json!({ "jsonrpc": "2.0", "id": id, "method": "ping" });
            read(asked.to_string().as_bytes()).unwrap()
        };
        let mut first = ping(1);
        working.enter(&mut first).unwrap();
        assert!(working.enter(&mut ping(1)).is_err());
        assert!(working.enter(&mut ping(2)).is_ok());
        drop(first);
        assert!(working.enter(&mut ping(1)).is_ok());
        assert!(working.ids().is_empty());
    }
}
