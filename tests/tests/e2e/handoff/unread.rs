//! Replies that nobody reads: what nobody took is ended, and nothing else.

use std::thread;
use std::time::Duration;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::Broker;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::packet::{Packets, Received, open};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::wait::holds_for;
use credbroker_proto::v1::packet_reply::Reply;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};

use super::{MAY, granted, take, unix};

/// Long enough for a session to end that is about to.
const SETTLED: Duration = Duration::from_millis(500);

/// Asks for a socket and waits until the reply is there, unread.
fn leave_unread(packets: &Packets, token: &str) {
    packets.send(1, open(token), &[]).expect("the broker reads");
    let mut there = [PollFd::new(packets.socket(), PollFlags::IN)];
    let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut there, Some(&patience)), Ok(1), "no reply has come");
}

fn started() -> (Database, Broker, Identity) {
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = granted(unix(&database), &client, &MAY).start();
    (database, broker, client)
}

fn reasons(broker: &Broker) -> Vec<String> {
    let closed = broker.audit().of("session.closed");
    closed.iter().filter_map(|record| record.text("reason").map(str::to_owned)).collect()
}

#[test]
fn g5_a_socket_that_nobody_took_ends_with_the_connection_that_it_came_by() {
    let (database, broker, client) = started();
    // This process lives on, and so do the sockets that it took.
    let other = broker.packets(&client);
    let token = other.issue("main_db").expect("a grant").token;
    let mut taken = take(&other, &token);

    let packets = broker.packets(&client);
    let mut before = take(&packets, &token);
    leave_unread(&packets, &token);
    assert_eq!(database.backends(), 3);
    drop(packets);
    assert_eventually!(database.backends() == 2, "the backend that nobody has lives on");
    assert_eventually!(reasons(&broker) == ["client_gone"], "{:?}", reasons(&broker));
    taken.query("SELECT 1").expect("taken over another connection");
    before.query("SELECT 1").expect("taken over the same connection, before");
    drop(other);
    assert!(holds_for(SETTLED, || database.backends() == 2), "what was taken is not ended");
    taken.query("SELECT 1").expect("its connection is closed, and it was read");
}

#[test]
fn who_has_said_all_may_still_read() {
    let (database, broker, client) = started();
    let packets = broker.packets(&client);
    let token = packets.issue("main_db").expect("a grant").token;
    leave_unread(&packets, &token);
    shutdown(packets.socket(), Shutdown::Write).expect("a connected socket");
    assert!(holds_for(SETTLED, || database.backends() == 1), "it had no time to read");
    let Received { reply, descriptors } =
        packets.receive().expect("a reply").expect("it waits for its reader");
    assert!(matches!(reply.reply, Some(Reply::Opened(_))), "{reply:?}");
    assert_eq!(descriptors.len(), 1);
    drop(packets);
    assert!(holds_for(SETTLED, || database.backends() == 1), "it was read");
    drop(descriptors);

    // And who then does not is treated like anybody who leaves.
    let packets = broker.packets(&client);
    leave_unread(&packets, &token);
    shutdown(packets.socket(), Shutdown::Write).expect("a connected socket");
    assert_eq!(database.backends(), 2);
    // The broker sees the end of what is said first.
    thread::sleep(Duration::from_millis(100));
    drop(packets);
    assert_eventually!(database.backends() == 1, "the backend that nobody has lives on");
}
