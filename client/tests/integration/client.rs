//! The library.

use std::io;
use std::time::{Duration, SystemTime};

use credbroker_client::{
    Bind, Client, Destination, Error, HandleEvent, IssueRequest, Reason, RenewalEnd, Token,
};

use crate::broker::{Broker, DEFAULT_TTL, Event, PATIENCE, REFERENCE, RETRY_AFTER, SESSIONS_CUT};

async fn connect(broker: &Broker) -> Client {
    Client::builder().runtime_dir(broker.runtime_dir()).connect().await.unwrap()
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[tokio::test]
async fn an_issued_handle_says_what_it_is_and_where_to_use_it() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let request = IssueRequest::new("main_db").purpose("report").subject("alice").max_uses(3);
    let handle = client.issue(request.bind(Bind::Lifetime)).await.unwrap();

    let info = handle.info();
    assert_eq!(info.id, handle.id());
    assert_eq!(info.holder, own_uid());
    assert_eq!(info.purpose, "report");
    assert_eq!(info.subject, "alice");
    assert_eq!(info.uses_left, Some(3));
    assert_eq!(info.bind, Bind::Lifetime);
    assert_eq!(info.expires.duration_since(info.issued).unwrap(), DEFAULT_TTL);

    let door = broker.runtime_dir().join("postgres");
    assert_eq!(handle.endpoint().door, door);
    let url = format!(
        "postgresql:///mydb?host={}&user=main_db&password={}",
        door.display(),
        handle.token().expose()
    );
    assert_eq!(handle.url(), url);
    let text = format!("{handle:?} {client:?}");
    assert!(!text.contains("cbh_"), "{text}");
    assert_eq!(handle.revoke().await.unwrap(), SESSIONS_CUT);
}

#[tokio::test]
async fn a_relative_runtime_dir_gives_an_absolute_door() {
    let broker = Broker::start();
    let here = std::env::current_dir().unwrap();
    let up: std::path::PathBuf = here.components().skip(1).map(|_| "..").collect();
    let relative = up.join(broker.runtime_dir().strip_prefix("/").unwrap());
    let client = Client::builder().runtime_dir(relative).connect().await.unwrap();
    let handle = client.issue(IssueRequest::new("main_db")).await.unwrap();
    assert!(handle.endpoint().door.is_absolute());
}

#[tokio::test]
async fn a_dropped_handle_is_revoked() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let handle = client.issue(IssueRequest::new("main_db")).await.unwrap();
    let id = handle.id().to_owned();
    drop(handle);
    client.close().await;
    assert!(broker.log().contains(&Event::Revoked { id }));
    assert_eq!(broker.live_handles(), 0);
}

#[tokio::test]
async fn a_handle_that_nobody_waits_for_any_more_is_revoked() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    tokio::select! {
        biased;
        issued = client.issue(IssueRequest::new("main_db")) => panic!("{issued:?}"),
        () = std::future::ready(()) => {},
    }
    client.close().await;
    let log = broker.log();
    assert!(matches!(log.as_slice(), [Event::Issued { .. }, Event::Revoked { .. }]), "{log:?}");
}

#[tokio::test]
async fn a_handle_given_up_is_not_revoked() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let token = client.issue(IssueRequest::new("main_db")).await.unwrap().into_token();
    client.close().await;
    assert_eq!(broker.live_handles(), 1);

    assert_eq!(client.describe(&token).await.unwrap().connection, "main_db");
    assert_eq!(client.revoke_token(&token).await.unwrap(), SESSIONS_CUT);
    let gone = client.describe(&token).await.unwrap_err();
    assert_eq!(gone.reason(), Some(Reason::HandleInvalid));
}

#[tokio::test]
async fn renewal_moves_the_expiry_that_the_handle_tells() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let request = IssueRequest::new("main_db").ttl(Duration::from_secs(60));
    let handle = client.issue(request).await.unwrap();
    let before = handle.info().expires;
    handle.renew(Some(Duration::from_secs(600))).await.unwrap();
    assert!(handle.info().expires > before + Duration::from_secs(500));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handle_kept_alive_outlives_its_first_lifetime() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let request = IssueRequest::new("main_db").ttl(Duration::from_secs(1));
    let handle = client.issue(request).await.unwrap();
    let first_end = handle.info().expires;
    let keep_alive = handle.keep_alive();
    tokio::task::block_in_place(|| {
        broker.wait_for("a renewal after the first lifetime", |event| match event {
            Event::Renewed { at, .. } => (*at > first_end).then_some(()),
            _ => None,
        });
    });
    assert!(!keep_alive.has_ended());
    assert!(handle.info().expires > first_end);

    broker.forget(handle.id());
    let end = tokio::time::timeout(PATIENCE, keep_alive.ended()).await.unwrap();
    let RenewalEnd::Failed(error) = end else { panic!("{end:?}") };
    assert_eq!(error.reason(), Some(Reason::HandleInvalid));
}

#[tokio::test]
async fn renewal_ends_when_it_is_dropped_and_when_the_client_is_closed() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let handle = client.issue(IssueRequest::new("main_db")).await.unwrap();
    drop(handle.keep_alive());
    let keep_alive = handle.keep_alive();
    // It would not return if the first renewal still ran, or the second went on.
    client.close().await;
    assert!(matches!(keep_alive.ended().await, RenewalEnd::Closed));
    assert_eq!(broker.live_handles(), 1);
}

#[tokio::test]
async fn refusals_are_decoded() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let denied = client.issue(IssueRequest::new("denied")).await.unwrap_err();
    assert_eq!(denied.reason(), Some(Reason::AccessDenied));
    assert_eq!(denied.to_string(), "as the test wants it (ACCESS_DENIED, ref=81)");
    assert!(!denied.is_retryable());

    let busy = client.issue(IssueRequest::new("busy")).await.unwrap_err();
    assert!(busy.is_retryable());
    let Error::Refused { reason, reference, retry_after, .. } = busy else { panic!("{busy:?}") };
    assert_eq!(reason, Reason::LimitReached);
    assert_eq!(reference, Some(REFERENCE));
    assert_eq!(retry_after, Some(RETRY_AFTER));
}

#[tokio::test]
async fn a_broker_that_does_not_answer_is_given_up() {
    let broker = Broker::start();
    let limit = Duration::from_millis(100);
    let builder = Client::builder().runtime_dir(broker.runtime_dir()).timeout(limit);
    let client = builder.connect().await.unwrap();
    let error = client.issue(IssueRequest::new("stuck")).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { after } if after == limit), "{error:?}");
}

#[tokio::test]
async fn a_broker_that_is_not_there_is_told_with_its_socket() {
    let directory = tempfile::tempdir().unwrap();
    let builder = Client::builder().runtime_dir(directory.path());
    let error = builder.connect().await.unwrap_err();
    let Error::Connect { socket, source } = error else { panic!("{error:?}") };
    assert_eq!(socket, directory.path().join("broker.sock"));
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn a_server_of_another_uid_is_sent_nothing() {
    let broker = Broker::start();
    let expected = own_uid() + 1;
    let builder = Client::builder().runtime_dir(broker.runtime_dir()).server_uid(expected);
    let error = builder.clone().connect().await.unwrap_err();
    let Error::ServerUntrusted { socket, seen, trusted } = error else { panic!("{error:?}") };
    assert_eq!(socket, broker.socket());
    assert_eq!(seen, own_uid());
    assert_eq!(trusted.into_iter().collect::<Vec<_>>(), [expected]);

    builder.server_uids([own_uid()]).connect().await.unwrap();
}

#[tokio::test]
async fn the_client_connects_again_after_a_restart() {
    let mut broker = Broker::start();
    let client = connect(&broker).await;
    client.who_am_i().await.unwrap();

    broker.kill();
    let error = client.who_am_i().await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. } | Error::Disconnected), "{error:?}");
    assert!(error.is_retryable());

    broker.resume();
    let who = client.who_am_i().await.unwrap();
    assert_eq!(who.uid, own_uid());
}

#[tokio::test]
async fn lists_are_told_as_they_are() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let first = client.issue(IssueRequest::new("main_db")).await.unwrap();
    let second = client.issue(IssueRequest::new("reports").redeemer(71)).await.unwrap();
    let list = client.list_handles().await.unwrap();
    assert!(list.truncated);
    assert_eq!(list.handles, [first.info(), second.info()]);
    assert_eq!(second.info().redeemer, Some(71));

    let connections = client.list_connections().await.unwrap();
    assert_eq!(connections.len(), 1);
    assert_eq!(connections[0].name, "main_db");
    assert_eq!(connections[0].kind, "postgresql");
    let endpoint = connections[0].endpoint.as_ref().unwrap();
    assert_eq!(endpoint.door, broker.runtime_dir().join("postgres"));
}

#[tokio::test]
async fn a_token_from_elsewhere_can_be_renewed_and_revoked() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let text = client.issue(IssueRequest::new("main_db")).await.unwrap().into_token();
    let token = Token::parse(text.expose()).unwrap();
    let info = client.renew(&token, None).await.unwrap();
    assert!(info.expires > SystemTime::now());
    assert_eq!(client.revoke_id(&info.id).await.unwrap(), SESSIONS_CUT);
    assert_eq!(broker.live_handles(), 0);
}

#[tokio::test]
async fn what_becomes_of_a_handle_is_told_until_its_end() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let handle = client.issue(IssueRequest::new("main_db").bind(Bind::Process)).await.unwrap();
    let mut events = client.watch(handle.token()).await.unwrap();
    let expires = handle.info().expires;
    assert_eq!(events.next().await.unwrap().unwrap(), HandleEvent::Expiring { expires });
    let rotated = HandleEvent::Rotated { credential_version: 2 };
    assert_eq!(events.next().await.unwrap().unwrap(), rotated, "what is unknown is left out");
    let ended = HandleEvent::Ended { reason: "suspended".into() };
    assert_eq!(events.next().await.unwrap().unwrap(), ended);
    assert!(events.next().await.is_none());
    assert!(events.next().await.is_none(), "asked once more");

    let token = Token::parse(&format!("cbh_{}", "x".repeat(43))).unwrap();
    assert_eq!(client.watch(&token).await.unwrap_err().reason(), Some(Reason::HandleInvalid));
}

#[tokio::test]
async fn a_destination_has_a_name_or_is_denied() {
    let broker = Broker::start();
    let client = connect(&broker).await;
    let known = Destination::new("db.internal").kind("postgresql").port(5432).database("mydb");
    assert_eq!(client.resolve(known).await.unwrap(), "main_db");
    let unknown = client.resolve(Destination::new("db.internal")).await.unwrap_err();
    assert_eq!(unknown.reason(), Some(Reason::AccessDenied));
}
