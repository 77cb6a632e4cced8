//! The operators' side of the scripted broker: notes what is asked, and answers always the same.

use std::collections::HashMap;
use std::sync::Arc;

use credbroker_proto::v1;
use credbroker_proto::v1::admin_service_server::AdminService;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status};

use crate::broker::{State, refuse};

/// 2026-11-24T05:38:09Z.
pub(crate) const THEN: i64 = 1_795_498_689;

pub(crate) struct Admin(pub(crate) Arc<State>);

type Answer<T> = Result<Response<T>, Status>;
type Items<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

fn then() -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds: THEN, nanos: 0 })
}

fn connection() -> v1::AdminConnection {
    v1::AdminConnection {
        name: "main_db".into(),
        r#type: "postgresql".into(),
        target: "db.internal:5432/mydb".into(),
        source: "store".into(),
        credential: Some(v1::Credential {
            version: 3,
            since: then(),
            expires_at: then(),
            labels: HashMap::from([("team".into(), "a\u{1b}[2J".into())]),
            persistent: false,
            breaker: Some(v1::Breaker { open_until: then(), refusals: 3 }),
        }),
        suspended: true,
        sessions: 2,
        handles: 5,
    }
}

impl Admin {
    /// Notes `request`, and refuses what is about the connection `denied`.
    fn note<T: std::fmt::Debug>(&self, request: Request<T>) -> Result<(), Status> {
        let request = request.into_inner();
        let denied = format!("{request:?}").contains("\"denied\"");
        self.0.note(request);
        if denied {
            return Err(refuse(Code::PermissionDenied, "ACCESS_DENIED", None));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    type RotateMasterKeyStream = Items<v1::RotateMasterKeyResponse>;
    type TailAuditStream =
        std::pin::Pin<Box<dyn Stream<Item = Result<v1::TailAuditResponse, Status>> + Send>>;

    async fn who_am_i(&self, _: Request<v1::WhoAmIRequest>) -> Answer<v1::WhoAmIResponse> {
        Ok(Response::new(v1::WhoAmIResponse { operator: true, ..Default::default() }))
    }

    async fn list_connections(
        &self,
        _: Request<v1::AdminListConnectionsRequest>,
    ) -> Answer<v1::AdminListConnectionsResponse> {
        let connections = vec![connection()];
        Ok(Response::new(v1::AdminListConnectionsResponse { connections }))
    }

    async fn get_connection(
        &self,
        request: Request<v1::GetConnectionRequest>,
    ) -> Answer<v1::GetConnectionResponse> {
        self.note(request)?;
        Ok(Response::new(v1::GetConnectionResponse { connection: Some(connection()) }))
    }

    async fn delete_credential(
        &self,
        request: Request<v1::DeleteCredentialRequest>,
    ) -> Answer<v1::DeleteCredentialResponse> {
        self.note(request)?;
        Ok(Response::new(v1::DeleteCredentialResponse { sessions_cut: 4 }))
    }

    async fn validate_connection(
        &self,
        request: Request<v1::ValidateConnectionRequest>,
    ) -> Answer<v1::ValidateConnectionResponse> {
        self.note(request)?;
        Ok(Response::new(v1::ValidateConnectionResponse {
            server_version: "17.5".into(),
            warnings: vec!["The role is a superuser.".into()],
            took: Some(prost_types::Duration { seconds: 0, nanos: 12_000_000 }),
            method: "scram-sha-256-plus".into(),
        }))
    }

    async fn suspend(&self, request: Request<v1::SuspendRequest>) -> Answer<v1::SuspendResponse> {
        let all = matches!(request.get_ref().scope, Some(v1::suspend_request::Scope::All(true)));
        self.note(request)?;
        Ok(Response::new(v1::SuspendResponse {
            handles_revoked: 5,
            sessions_cut: 2,
            persistent: !all,
            problem: if all { "the state directory is read-only".into() } else { String::new() },
        }))
    }

    async fn resume(&self, request: Request<v1::ResumeRequest>) -> Answer<v1::ResumeResponse> {
        let all = matches!(request.get_ref().scope, Some(v1::resume_request::Scope::All(true)));
        self.note(request)?;
        let still_suspended = if all { vec![] } else { vec!["*".into(), "reports".into()] };
        Ok(Response::new(v1::ResumeResponse { still_suspended }))
    }

    async fn list_handles(
        &self,
        request: Request<v1::AdminListHandlesRequest>,
    ) -> Answer<v1::AdminListHandlesResponse> {
        self.note(request)?;
        let handle = v1::Handle {
            id: "hdl_aaaaaaaaaaaaaaaa".into(),
            issued: then(),
            expires: then(),
            ..Default::default()
        };
        Ok(Response::new(v1::AdminListHandlesResponse { handles: vec![handle], total: 7 }))
    }

    async fn revoke_handles(
        &self,
        request: Request<v1::RevokeHandlesRequest>,
    ) -> Answer<v1::RevokeHandlesResponse> {
        self.note(request)?;
        Ok(Response::new(v1::RevokeHandlesResponse { handles_revoked: 5, sessions_cut: 2 }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Answer<v1::ListSessionsResponse> {
        self.note(request)?;
        let session = v1::SessionInfo {
            id: "ses_7".into(),
            connection: "main_db".into(),
            handle: Some("hdl_aaaaaaaaaaaaaaaa".into()),
            uid: 1000,
            pid: None,
            since: then(),
            live: true,
            credential_version: 3,
            database: "mydb".into(),
            subject: "alice\u{1b}[2J\nses_8".into(),
            mode: "handoff".into(),
        };
        Ok(Response::new(v1::ListSessionsResponse { sessions: vec![session], total: 9 }))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Answer<v1::CloseSessionResponse> {
        self.note(request)?;
        Ok(Response::new(v1::CloseSessionResponse {}))
    }

    async fn rotate_master_key(
        &self,
        request: Request<v1::RotateMasterKeyRequest>,
    ) -> Answer<Self::RotateMasterKeyStream> {
        self.note(request)?;
        let steps = vec![
            Ok(v1::RotateMasterKeyResponse { done: 1, total: 2 }),
            Ok(v1::RotateMasterKeyResponse { done: 2, total: 2 }),
        ];
        Ok(Response::new(tokio_stream::iter(steps)))
    }

    async fn reload(&self, request: Request<v1::ReloadRequest>) -> Answer<v1::ReloadResponse> {
        self.note(request)?;
        Ok(Response::new(v1::ReloadResponse {
            sessions_cut: 2,
            handles_revoked: 5,
            changes: vec!["grant worker: removed".into()],
        }))
    }

    async fn get_status(
        &self,
        request: Request<v1::GetStatusRequest>,
    ) -> Answer<v1::GetStatusResponse> {
        self.note(request)?;
        Ok(Response::new(v1::GetStatusResponse {
            version: "0.0.0-test".into(),
            started: then(),
            posture: vec![v1::Fact { name: "arena".into(), value: "memfd_secret".into() }],
            warnings: vec!["The audit log is on a full disk.".into()],
            connections: 1,
            handles: 5,
            sessions: 2,
            suspended: vec!["reports".into()],
            audit_head: Some(v1::AuditHead { seq: 81, hash: "ab12".into(), signed_to: 80 }),
            audit_writable: true,
            arena: Some(v1::ArenaUse { capacity: 65536, own: 100, registered: 28 }),
            configured: then(),
            last_reload_problem: String::new(),
        }))
    }

    /// Ends after two records, the second of which comes after a gap.
    async fn tail_audit(
        &self,
        request: Request<v1::TailAuditRequest>,
    ) -> Answer<Self::TailAuditStream> {
        self.note(request)?;
        let line = |seq| {
            format!(
                r#"{{"v":1,"seq":{seq},"time":"2026-11-24T05:38:09Z","broker":"b","event":"access.denied","outcome":"denied","peer":{{"uid":1000}},"prev":"aa","hash":"bb"}}"#
            )
        };
        let records = vec![
            Ok(v1::TailAuditResponse { line: line(81), skipped: 0 }),
            Ok(v1::TailAuditResponse { line: line(95), skipped: 13 }),
        ];
        Ok(Response::new(Box::pin(tokio_stream::iter(records))))
    }

    async fn explain_access(
        &self,
        request: Request<v1::ExplainAccessRequest>,
    ) -> Answer<v1::ExplainAccessResponse> {
        let of_refusal =
            matches!(request.get_ref().who, Some(v1::explain_access_request::Who::Ref(_)));
        self.note(request)?;
        Ok(Response::new(v1::ExplainAccessResponse {
            allowed: false,
            grant: String::new(),
            reason: if of_refusal { "no_grant".into() } else { String::new() },
            peer: Some(v1::PeerDescription {
                uid: 1000,
                gid: Some(7),
                groups: vec![8, 9],
                exe: None,
                unit: None,
            }),
            action: "open".into(),
            connection: "main_db".into(),
            considered: vec![v1::Considered {
                grant: "worker".into(),
                missing: vec!["uid is 1000, the grant wants 10001".into()],
            }],
            advice: vec!["Add uid 1000 to a grant.".into()],
            at: if of_refusal { then() } else { None },
        }))
    }
}
