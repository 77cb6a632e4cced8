//! The packet clients: framing, order, cancellation, descriptors.

use std::fs;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use credbroker_client::{
    Bind, Client, Error, IssueRequest, PacketClient, PutRequest, Reason, RegisterRequest, Secret,
    Token,
};
use credbroker_proto::v1;
use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use credbroker_proto::v1::revoke_handle_request::Handle as Which;
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fcntl_getfl};
use tokio::sync::oneshot;

use crate::packets::{
    Listener, MOST_DESCRIPTORS, Peer, Place, borrow, described, handle_id, issued, refused,
    revoked, token,
};

async fn connect(place: &Place) -> PacketClient {
    Client::builder().runtime_dir(place.runtime_dir()).connect_packet().await.unwrap()
}

fn parsed(nth: u64) -> Token {
    Token::parse(&token(nth)).unwrap()
}

fn is_describe(request: &Request) -> bool {
    matches!(request, Request::Describe(_))
}

fn revoked_id(request: &Request) -> Option<&str> {
    match request {
        Request::Revoke(v1::RevokeHandleRequest { handle: Some(Which::Id(id)) }) => Some(id),
        _ => None,
    }
}

/// Answers one describe, as a proof that the connection still works.
fn answer_describe(peer: &Peer, nth: u64) {
    let id = peer.expect("describe", is_describe);
    peer.reply(id, described(nth));
}

#[tokio::test]
async fn a_handle_lives_and_ends_by_packet() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        let (id, request, _) = peer.receive().unwrap();
        let Request::Issue(request) = request else { panic!("{request:?}") };
        assert_eq!((request.connection.as_str(), request.bind()), ("main_db", v1::Bind::Process));
        peer.reply(id, Reply::Issued(issued(1)));
        let id = peer.expect("renew", |request| matches!(request, Request::Renew(_)));
        let renewed = v1::RenewHandleResponse { handle: described_handle(1) };
        peer.reply(id, Reply::Renewed(renewed));
        answer_describe(&peer, 1);
        let id = peer.expect("revoke", |request| revoked_id(request) == Some(&handle_id(1)));
        peer.reply(id, revoked());
        let id = peer.expect("revoke by token", |request| {
            matches!(request, Request::Revoke(revoke)
                if revoke.handle == Some(Which::Token(token(2))))
        });
        peer.reply(id, refused(v1::Reason::HandleInvalid));
        assert!(peer.receive().is_none(), "the client is closed");
    });
    let client = connect(&place).await;
    let request = IssueRequest::new("main_db").bind(Bind::Process);
    let handle = client.issue(request).await.unwrap();
    assert_eq!(handle.endpoint().door, place.runtime_dir().join("postgres"));
    assert_eq!(handle.token().expose(), token(1));
    handle.renew(Some(Duration::from_secs(60))).await.unwrap();
    assert_eq!(client.describe(handle.token()).await.unwrap().id, handle.id());
    assert_eq!(handle.revoke().await.unwrap(), 2);
    let gone = client.revoke_token(&parsed(2)).await.unwrap_err();
    assert_eq!(gone.to_string(), "as the test wants it (HANDLE_INVALID, ref=81)");
    client.close().await;
    script.join().unwrap();
}

fn described_handle(nth: u64) -> Option<v1::Handle> {
    let Reply::Described(response) = described(nth) else { return None };
    response.handle
}

#[tokio::test]
async fn requests_are_sent_before_earlier_ones_are_answered() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        let ids: Vec<u64> = (0..3).map(|_| peer.expect("describe", is_describe)).collect();
        for (id, nth) in ids.into_iter().zip(1..) {
            peer.reply(id, described(nth));
        }
        assert!(peer.receive().is_none());
    });
    let client = connect(&place).await;
    let (first, second, third) = (parsed(1), parsed(2), parsed(3));
    let (first, second, third) =
        tokio::join!(client.describe(&first), client.describe(&second), client.describe(&third));
    let ids = [first, second, third].map(|answer| answer.unwrap().id);
    assert_eq!(ids, [handle_id(1), handle_id(2), handle_id(3)]);
    client.close().await;
    script.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tasks_each_get_their_own_answer() {
    const TASKS: u64 = 300;
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        for _ in 0..TASKS {
            let (id, request, _) = peer.receive().unwrap();
            let Request::Describe(request) = request else { panic!("{request:?}") };
            let nth = request.token.trim_start_matches("cbh_").trim_start_matches('A');
            peer.reply(id, described(nth.parse().unwrap()));
        }
    });
    let client = connect(&place).await;
    let mut tasks = tokio::task::JoinSet::new();
    for nth in 1..=TASKS {
        let client = client.clone();
        tasks.spawn(async move {
            assert_eq!(client.describe(&parsed(nth)).await.unwrap().id, handle_id(nth));
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    script.join().unwrap();
}

#[tokio::test]
async fn a_dropped_request_does_not_disturb_the_next() {
    let place = Place::new();
    let (tell, received) = oneshot::channel();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        let first = peer.expect("describe", is_describe);
        tell.send(()).unwrap();
        let second = peer.expect("describe", is_describe);
        peer.reply(first, described(1));
        peer.reply(second, described(2));
        assert!(peer.receive().is_none());
    });
    let client = connect(&place).await;
    let first = parsed(1);
    tokio::select! {
        answer = client.describe(&first) => panic!("{answer:?}"),
        () = async { received.await.unwrap() } => {},
    }
    assert_eq!(client.describe(&parsed(2)).await.unwrap().id, handle_id(2));
    client.close().await;
    script.join().unwrap();
}

#[tokio::test]
async fn a_handle_that_nobody_waits_for_any_more_is_revoked() {
    let place = Place::new();
    let (tell, received) = oneshot::channel();
    let (go_on, told) = std::sync::mpsc::channel();
    let script = Listener::play(&place.packet_socket(), move |listener| {
        let peer = listener.accept();
        let id = peer.expect("issue", |request| matches!(request, Request::Issue(_)));
        tell.send(()).unwrap();
        told.recv().unwrap();
        peer.reply(id, Reply::Issued(issued(1)));
        let id = peer.expect("revoke", |request| revoked_id(request) == Some(&handle_id(1)));
        peer.reply(id, revoked());
    });
    let client = connect(&place).await;
    tokio::select! {
        answer = client.issue(IssueRequest::new("main_db")) => panic!("{answer:?}"),
        () = async { received.await.unwrap() } => {},
    }
    go_on.send(()).unwrap();
    tokio::task::spawn_blocking(|| script.join().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_dropped_handle_is_revoked_by_packet() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        let id = peer.expect("issue", |request| matches!(request, Request::Issue(_)));
        peer.reply(id, Reply::Issued(issued(1)));
        let id = peer.expect("revoke", |request| revoked_id(request) == Some(&handle_id(1)));
        peer.reply(id, revoked());
        assert!(peer.receive().is_none());
    });
    let client = connect(&place).await;
    drop(client.issue(IssueRequest::new("main_db")).await.unwrap());
    client.close().await;
    script.join().unwrap();
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_that_of_the_next_request() {
    let place = Place::new();
    let limit = Duration::from_millis(100);
    let (tell, gave_up) = std::sync::mpsc::channel();
    let script = Listener::play(&place.packet_socket(), move |listener| {
        let peer = listener.accept();
        let first = peer.expect("describe", is_describe);
        gave_up.recv().unwrap();
        peer.reply(first, described(1));
        answer_describe(&peer, 2);
    });
    let builder = Client::builder().runtime_dir(place.runtime_dir()).timeout(limit);
    let client = builder.connect_packet().await.unwrap();
    let error = client.describe(&parsed(1)).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { after } if after == limit), "{error:?}");
    tell.send(()).unwrap();
    assert_eq!(client.describe(&parsed(2)).await.unwrap().id, handle_id(2));
    script.join().unwrap();
}

/// What comes of two requests, the first of which is answered with `bytes`; and that a third is
/// made over a new connection.
async fn after_broken_answer(bytes: Vec<u8>) -> [Error; 2] {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), move |listener| {
        let peer = listener.accept();
        peer.expect("describe", is_describe);
        peer.expect("describe", is_describe);
        peer.send(&bytes, &[]);
        assert!(peer.receive().is_none(), "nothing more is said on it");
        answer_describe(&listener.accept(), 3);
    });
    let client = connect(&place).await;
    let (first, second) = (parsed(1), parsed(2));
    let (first, second) = tokio::join!(client.describe(&first), client.describe(&second));
    assert_eq!(client.describe(&parsed(3)).await.unwrap().id, handle_id(3));
    script.join().unwrap();
    [first.unwrap_err(), second.unwrap_err()]
}

#[tokio::test]
async fn an_answer_that_cannot_be_understood_ends_the_connection_alone() {
    use prost::Message as _;
    let of_another = v1::PacketReply { id: 999, reply: Some(described(1)) };
    // Everything but a refusal must say whose reply it is.
    let of_nobody = v1::PacketReply { id: 0, reply: Some(described(1)) };
    for (bytes, told) in [
        (vec![0; credbroker_proto::MAX_PACKET + 1], "longer than a packet"),
        (vec![0xff; 100], "no reply"),
        (of_another.encode_to_vec(), "another request"),
        (of_nobody.encode_to_vec(), "another request"),
    ] {
        let [first, second] = after_broken_answer(bytes).await;
        assert!(matches!(first, Error::Protocol { .. }), "{told}: {first:?}");
        assert!(first.to_string().contains(told), "{first}");
        assert!(matches!(second, Error::Disconnected), "{told}: {second:?}");
    }
    let [first, _] = after_broken_answer(vec![]).await;
    assert!(matches!(first, Error::Disconnected), "an empty packet is an end: {first:?}");
}

#[tokio::test]
async fn an_answer_to_another_question_is_not_taken() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        use prost::Message as _;
        let peer = listener.accept();
        let id = peer.expect("describe", is_describe);
        peer.reply(id, revoked());
        let id = peer.expect("describe", is_describe);
        peer.send(&v1::PacketReply { id, reply: None }.encode_to_vec(), &[]);
        answer_describe(&peer, 3);
    });
    let client = connect(&place).await;
    for nth in [1, 2] {
        let error = client.describe(&parsed(nth)).await.unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
    }
    assert_eq!(client.describe(&parsed(3)).await.unwrap().id, handle_id(3));
    script.join().unwrap();
}

#[tokio::test]
async fn an_answer_that_nobody_asked_for_ends_the_connection() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        peer.reply(999, described(1));
        // The client may have asked before it saw that.
        while peer.receive().is_some() {}
        answer_describe(&listener.accept(), 2);
    });
    let client = connect(&place).await;
    let answer = loop {
        match client.describe(&parsed(2)).await {
            Err(Error::Disconnected | Error::Protocol { .. }) => {}
            answer => break answer,
        }
    };
    assert_eq!(answer.unwrap().id, handle_id(2));
    script.join().unwrap();
}

#[tokio::test]
async fn a_refusal_of_what_could_not_be_read_is_that_of_the_first_request() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        peer.expect("describe", is_describe);
        peer.reply(0, refused(v1::Reason::InvalidRequest));
        answer_describe(&peer, 2);
    });
    let client = connect(&place).await;
    let error = client.describe(&parsed(1)).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::InvalidRequest));
    assert_eq!(client.describe(&parsed(2)).await.unwrap().id, handle_id(2));
    script.join().unwrap();
}

#[tokio::test]
async fn descriptors_that_nobody_asked_for_are_closed() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        for count in [1, MOST_DESCRIPTORS] {
            let (mut readers, writers): (Vec<_>, Vec<_>) =
                (0..count).map(|_| std::io::pipe().unwrap()).unzip();
            let writers: Vec<OwnedFd> = writers.into_iter().map(Into::into).collect();
            let id = peer.expect("describe", is_describe);
            peer.reply_with(id, described(1), &borrow(&writers));
            drop(writers);
            // Comes to an end when the client has closed its copies, and not before.
            for reader in &mut readers {
                assert_eq!(reader.read(&mut [0]).unwrap(), 0);
            }
        }
        answer_describe(&peer, 2);
    });
    let client = connect(&place).await;
    for _ in 0..2 {
        let error = client.describe(&parsed(1)).await.unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains("descriptors"), "{error}");
    }
    assert_eq!(client.describe(&parsed(2)).await.unwrap().id, handle_id(2));
    script.join().unwrap();
}

#[tokio::test]
async fn a_handle_that_comes_with_descriptors_is_not_left_behind() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        let id = peer.expect("issue", |request| matches!(request, Request::Issue(_)));
        let (_reader, writer) = std::io::pipe().unwrap();
        peer.reply_with(id, Reply::Issued(issued(1)), &[writer.as_fd()]);
        let id = peer.expect("revoke", |request| revoked_id(request) == Some(&handle_id(1)));
        peer.reply(id, revoked());
    });
    let client = connect(&place).await;
    let error = client.issue(IssueRequest::new("main_db")).await.unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
    client.close().await;
    script.join().unwrap();
}

/// Checks a memfd as the broker does, and gives and wipes what is in it.
fn take_secret(memfd: &OwnedFd) -> Vec<u8> {
    assert!(!fcntl_get_seals(memfd).unwrap().contains(SealFlags::WRITE));
    assert_eq!(fcntl_getfl(memfd).unwrap() & OFlags::RWMODE, OFlags::RDWR);
    let mut bytes = vec![0; credbroker_proto::MAX_SECRET + 1];
    let length = rustix::io::pread(memfd, &mut bytes[..], 0).unwrap();
    bytes.truncate(length);
    assert_eq!(rustix::io::pwrite(memfd, &vec![0; length], 0).unwrap(), length);
    bytes
}

#[tokio::test]
async fn a_password_is_brought_in_a_memfd_and_nowhere_else() {
    const PASSWORD: &[u8] = b"correct horse";
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        let (id, request, descriptors) = peer.receive().unwrap();
        let Request::Register(request) = request else { panic!("{request:?}") };
        assert_eq!((request.connection.as_str(), request.username.as_str()), ("scratch", "alice"));
        let [memfd] = descriptors.as_slice() else { panic!("{descriptors:?}") };
        assert_eq!(take_secret(memfd), PASSWORD);
        peer.reply(id, Reply::Registered(issued(1)));
        let id = peer.expect("revoke", |request| revoked_id(request) == Some(&handle_id(1)));
        peer.reply(id, revoked());

        let (id, _, descriptors) = peer.receive().unwrap();
        let [memfd] = descriptors.as_slice() else { panic!("{descriptors:?}") };
        peer.reply(id, refused(v1::Reason::AccessDenied));
        // The client does it where the broker has not.
        assert!(peer.receive().is_none());
        assert_eq!(take_secret(memfd), vec![0; PASSWORD.len()]);
    });
    let client = connect(&place).await;
    let secret = Secret::from_bytes(PASSWORD.to_vec()).unwrap();
    let request = RegisterRequest::new("scratch", "alice");
    let handle = client.register(request.clone(), secret).await.unwrap();
    handle.revoke().await.unwrap();
    let secret = Secret::from_bytes(PASSWORD.to_vec()).unwrap();
    let denied = client.register(request, secret).await.unwrap_err();
    assert_eq!(denied.reason(), Some(Reason::AccessDenied));
    client.close().await;
    script.join().unwrap();
}

#[tokio::test]
async fn a_secret_is_left_for_the_broker_when_nobody_waits_for_the_answer() {
    let place = Place::new();
    let limit = Duration::from_millis(100);
    let (tell, gave_up) = std::sync::mpsc::channel();
    let script = Listener::play(&place.admin_packet_socket(), move |listener| {
        let peer = listener.accept();
        let (_, request, descriptors) = peer.receive().unwrap();
        assert!(matches!(request, Request::Put(_)), "{request:?}");
        gave_up.recv().unwrap();
        assert_eq!(take_secret(&descriptors[0]), b"app:hunter2", "not zeros");
    });
    let builder = Client::builder().runtime_dir(place.runtime_dir()).timeout(limit);
    let client = builder.connect_admin_packet().await.unwrap();
    let secret = Secret::from_bytes(b"app:hunter2".to_vec()).unwrap();
    let error = client.put(PutRequest::new("main_db"), secret).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    drop(client);
    tell.send(()).unwrap();
    script.join().unwrap();
}

fn memfd(name: &str, bytes: &[u8], seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create(name, flags).unwrap();
    assert_eq!(rustix::io::write(&fd, bytes).unwrap(), bytes.len());
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

#[tokio::test]
async fn a_secret_is_revealed_in_a_memfd_that_no_child_inherits() {
    const NAME: &str = "credbroker-test-revealed";
    const SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        let peer = listener.accept();
        let reply = || {
            Reply::Revealed(v1::RevealResponse {
                username: "app".into(),
                length: 7,
                credential_version: 3,
            })
        };
        let fds = [memfd(NAME, b"hunter2", SIZE), memfd(NAME, b"hunter2", SIZE)];
        let unsealed = [memfd(NAME, b"hunter2", SealFlags::empty())];
        for descriptors in [&fds[..1], &[], &fds[..], &unsealed[..]] {
            let id = peer.expect("reveal", |request| matches!(request, Request::Reveal(_)));
            peer.reply_with(id, reply(), &borrow(descriptors));
        }
        drop((fds, unsealed));
        assert!(peer.receive().is_none());
    });
    let client = connect(&place).await;
    let revealed = client.reveal(&parsed(1)).await.unwrap();
    assert_eq!((revealed.username(), revealed.credential_version()), ("app", 3));
    assert!(revealed.expose(|bytes| bytes == b"hunter2").unwrap());
    for what in ["none", "two", "one that can be cut"] {
        let error = client.reveal(&parsed(1)).await.unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{what}: {error:?}");
    }
    client.close().await;
    script.join().unwrap();

    // The script's are closed by now, in case it is the same process.
    let ours: Vec<_> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains(NAME)))
        .collect();
    let [only] = ours.as_slice() else { panic!("{ours:?}") };
    let info = only.to_str().unwrap().replace("/fd/", "/fdinfo/");
    let info = fs::read_to_string(info).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
    let flags = u32::from_str_radix(flags, 8).unwrap();
    assert_ne!(flags & OFlags::CLOEXEC.bits(), 0, "{info}");
}

#[tokio::test]
async fn a_server_of_another_uid_is_sent_nothing() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        assert!(listener.accept().receive().is_none());
        answer_describe(&listener.accept(), 1);
    });
    let own = rustix::process::geteuid().as_raw();
    let builder = Client::builder().runtime_dir(place.runtime_dir());
    let error = builder.clone().server_uid(own + 1).connect_packet().await.unwrap_err();
    let Error::ServerUntrusted { socket, seen, trusted } = error else { panic!("{error:?}") };
    assert_eq!((socket, seen), (place.packet_socket(), own));
    assert_eq!(trusted.into_iter().collect::<Vec<_>>(), [own + 1]);
    let client = builder.server_uid(own).connect_packet().await.unwrap();
    client.describe(&parsed(1)).await.unwrap();
    script.join().unwrap();
}

#[tokio::test]
async fn the_client_connects_again_after_a_restart() {
    let place = Place::new();
    let socket = place.packet_socket();
    let script = Listener::play(&socket, |listener| answer_describe(&listener.accept(), 1));
    let client = connect(&place).await;
    client.describe(&parsed(1)).await.unwrap();
    script.join().unwrap();
    let error = client.describe(&parsed(1)).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. } | Error::Disconnected), "{error:?}");

    fs::remove_file(&socket).unwrap();
    let script = Listener::play(&socket, |listener| answer_describe(&listener.accept(), 2));
    assert_eq!(client.describe(&parsed(2)).await.unwrap().id, handle_id(2));
    script.join().unwrap();
}

#[tokio::test]
async fn a_full_backlog_is_waited_for() {
    let place = Place::new();
    // One connection may wait, which is the first.
    let listener = Listener::with_backlog(&place.packet_socket(), 0);
    let waiting = connect(&place).await;
    let builder = Client::builder().runtime_dir(place.runtime_dir());
    let limit = Duration::from_millis(100);
    let error = builder.clone().timeout(limit).connect_packet().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    let accept = tokio::task::spawn_blocking(move || (listener.accept(), listener));
    builder.connect_packet().await.unwrap();
    accept.await.unwrap();
    drop(waiting);
}

#[tokio::test]
async fn what_does_not_fit_into_a_packet_is_not_sent() {
    let place = Place::new();
    let script = Listener::play(&place.packet_socket(), |listener| {
        answer_describe(&listener.accept(), 1);
    });
    let client = connect(&place).await;
    let request = IssueRequest::new("x".repeat(credbroker_proto::MAX_PACKET));
    let error = client.issue(request).await.unwrap_err();
    assert!(matches!(error, Error::Configuration { .. }), "{error:?}");
    client.describe(&parsed(1)).await.unwrap();
    script.join().unwrap();
}
