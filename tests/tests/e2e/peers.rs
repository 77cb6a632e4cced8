//! Who is calling: what the kernel says of the process that connected, and of no other, wherever
//! that process lives and wherever its descriptor goes.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::binaries;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::handles::Handles;
use credbroker_e2e::identity::{
    Identity, SOCKET_GROUP, pass_descriptor, several_or_say, take_descriptor,
};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::PATIENCE;
use credbroker_proto::v1::{Bind, IssueHandleRequest};
use rustix::process::{Pid, Signal, kill_process};
use tonic::Code;

/// What a child that speaks over `stdin` is told, as `uid=… pid=… issue=…`.
fn ask(identity: &Identity, stdin: impl Into<Stdio>) -> String {
    let mut command = identity.command(binaries::helper());
    let done = command.args(["ask", "main_db"]).stdin(stdin).output().expect("the child runs");
    assert!(done.status.success(), "{}", transcript(&done));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

fn selector(keys: &[(&str, toml::Value)]) -> toml::Table {
    keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
}

/// A broker whose client must be all that `peer` says.
fn granting(database: &Database, peer: toml::Table) -> Setup {
    let grant = Grant::to(&Identity::client(), &["issue", "open"], &["main_db"]);
    Setup::new().connection("main_db", database, Via::Tls).grant(grant.with("peer", peer))
}

#[test]
fn a_sibling_pid_namespace_has_no_pid_and_all_rights() {
    if !several_or_say("unshare(1) needs root") {
        return;
    }
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let config = setup.write();
    let mut command =
        Identity::broker().command_apart(&["--pid", "--fork"], binaries::credbrokerd());
    command.arg("run").arg("--config").arg(config);
    let broker = setup.start_by(command);

    let client = Identity::client();
    let apart = |program: PathBuf| {
        let mut command = client.command_apart(&["--pid", "--fork"], program);
        broker.tell(&mut command);
        command
    };
    let mut ask = apart(binaries::helper());
    let done = output(ask.args(["ask", "main_db", "--socket"]).arg(broker.socket()), PATIENCE);
    let said = transcript(&done);
    assert!(said.contains(&format!("uid={} pid=0 issue=issued", client.uid())), "{said}");

    let mut exec = apart(binaries::credbroker());
    exec.args(["exec", "main_db", "--", "psql", "-AtXc", "SELECT 40 + 2"]);
    let done = output(&mut exec, PATIENCE);
    assert!(done.status.success(), "{}\n{}", transcript(&done), broker.log());
    assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), "42");

    // A handle of `exec` is bound to a process that has no number here.
    let audit = broker.audit();
    let opened = audit.of("session.opened");
    assert_eq!(opened.len(), 1);
    assert_eq!(opened[0].number("peer.uid"), Some(client.uid().into()));
    assert!(audit.of("handle.issued").iter().all(|record| record.number("peer.pid").is_none()));
    assert_eventually!(
        audit.of("handle.revoked").len() == 1,
        "the handle ends with its process: {}",
        broker.log()
    );
    println!("pid 0: {} handles issued, {} session", audit.of("handle.issued").len(), opened.len());
    end_below(broker.pid());
}

/// Ends what `unshare` started: it keeps signals to itself.
fn end_below(unshare: u32) {
    let children = format!("/proc/{unshare}/task/{unshare}/children");
    let children = fs::read_to_string(children).expect("unshare has a child");
    for child in children.split_whitespace() {
        let pid = child.parse().ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, Signal::TERM).expect("the broker is told to end");
    }
}

#[test]
fn a_supplementary_group_is_enough_where_a_grant_says_so() {
    if !several_or_say("groups are given by root") {
        return;
    }
    const GROUP: u32 = 64_130;
    let database = Server::shared().database();
    let broker = granting(&database, selector(&[("group", i64::from(GROUP).into())])).start();
    let outside = Identity::numbered(64_131);
    let inside = outside.clone().in_group(GROUP);
    let token = broker.handles(&inside).issue("main_db").expect("it is in the group").token;
    let mut session = broker.session(&inside, "main_db", &token);
    session.query("SELECT 1").expect("a query");
    let primary = Identity::exactly(64_132, GROUP).in_group(SOCKET_GROUP);
    broker.handles(&primary).issue("main_db").expect("its gid is the group");
    let refused = broker.handles(&outside).issue("main_db").expect_err("it is not in the group");
    assert_eq!(refused.reason, "ACCESS_DENIED");
    assert_eq!(broker.handles(&inside).whoami().expect("an answer").groups, [SOCKET_GROUP, GROUP]);
    println!("groups: 2 identities in, 1 out");
}

#[test]
fn a_uid_that_is_not_mapped_is_nobody() {
    if !several_or_say("a user namespace of another uid") {
        return;
    }
    let database = Server::shared().database();
    let own = Identity::broker();
    // In its namespace the broker's own uid and gid are all there is.
    let setup = Setup::new()
        .connection("main_db", &database, Via::Tls)
        .set("broker.socket_group", i64::from(own.gid()))
        .grant(
            Grant::to(&Identity::client(), &["issue", "open"], &["main_db"])
                .with("peer", selector(&[("group", i64::from(own.gid()).into())])),
        );
    let config = setup.write();
    let mut probe = own.command("unshare");
    if !output(probe.args(["--user", "--map-current-user", "true"]), PATIENCE).status.success() {
        let _unheard =
            io::stderr().write_all(b"NOT PROVED: this kernel lets no user namespace be made\n");
        return;
    }
    let mut command = own.command_with_death_signal("unshare", "TERM");
    command.args(["--user", "--map-current-user", "--"]);
    command.arg(binaries::credbrokerd()).arg("run").arg("--config").arg(config);
    let broker = setup.start_by(command);

    // It is in the group that the grant asks for, and still stands for everybody.
    let stranger = Identity::exactly(64_133, own.gid());
    let service = broker.handles(&stranger);
    let who = service.whoami().expect("an answer");
    assert_eq!(who.uid, 65534);
    assert!(who.warnings.iter().any(|warning| warning.contains("not mapped")), "{who:?}");
    let refused = service.issue("main_db").expect_err("nobody in particular");
    assert_eq!((refused.code, refused.reason.as_str()), (Code::PermissionDenied, "ACCESS_DENIED"));
    assert!(broker.log().contains("uid=65534"), "{}", broker.log());
    assert!(broker.log().contains("reason=overflow_uid"), "{}", broker.log());
    println!("uid 65534: seen for {}, 1 of 1 denied", stranger.uid());
}

#[test]
fn without_pidfds_ids_work_and_nothing_is_bound() {
    let database = Server::shared().database();
    let client = Identity::client();
    let old = |setup: Setup| setup.environment("CREDBROKERD_TEST_NO_PEERPIDFD", "1");
    let setup = old(Broker::usual_setup(&database, Via::Tls));
    let _config = setup.write();
    let said = transcript(&output(&mut setup.command("posture"), PATIENCE));
    assert!(said.contains("pidfd                    unavailable"), "{said}");

    let broker = setup.start();
    let service = broker.handles(&client);
    let token = service.issue("main_db").expect("uids need no pidfd").token;
    let _session = broker.session(&client, "main_db", &token);
    let bound = IssueHandleRequest {
        connection: "main_db".into(),
        bind: Bind::Lifetime.into(),
        ..Default::default()
    };
    let refused = service.issue_with(bound).expect_err("nobody would see the process exit");
    assert_eq!((refused.code, refused.reason.as_str()), (Code::Unimplemented, "UNSUPPORTED"));
    let started = broker.audit().of("broker.started");
    assert_eq!(started[0].text("detail.pidfd"), Some("unavailable"));
    drop(broker);

    for (key, value) in [("exe", "/bin/sh"), ("unit", "app.service")] {
        let peer = selector(&[("uid", i64::from(client.uid()).into()), (key, value.into())]);
        let setup = old(granting(&database, peer));
        let _config = setup.write();
        let done = output(&mut setup.command("run"), PATIENCE);
        let said = transcript(&done);
        assert_eq!(done.status.code(), Some(78), "{said}");
        assert!(said.contains(&format!("grants[0].peer.{key}: cannot be believed")), "{said}");
    }
    println!("no pidfd: 1 session by uid, 1 bound handle and 2 selectors refused");
}

#[test]
fn an_inherited_descriptor_speaks_as_who_connected() {
    if !several_or_say("two uids at one descriptor") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let (client, attacker) = (Identity::client(), Identity::attacker());
    let connect = |identity: &Identity| identity.connect(&broker.socket()).expect("a connection");
    let by = |uid: u32, pid: u32, issue: &str| format!("uid={uid} pid={pid} issue={issue}");
    let own = std::process::id();
    // The broker never hears of the process that speaks.
    let said = ask(&client, std::os::fd::OwnedFd::from(connect(&attacker)));
    assert_eq!(said, by(attacker.uid(), own, "ACCESS_DENIED"));
    let said = ask(&attacker, std::os::fd::OwnedFd::from(connect(&client)));
    assert_eq!(said, by(client.uid(), own, "issued"));
    println!("inherited: 2 of 2 connections kept their identity");
}

#[test]
fn a_passed_descriptor_speaks_as_who_connected_and_for_as_long_as_it_lives() {
    if !several_or_say("two uids at one descriptor") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let (client, attacker) = (Identity::client(), Identity::attacker());
    for (lender, may) in [(&client, true), (&attacker, false)] {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut command = lender.command(binaries::helper());
        let mut child = command
            .arg("lend")
            .arg(broker.socket())
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .spawn()
            .expect("the lender runs");
        drop(command);
        let lent = take_descriptor(&ours).expect("the lender's connection");
        let service = Handles::over(UnixStream::from(lent)).expect("a service");
        let who = service.whoami().expect("an answer");
        assert_eq!((who.uid, who.pid), (lender.uid(), Some(child.id())));
        assert_eq!(service.issue("main_db").is_ok(), may);

        // With its process the identity ends, although the connection does not.
        drop(ours);
        child.wait().expect("the lender ends");
        let refused = service.issue("main_db").expect_err("the process has exited");
        assert_eq!(refused.reason, "ACCESS_DENIED");
    }
    assert!(broker.log().contains("the peer has exited"), "{}", broker.log());
    println!("passed: 2 of 2 connections kept their identity, and lost it with their process");
}

#[test]
fn stream_sockets_take_no_descriptors() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut refused = 0;
    for socket in [broker.socket(), broker.door()] {
        let stream = Identity::client().connect(&socket).expect("a connection");
        match pass_descriptor(&stream, &stream) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => refused += 1,
            Err(error) => panic!("{}: {error}", socket.display()),
            Ok(()) => assert!(!has_passrights(), "{} took a descriptor", socket.display()),
        }
    }
    println!("SO_PASSRIGHTS: {refused} of 2 stream sockets refuse descriptors by the kernel");
}

/// Linux 6.16 has SO_PASSRIGHTS.
fn has_passrights() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let mut numbers = release.split(['.', '-']).map_while(|part| part.trim().parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(16))
}

#[test]
fn a_unit_is_matched_in_full_and_a_users_own_is_not() {
    if !several_or_say("cgroups are made by root") {
        return;
    }
    let Some(mount) =
        ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new).into_iter().find(|mount| {
            mount.join("cgroup.procs").exists() && mount.join("cgroup.subtree_control").exists()
        })
    else {
        let _unheard = io::stderr().write_all(b"NOT PROVED: there is no cgroup v2\n");
        return;
    };
    let unit = format!("cb-{}.service", std::process::id());
    let cgroups: Vec<Cgroup> = [
        format!("system.slice/{unit}"),
        format!("system.slice/{unit}/child"),
        format!("system.slice/other-{unit}"),
        format!("cb-user-{unit}/system.slice/{unit}"),
    ]
    .iter()
    .map(|path| Cgroup::make(mount, path))
    .collect();

    let database = Server::shared().database();
    let client = Identity::client();
    let peer = selector(&[("uid", i64::from(client.uid()).into()), ("unit", unit.as_str().into())]);
    let broker = granting(&database, peer).start();
    let from = |cgroup: &Path| {
        let mut child = Identity::own().command("sh");
        let script = "echo $$ > \"$0/cgroup.procs\" && exec \"$@\"";
        child.args(["-c", script]).arg(cgroup).arg("setpriv");
        child.arg(format!("--groups={SOCKET_GROUP}")).arg(format!("--regid={}", client.gid()));
        child.arg(format!("--reuid={}", client.uid()));
        child.arg("--").arg(binaries::helper()).args(["ask", "main_db", "--socket"]);
        transcript(&output(child.arg(broker.socket()), PATIENCE))
    };
    let said: Vec<String> = cgroups.iter().map(|cgroup| from(&cgroup.path)).collect();
    assert!(said[0].contains("issue=issued"), "{}\n{}", said[0], broker.log());
    for said in &said[1..] {
        assert!(said.contains("issue=ACCESS_DENIED"), "{said}");
    }
    let nowhere = broker.handles(&client).issue("main_db").expect_err("a process of no unit");
    assert_eq!(nowhere.reason, "ACCESS_DENIED");
    println!("units: 1 of 5 cgroups is the unit's");
}

/// A cgroup, removed on drop with those above it that nobody else uses.
struct Cgroup {
    mount: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    fn make(mount: &Path, path: &str) -> Self {
        let path = mount.join(path);
        fs::create_dir_all(&path).expect("root makes a cgroup");
        Self { mount: mount.to_owned(), path }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in self.path.ancestors().take_while(|path| *path != self.mount) {
            let _in_use = fs::remove_dir(path);
        }
    }
}

#[test]
fn a_program_that_the_sandbox_hides_is_named_and_matches_nobody() {
    let database = Server::shared().database();
    let client = Identity::client();
    let shell = [("uid", i64::from(client.uid()).into()), ("exe", "/bin/sh".into())];
    let setup = granting(&database, selector(&shell));
    let _config = setup.write();
    let checked = output(&mut setup.command("check-config"), PATIENCE);
    let said = transcript(&checked);
    assert!(checked.status.success(), "{said}");
    assert!(said.contains("# warning: grant grants[0]: exe /bin/sh cannot be evaluated"), "{said}");
    let posture = transcript(&output(&mut setup.command("posture"), PATIENCE));
    assert!(posture.contains("selectors_not_evaluated  1: "), "{posture}");
    let broker = setup.start();
    let refused = broker.handles(&client).issue("main_db").expect_err("it cannot be told");
    assert_eq!(refused.reason, "ACCESS_DENIED");
    assert!(broker.log().contains("reason=no_grant nearest=grants[0]"), "{}", broker.log());
    println!("exe: 1 selector named, 0 peers matched");
}

/// Descriptors of the broker, by what they refer to.
fn descriptors(broker: &Broker) -> Vec<String> {
    let mut all: Vec<String> = fs::read_dir(format!("/proc/{}/fd", broker.pid()))
        .expect("the broker's descriptors")
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    all.sort();
    all
}

fn serves(broker: &Broker) -> bool {
    let client = Identity::client();
    // Who is turned away gets no answer.
    let Ok(handles) = Handles::connect(&client, &broker.socket()) else { return false };
    let Ok(issued) = handles.issue("main_db") else { return false };
    let Ok(mut session) = broker.login(&client, "main_db", &issued.token) else { return false };
    session.query("SELECT 1").is_ok()
}

#[test]
fn g7_ten_thousand_failing_peers_leave_no_descriptor() {
    /// Each of the two sockets has a queue of 1024.
    const ROUNDS: usize = 10;
    const DEAD_EACH: usize = 300;
    const KILLED_EACH: usize = 50;
    const GARBAGE: usize = 3_000;
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let config = setup.write();
    let mut command = Identity::broker().command_with_death_signal("prlimit", "TERM");
    command.args(["--nofile=64:64", "--"]).arg(binaries::credbrokerd());
    command.arg("run").arg("--config").arg(config);
    let mut broker = setup.start_by(command);
    assert!(serves(&broker), "{}", broker.log());
    let limits = fs::read_to_string(format!("/proc/{}/limits", broker.pid())).expect("limits");
    let limit = limits.lines().find(|line| line.starts_with("Max open files")).expect("a limit");
    assert_eq!(limit.split_whitespace().nth(4), Some("64"), "{limit}");
    let quiet = |broker: &Broker| database.backends() == 0 && descriptors(broker).len() < 40;
    assert_eventually!(quiet(&broker), "the first session is gone");
    let before = descriptors(&broker);

    let (socket, door) = (broker.socket(), broker.door());
    let attacker = Identity::attacker();
    let flood = |each: usize| {
        let mut command = attacker.command(binaries::helper());
        command.arg("flood").arg(each.to_string()).args([&socket, &door]);
        let done = output(&mut command, PATIENCE);
        // Killed by itself, with everything open.
        assert!(done.status.code().is_none(), "{}", transcript(&done));
        each * 2
    };
    let mut failed = 0;
    for _ in 0..ROUNDS {
        // Whoever is served was behind those of the last round, so both queues are empty.
        assert_eventually!(within Duration::from_secs(20), serves(&broker), "it does not serve");
        // Dead before they are accepted: while they connect, the broker stands still.
        broker.process().signal(Signal::STOP);
        failed += flood(DEAD_EACH);
        broker.process().signal(Signal::CONT);
        // Killed in the middle of whatever the broker makes of them.
        failed += flood(KILLED_EACH);
    }
    let garbage: [&[u8]; 6] = [
        b"",
        b"\0\0\0\x08\x04\xd2\x16\x2f",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff",
        b"\0\0\0\x10\0\x03\0\0user\0main_db",
        b"\x7f\xff\xff\xff\0\x03\0\0",
        b"\x16\x03\x01\0\xc8",
    ];
    let sent = attacker.act(|| {
        (0..GARBAGE)
            .filter(|number| {
                let target = if number % 2 == 0 { &socket } else { &door };
                let Ok(mut stream) = UnixStream::connect(target) else { return false };
                let _hung_up = garbage.get(number / 2 % 6).map(|bytes| stream.write_all(bytes));
                true
            })
            .count()
    });
    failed += sent.expect("the thread runs");
    assert!(failed >= 10_000, "only {failed} peers failed");

    assert_eventually!(within Duration::from_secs(20), serves(&broker), "it does not serve");
    assert_eventually!(
        within Duration::from_secs(20),
        database.backends() == 0 && descriptors(&broker) == before,
        "descriptors are left: {:?}\nbefore: {before:?}",
        descriptors(&broker)
    );
    assert!(!broker.log().contains("panicked"), "{}", broker.log());
    println!(
        "G7: {failed} failing peers with RLIMIT_NOFILE=64, {} descriptors before and after",
        before.len()
    );
}

#[test]
fn accept_does_not_spin_when_descriptors_run_out() {
    if !several_or_say("many uids fill what one may not") {
        return;
    }
    const LOOKED_AT: Duration = Duration::from_secs(3);
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let config = setup.write();
    let mut command = Identity::broker().command_with_death_signal("prlimit", "TERM");
    // Enough to start with, of which each core's runtime takes some, and to serve one client; and
    // less than the places that there are take.
    let most = 37 + 4 * thread::available_parallelism().map_or(1, usize::from);
    command.args([&format!("--nofile={most}:{most}"), "--"]).arg(binaries::credbrokerd());
    command.arg("run").arg("--config").arg(config);
    let broker = setup.start_by(command);
    let (socket, door) = (broker.socket(), broker.door());
    let before = processor_time(broker.pid());
    let started = Instant::now();
    let held: Vec<UnixStream> = (64_140..64_170)
        .map(Identity::numbered)
        .flat_map(|attacker| [attacker.connect(&socket), attacker.connect(&door)])
        .map(|stream| stream.expect("the queue has room"))
        .collect();
    thread::sleep(LOOKED_AT.saturating_sub(started.elapsed()));
    let (spent, took) = (processor_time(broker.pid()) - before, started.elapsed());

    let log = broker.log();
    let full: Vec<&str> = log.lines().filter(|line| line.contains("cannot accept")).collect();
    let turned_away: usize = full
        .iter()
        .filter_map(|line| line.rsplit("turned_away=").next()?.parse::<usize>().ok())
        .sum();
    // A pause lies between two times, of each socket.
    assert!((1..=150).contains(&full.len()), "met {} times: {log}", full.len());
    assert!(turned_away > 0, "newcomers are left waiting: {log}");
    assert!(spent < took / 2, "{spent:?} of processor time in {took:?}");
    drop(held);
    assert_eventually!(within Duration::from_secs(20), serves(&broker), "it does not serve");
    println!(
        "full table: met {} times, {turned_away} of 60 turned away, {spent:?} of processor time in {took:?}, serving after",
        full.len()
    );
}

/// User and system time of a process.
fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields[11..=12].iter().map(|field| field.parse::<u64>().expect("ticks")).sum();
    Duration::from_secs(ticks)
        / u32::try_from(rustix::param::clock_ticks_per_second()).expect("100")
}
