//! A broker without secrets: it issues handles, and its doors are the private server.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use credbroker_sql_worker::broker::{
    Answer, Broker, Connection, Destination, Door, HandleInfo, Held, Issued, Login, Token,
};
use credbroker_sql_worker::error::{Code, Failure};
use futures_util::future::BoxFuture;

use crate::cluster::Cluster;

/// Its connections: `main_db` and `other_db`, both the same server.
pub(crate) struct FakeBroker {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) handles: Arc<Mutex<HashMap<String, HandleInfo>>>,
    issued: AtomicU64,
}

impl std::fmt::Debug for FakeBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeBroker")
    }
}

impl FakeBroker {
    pub(crate) fn new() -> Self {
        Self { cluster: Cluster::get(), handles: Arc::default(), issued: AtomicU64::new(0) }
    }

    fn door(&self) -> Door {
        let directory = self.cluster.door().to_owned();
        Door { directory, database: "postgres".into(), user: "app".into() }
    }

    fn make(
        &self,
        connection: &str,
        subject: &str,
        ttl: Duration,
    ) -> Result<(String, HandleInfo), Failure> {
        if !["main_db", "other_db"].contains(&connection) {
            let failure = Failure::new(Code::AccessDenied, "access denied, or no such connection");
            return Err(failure.with_reference(Some(81)));
        }
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let token = format!("cbh_{number:0>43}");
        let info = HandleInfo {
            id: format!("hdl_{number}"),
            connection: connection.into(),
            subject: subject.into(),
            expires: SystemTime::now() + ttl,
        };
        self.handles.lock().unwrap().insert(token.clone(), info.clone());
        Ok((token, info))
    }
}

impl Broker for FakeBroker {
    fn connections(&self) -> Answer<'_, Vec<Connection>> {
        Box::pin(async {
            Ok(["main_db", "other_db"]
                .map(|name| Connection {
                    name: name.into(),
                    kind: "postgresql".into(),
                    target: "postgresql://****:****@database/postgres".into(),
                    may: vec!["issue".into(), "open".into()],
                    has_credential: true,
                    door: Some(self.door()),
                })
                .into())
        })
    }

    fn issue<'a>(&'a self, connection: &'a str, subject: &'a str) -> Answer<'a, Issued> {
        Box::pin(async move {
            let (token, _) = self.make(connection, subject, Duration::from_secs(600))?;
            let held = FakeHeld { token: token.clone(), handles: Arc::clone(&self.handles) };
            let token = Token::parse(&token).unwrap();
            Ok(Issued { held: Box::new(held), token, door: self.door() })
        })
    }

    fn issue_token<'a>(
        &'a self,
        connection: &'a str,
        subject: &'a str,
        ttl: Duration,
    ) -> Answer<'a, (Token, HandleInfo)> {
        Box::pin(async move {
            let (token, info) = self.make(connection, subject, ttl)?;
            Ok((Token::parse(&token).unwrap(), info))
        })
    }

    fn register<'a>(
        &'a self,
        connection: &'a str,
        _login: Login,
        subject: &'a str,
    ) -> Answer<'a, Issued> {
        self.issue(connection, subject)
    }

    fn register_token<'a>(
        &'a self,
        connection: &'a str,
        _login: Login,
        subject: &'a str,
        ttl: Duration,
    ) -> Answer<'a, (Token, HandleInfo)> {
        self.issue_token(connection, subject, ttl)
    }

    fn resolve<'a>(&'a self, destination: &'a Destination) -> Answer<'a, String> {
        Box::pin(async move {
            let Destination { host, port, database } = destination;
            match (host.as_str(), port.unwrap_or(5432), database.as_str()) {
                ("database", 5432, "" | "postgres") => Ok("main_db".to_owned()),
                _ => Err(Failure::new(Code::AccessDenied, "access denied, or no such connection")),
            }
        })
    }

    fn describe<'a>(&'a self, token: &'a Token) -> Answer<'a, HandleInfo> {
        Box::pin(async move {
            let found = self.handles.lock().unwrap().get(token.expose()).cloned();
            found
                .filter(|info| info.expires > SystemTime::now())
                .ok_or_else(Failure::handle_invalid)
        })
    }

    fn revoke<'a>(&'a self, token: &'a Token) -> Answer<'a, ()> {
        Box::pin(async move {
            let removed = self.handles.lock().unwrap().remove(token.expose());
            removed.map(|_| ()).ok_or_else(Failure::handle_invalid)
        })
    }
}

#[derive(Debug)]
struct FakeHeld {
    token: String,
    handles: Arc<Mutex<HashMap<String, HandleInfo>>>,
}

impl Held for FakeHeld {
    fn revoke(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move { drop(self) })
    }
}

impl Drop for FakeHeld {
    fn drop(&mut self) {
        self.handles.lock().unwrap().remove(&self.token);
    }
}
