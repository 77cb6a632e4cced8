//! A stage for foreign programs: a private PostgreSQL, a database, and a broker with three
//! connections to it. Prints where all of it is, as lines for a shell, and keeps it until standard
//! input ends. Started by `tests/clients.sh`, `tests/mcp-clients.sh` and
//! `tests/entry-page.sh`.
#![allow(clippy::print_stdout, reason = "what it prints is what it is started for")]

use std::io::{self, Read as _};

use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Cluster, Database};
use credbroker_e2e::{binaries, postgres, shared};
use credbroker_proto::RUNTIME_DIR_ENV;

/// Databases beside the connection's own: one to restore into for each way.
const OTHERS: [&str; 3] = ["direct", "door", "ambient"];

fn main() -> io::Result<()> {
    let cluster = Cluster::start(shared::directory());
    let database = cluster.server().database();
    make_others(&database);
    let broker = setup(&database).start();
    print(&database, &broker);
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// `main_db` is opened with a handle, `ambient_db` is the same database without one, and
/// `stored_db` is it too, as soon as somebody stores its credential.
fn setup(database: &Database) -> Setup {
    let client = Identity::client();
    let others = format!("{}_*", database.name());
    let databases = [database.name(), others.as_str()];
    Setup::new()
        .connection("main_db", database, Via::Tls)
        .connection("ambient_db", database, Via::Tls)
        .stored_connection("stored_db", database)
        .set("connections.main_db.databases", databases)
        .set("connections.ambient_db.databases", databases)
        .set("limits.rate_per_second", 2000)
        .grant(
            Grant::to(&client, &["issue", "open"], &["main_db", "stored_db"])
                .with("name", "client"),
        )
        .grant(
            Grant::to(&Identity::worker(), &["issue", "open"], &["main_db"]).with("name", "worker"),
        )
        .grant(Grant::to(&client, &["ambient"], &["ambient_db"]).with("name", "ambient"))
}

fn make_others(database: &Database) {
    for suffix in OTHERS {
        let name = database.name();
        let create = format!("CREATE DATABASE {name}_{suffix} OWNER {name}");
        database.admin().batch_execute(&create).expect("a database can be made");
    }
}

fn print(database: &Database, broker: &Broker) {
    let server = database.server();
    let client = Identity::client();
    let lines = [
        ("STAGE_DATABASE", database.name().to_owned()),
        ("STAGE_PASSWORD", database.canary().reveal().to_owned()),
        ("STAGE_SOCKET_DIR", server.socket_dir.display().to_string()),
        ("STAGE_PORT", server.port.to_string()),
        ("STAGE_PROGRAMS", postgres::programs().display().to_string()),
        ("STAGE_DOOR", broker.runtime_dir().join("postgres").display().to_string()),
        ("STAGE_CREDBROKER", binaries::credbroker().display().to_string()),
        ("STAGE_SQL_WORKER", binaries::sql_worker().display().to_string()),
        ("STAGE_CLIENT_UID", client.uid().to_string()),
        ("STAGE_WORKER_UID", Identity::worker().uid().to_string()),
        ("STAGE_SOCKET_GROUP", credbroker_e2e::identity::SOCKET_GROUP.to_string()),
        ("STAGE_SERVER_UID", Identity::broker().uid().to_string()),
        (RUNTIME_DIR_ENV, broker.runtime_dir().display().to_string()),
    ];
    for (name, value) in lines {
        println!("{name}='{value}'");
    }
    println!("STAGE_READY=1");
}
