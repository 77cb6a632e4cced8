//! The log as a whole: real files, the real thread.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use super::*;
use crate::arena::BackendChoice;

pub(crate) fn config(path: &Path) -> AuditConfig {
    AuditConfig {
        file: Some(path.to_owned()),
        stdout: false,
        durability: Durability::Write,
        max_size: 1 << 30,
        keep: 8,
        signing_key: None,
    }
}

fn open(config: &AuditConfig) -> Result<Audit, SinkError> {
    Audit::open(config, &Arena::map(BackendChoice::Auto, 64 * 1024).unwrap())
}

fn start(config: &AuditConfig) -> Audit {
    let audit = open(config).unwrap();
    audit.start().unwrap();
    audit
}

fn stop(audit: &Audit) {
    assert!(audit.stop(Duration::from_secs(10)), "the log closes");
}

/// Opens the log at `path`, records `event`, and closes it.
fn record_one(path: &Path, event: Event) -> Seq {
    let audit = start(&config(path));
    let seq = audit.always(&Record::new(event, Outcome::Done));
    stop(&audit);
    seq
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

/// The number of the last record of files that follow each other.
fn verified(paths: &[PathBuf]) -> u64 {
    let lines: Vec<String> = paths.iter().flat_map(|path| lines(path)).collect();
    Chain::verify(lines.iter().map(String::as_str)).unwrap_or_else(|broken| {
        let around = &lines[broken.line.saturating_sub(1)..=broken.line];
        panic!("{broken:?} {around:#?}")
    })
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn issued() -> Record {
    Record::new(Event::HandleIssued, Outcome::Allowed)
}

fn log() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    (dir, path)
}

#[test]
fn the_chain_goes_on_after_a_restart() {
    let (_dir, path) = log();
    assert_eq!(record_one(&path, Event::BrokerStarted), Seq(1));
    assert_eq!(record_one(&path, Event::BrokerStopped), Seq(3), "behind a checkpoint");
    assert_eq!(verified(std::slice::from_ref(&path)), 4);
    assert!(lines(&path)[3].contains("\"checkpoint\""), "{}", lines(&path)[3]);
}

#[test]
fn torn_bytes_are_kept_in_records_of_their_own() {
    for torn in [10, 2049, 20_000] {
        let (_dir, path) = log();
        record_one(&path, Event::BrokerStarted);
        let mut text = std::fs::read(&path).unwrap();
        text.extend((0..torn).map(|n| b'a' + u8::try_from(n % 26).unwrap()));
        std::fs::write(&path, text).unwrap();
        record_one(&path, Event::BrokerStopped);
        let kept: String = lines(&path)
            .iter()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .filter(|record| record["event"] == "audit.repaired")
            .flat_map(|record| {
                assert_eq!(record["detail"]["bytes"], torn);
                let torn = record["detail"]["torn"].as_str().unwrap().as_bytes().to_vec();
                data_encoding::BASE64.decode(&torn).unwrap()
            })
            .map(char::from)
            .collect();
        assert_eq!(kept.len(), torn.min(16 * 1024));
        assert!(kept.starts_with("abcdefghij"));
        verified(&[path]);
    }
}

#[test]
fn an_edited_tail_is_refused() {
    let (_dir, path) = log();
    record_one(&path, Event::BrokerStarted);
    let text = std::fs::read_to_string(&path).unwrap().replace("checkpoint", "checkpaint");
    std::fs::write(&path, text).unwrap();
    assert!(matches!(open(&config(&path)), Err(SinkError::BrokenTail { .. })));
}

#[test]
fn two_brokers_cannot_share_a_log() {
    let (_dir, path) = log();
    let _first = open(&config(&path)).unwrap();
    assert!(matches!(open(&config(&path)), Err(SinkError::InUse { .. })));
}

#[tokio::test]
async fn a_deleted_log_grants_nothing_until_there_is_a_new_one() {
    let (dir, path) = log();
    let audit = start(&config(&path));
    assert!(audit.before(&issued(), ()).await.is_ok());
    let old = dir.path().join("old");
    std::fs::rename(&path, &old).unwrap();
    assert!(audit.before(&issued(), ()).await.is_err());
    audit.always(&Record::new(Event::HandleRevoked, Outcome::Done));
    wait_for("it resumes", || audit.is_writable());
    assert!(audit.before(&issued(), ()).await.is_ok());
    stop(&audit);
    verified(&[old, path.clone()]);
    let text = lines(&path).join("\n");
    for part in ["handle.revoked", "\"deleted\"", "writable_again", "handle.issued"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[tokio::test]
async fn a_log_that_somebody_else_changes_grants_nothing_until_it_is_mended() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 3] = [
        ("trailing", |path| {
            use std::io::Write as _;
            let mut file = std::fs::File::options().append(true).open(path).unwrap();
            file.write_all(b"{\"v\":1,\"seq\":7}\n").unwrap();
        }),
        ("cut", |path| {
            std::fs::File::options().write(true).open(path).unwrap().set_len(3).unwrap();
        }),
        ("replaced", |path| {
            let copy = path.with_extension("copy");
            std::fs::copy(path, &copy).unwrap();
            std::fs::rename(copy, path).unwrap();
        }),
    ];
    for (what, change) in changes {
        let (_dir, path) = log();
        let audit = start(&config(&path));
        assert!(audit.before(&issued(), ()).await.is_ok());
        change(&path);
        assert!(audit.before(&issued(), ()).await.is_err(), "{what}");
        wait_for(what, || audit.is_writable());
        stop(&audit);
        let lines = lines(&path);
        assert!(lines.iter().any(|line| line.contains(what)), "{what} in {lines:#?}");
        if what != "cut" {
            verified(&[path]);
        }
    }
}

#[tokio::test]
async fn another_log_in_the_place_of_ours_is_not_touched() {
    let (dir, path) = log();
    let audit = start(&config(&path));
    assert!(audit.before(&issued(), ()).await.is_ok());
    let other = dir.path().join("other.jsonl");
    record_one(&other, Event::BrokerStarted);
    let text = std::fs::read(&other).unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert!(audit.before(&issued(), ()).await.is_err());
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!audit.is_writable());
    assert_eq!(std::fs::read(&path).unwrap(), text);
    std::fs::remove_file(&path).unwrap();
    wait_for("it resumes", || audit.is_writable());
}

#[tokio::test]
async fn a_refused_grant_keeps_its_number() {
    let (dir, path) = log();
    let audit = start(&config(&path));
    assert!(audit.before(&issued(), ()).await.is_ok());
    std::fs::rename(&path, dir.path().join("old")).unwrap();
    let refused = audit.before(&issued().purpose("report"), ()).await.unwrap_err();
    assert_eq!(refused.reference, Some(Seq(2)));
    wait_for("it resumes", || audit.is_writable());
    stop(&audit);
    let line = &lines(&path)[0];
    assert!(
        line.contains("\"seq\":2,")
            && line.contains(
                "\"access.denied\",\"outcome\":\"denied\",\"reason\":\"AUDIT_UNAVAILABLE\""
            )
            && line
                .contains("\"purpose\":\"report\",\"detail\":{\"instead_of\":\"handle.issued\"}"),
        "{line}"
    );
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_grant_behind() {
    let (_dir, path) = log();
    // Not started yet: the record waits in the queue.
    let audit = open(&config(&path)).unwrap();
    {
        let record = issued();
        let waiting = audit.before(&record, ());
        let gone = tokio::time::timeout(Duration::from_millis(10), waiting).await;
        assert!(gone.is_err());
    }
    audit.start().unwrap();
    // Written, but nobody takes the answer.
    {
        let record = issued();
        let mut waiting = Box::pin(audit.before(&record, ()));
        let seq = audit.head().seq;
        let polled =
            std::future::poll_fn(|context| std::task::Poll::Ready(waiting.as_mut().poll(context)));
        assert!(polled.await.is_pending());
        wait_for("it is written", || audit.head().seq > seq);
    }
    stop(&audit);
    verified(std::slice::from_ref(&path));
    let lines = lines(&path);
    assert!(lines[0].contains("access.denied") && lines[0].contains("client_gone"));
    assert!(lines[1].contains("handle.issued"));
    assert!(lines[2].contains("\"nothing_came_of\":2"), "{}", lines[2]);
}

#[tokio::test(start_paused = true)]
async fn a_log_that_stalls_refuses_in_bounded_time_and_keeps_what_takes_rights_away() {
    let (_dir, path) = log();
    // A writer that has not started stands for one that hangs in write(2).
    let audit = open(&config(&path)).unwrap();
    let refused = audit.before(&issued(), ()).await.unwrap_err();
    assert_eq!(refused.reference, Some(Seq(1)));
    let refused = audit.before(&issued(), ()).await.unwrap_err();
    assert_eq!(refused.reference, None, "the second need not wait to know");
    for _ in 0..20_000 {
        audit.always(&Record::new(Event::HandleRevoked, Outcome::Done));
    }
    audit.start().unwrap();
    wait_for("it resumes", || audit.is_writable());
    stop(&audit);
    let last = verified(std::slice::from_ref(&path));
    let lines = lines(&path);
    assert_eq!(lines.len() as u64, last);
    let given_up = lines.iter().find(|line| line.contains("queue_full")).unwrap();
    let revoked = lines.iter().filter(|line| line.contains("handle.revoked")).count();
    let count = format!("\"given_up\":{},", 20_000 - revoked);
    assert!(given_up.contains(&count), "{count} in {given_up}");
}

#[tokio::test]
async fn the_chain_runs_through_rotated_files() {
    let (dir, path) = log();
    let config = AuditConfig { max_size: 16 * 1024, keep: 3, ..config(&path) };
    let audit = start(&config);
    for _ in 0..300 {
        assert!(audit.before(&issued(), ()).await.is_ok());
    }
    stop(&audit);
    let rotated = |n: u32| PathBuf::from(format!("{}.{n}", path.display()));
    assert!(rotated(3).exists() && !rotated(4).exists(), "three are kept");
    let files = [rotated(3), rotated(2), rotated(1), path.clone()];
    let all: Vec<String> = files.iter().flat_map(|file| lines(file)).collect();
    for file in &files {
        let first = &lines(file)[0];
        assert!(first.contains("\"checkpoint\""), "{first}");
        let len = std::fs::metadata(file).unwrap().len();
        assert!(len < 20 * 1024, "{len}");
    }
    for (before, after) in all.iter().zip(all.iter().skip(1)) {
        let hash = before.rsplit_once("\"hash\":").unwrap().1.trim_end_matches('}');
        assert!(after.contains(&format!("\"prev\":{hash}")), "{before} {after}");
    }
    // The broker died before there was a new file.
    std::fs::rename(&path, rotated(1)).unwrap();
    let seq = audit.head().seq;
    drop(audit);
    let seq_after = {
        let audit = start(&config);
        assert!(audit.before(&issued(), ()).await.is_ok());
        stop(&audit);
        audit.head().seq
    };
    assert_eq!(seq_after, seq + 3, "said, issued, signed");
    assert!(lines(&path)[0].contains("\"missing\""), "{}", lines(&path)[0]);
    drop(dir);
}

#[tokio::test]
async fn a_flood_of_denials_stays_small() {
    let (_dir, path) = log();
    let audit = start(&config(&path));
    let denied = Record::new(Event::AccessDenied, Outcome::Denied).reason("no_grant");
    let mut references = std::collections::BTreeSet::new();
    for _ in 0..100_000 {
        references.insert(audit.denied(Uid::from_raw(1000), &denied).0);
    }
    stop(&audit);
    let lines = lines(&path);
    let len = std::fs::metadata(&path).unwrap().len();
    println!("100000 denials: {} records, {len} bytes", lines.len());
    assert!(lines.len() < 60 && len < 32 * 1024);
    let records = lines.iter().map(|line| serde_json::from_str(line).unwrap());
    let records: Vec<serde_json::Value> = records.collect();
    let written: Vec<_> =
        records.iter().filter(|record| record["event"] == "access.denied").collect();
    let counted = written.iter().map(|r| r["detail"]["count"].as_u64().unwrap_or(1));
    assert_eq!(counted.sum::<u64>(), 100_000, "nothing is lost in the count");
    for reference in references {
        assert!(written.iter().any(|record| record["seq"] == reference), "ref={reference}");
    }
}

#[tokio::test]
async fn a_reader_follows() {
    let (_dir, path) = log();
    let audit = start(&config(&path));
    assert!(audit.before(&issued(), ()).await.is_ok());
    let (last, mut following) = audit.tail(10);
    assert_eq!(last, lines(&path));
    let seq = audit.always(&Record::new(Event::HandleRevoked, Outcome::Done));
    let followed = following.next().await.unwrap();
    assert!(followed.line.contains(&format!("\"seq\":{seq},")), "{}", followed.line);
    assert_eq!(followed.skipped, 0);
}

/// 64 tasks grant and deny while the file fails and comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_chain_holds_while_the_file_fails_and_comes_back() {
    let (dir, path) = log();
    let audit = start(&config(&path));
    let over = Arc::new(AtomicBool::new(false));
    let counts = Arc::new([const { AtomicU64::new(0) }; 2]);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..64_u32 {
        let (audit, over, counts) = (audit.clone(), Arc::clone(&over), Arc::clone(&counts));
        tasks.spawn(async move {
            let denied = Record::new(Event::AccessDenied, Outcome::Denied).reason("no_grant");
            let issued = issued().detail("task", task);
            while !over.load(Ordering::Relaxed) {
                let granted = audit.before(&issued, ()).await.is_ok();
                counts[usize::from(granted)].fetch_add(1, Ordering::Relaxed);
                audit.denied(Uid::from_raw(task), &denied);
                tokio::task::yield_now().await;
            }
        });
    }
    let mut pieces = Vec::new();
    for piece in 0..3 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let old = dir.path().join(format!("old{piece}"));
        std::fs::rename(&path, &old).unwrap();
        // A directory in its place keeps the broker from making a new file.
        std::fs::create_dir(&path).unwrap();
        pieces.push(old);
        wait_for("the failure is seen", || !audit.is_writable());
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert!(!audit.is_writable());
        std::fs::remove_dir(&path).unwrap();
        wait_for("it resumes", || audit.is_writable());
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    over.store(true, Ordering::Relaxed);
    while tasks.join_next().await.is_some() {}
    stop(&audit);
    pieces.push(path.clone());
    let last = verified(&pieces);
    assert_eq!(last, audit.head().seq);
    let all: Vec<String> = pieces.iter().flat_map(|piece| lines(piece)).collect();
    let granted = all.iter().filter(|line| line.contains("\"event\":\"handle.issued\"")).count();
    let [refused, counted] = counts.each_ref().map(|count| count.load(Ordering::Relaxed));
    println!("{last} records: {counted} granted, {refused} refused");
    assert_eq!(granted as u64, counted, "a record for each grant, and none without");
    assert!(refused > 64);
}

/// How many grants a second `tasks` get through the writer, and the median time of one.
async fn rate(audit: &Audit, tasks: u32) -> (u64, Duration) {
    let until = Instant::now() + Duration::from_millis(500);
    let mut set = tokio::task::JoinSet::new();
    for _ in 0..tasks {
        let audit = audit.clone();
        set.spawn(async move {
            let record = issued().subject("somebody").purpose("report").detail("ttl_seconds", 60);
            let mut spans = Vec::new();
            while Instant::now() < until {
                let began = Instant::now();
                assert!(audit.before(&record, ()).await.is_ok());
                spans.push(began.elapsed());
            }
            spans
        });
    }
    let mut spans: Vec<Duration> = set.join_all().await.into_iter().flatten().collect();
    spans.sort_unstable();
    (spans.len() as u64 * 2, spans[spans.len() / 2])
}

/// Prints what group commit gives, beside a write in line, which is what it has to beat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_grants_share_a_write() {
    let mut synced = Vec::new();
    for durability in [Durability::Write, Durability::Fsync] {
        for tasks in [1, 8, 64] {
            let (_dir, path) = log();
            let audit = start(&AuditConfig { durability, ..config(&path) });
            let (grants, median) = rate(&audit, tasks).await;
            println!("{durability}: {tasks} tasks, {grants} grants/s, p50 {median:?}");
            stop(&audit);
            verified(&[path]);
            if durability == Durability::Fsync {
                synced.push(grants);
            }
        }
    }
    let (_dir, path) = log();
    let mut file = file::LogFile::open(&path).unwrap().file;
    let mut chain = Chain::continuing(None, "host");
    let record = issued().subject("somebody").purpose("report").detail("ttl_seconds", 60);
    let mut spans = Vec::new();
    for seq in 1..=5000 {
        let (began, mut line) = (Instant::now(), String::new());
        chain.append(Seq(seq), SystemTime::now(), &record.text(), &mut line);
        file.append(line.as_bytes(), false).unwrap();
        spans.push(began.elapsed());
    }
    spans.sort_unstable();
    println!("in line, write: p50 {:?}", spans[spans.len() / 2]);
    assert!(synced[2] > synced[0], "64 tasks share syncs: {synced:?}");
}
