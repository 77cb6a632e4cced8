//! Counters for Prometheus, and how they are read.
//!
//! No label carries what a caller typed: connections by the names of the configuration, verbs
//! and reasons from fixed lists. So the number of series is bounded by the configuration, and
//! nothing that a caller may not know can be learned by asking for it and looking here.

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub(crate) use self::serve::{MetricsError, Server, serve};
use crate::arena::Usage;
use crate::connection::ConnectionName;
use crate::policy::DenyReason;

mod serve;

/// Upper bounds in seconds: from a lookup in memory to a dial that times out.
const BUCKETS: [f64; 16] = [
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

/// The counters. Cheap to clone; clones count together.
#[derive(Clone)]
pub(crate) struct Metrics {
    shared: Arc<Shared>,
}

struct Shared {
    /// Also keeps scrapes apart, for each sets the gauges.
    registry: Mutex<Registry>,
    known: RwLock<BTreeSet<ConnectionName>>,
    requests: Family<RequestLabels, Counter>,
    request_duration: Family<VerbLabel, Histogram, fn() -> Histogram>,
    connect_duration: Family<ConnectionLabel, Histogram, fn() -> Histogram>,
    upstream_errors: Family<UpstreamErrorLabels, Counter>,
    session_bytes: Family<BytesLabels, Counter>,
    denied: Family<ReasonLabel, Counter>,
    gauges: Gauges,
}

/// What is looked up when somebody asks.
#[derive(Default)]
struct Gauges {
    handles: Gauge,
    sessions: Gauge,
    arena: Family<StateLabel, Gauge>,
    audit_records: Counter,
    audit_writable: Gauge,
    credential_expiry: Family<ConnectionLabel, Gauge<f64, AtomicU64>>,
    warm_spares: Family<ConnectionLabel, Gauge>,
    last_reload_successful: Gauge,
}

/// The state of the broker at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// Live handles.
    pub(crate) handles: usize,
    /// Sessions, those being opened included.
    pub(crate) sessions: usize,
    pub(crate) arena: Usage,
    /// Records in the chain, those before this start included.
    pub(crate) audit_records: u64,
    pub(crate) audit_writable: bool,
    /// Connections whose credential has an end.
    pub(crate) credential_expiry: Vec<(ConnectionName, SystemTime)>,
    /// How many links wait for a client.
    pub(crate) warm_spares: Vec<(ConnectionName, usize)>,
    pub(crate) last_reload_successful: bool,
}

/// What a peer or an operator asks of the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verb {
    Issue,
    Renew,
    Revoke,
    Describe,
    List,
    Watch,
    Resolve,
    WhoAmI,
    Open,
    Register,
    Reveal,
    Put,
    Delete,
    Validate,
    Suspend,
    Resume,
    Reload,
    Explain,
    Status,
}

impl Verb {
    const fn name(self) -> &'static str {
        match self {
            Self::Issue => "issue",
            Self::Renew => "renew",
            Self::Revoke => "revoke",
            Self::Describe => "describe",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Resolve => "resolve",
            Self::WhoAmI => "whoami",
            Self::Open => "open",
            Self::Register => "register",
            Self::Reveal => "reveal",
            Self::Put => "put",
            Self::Delete => "delete",
            Self::Validate => "validate",
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Reload => "reload",
            Self::Explain => "explain",
            Self::Status => "status",
        }
    }
}

/// A request that is being worked on. Counted as refused when it is dropped, unless it is
/// [`Timed::done`].
#[must_use]
#[derive(Debug)]
pub(crate) struct Timed {
    metrics: Metrics,
    verb: Verb,
    began: Instant,
    outcome: &'static str,
}

impl Timed {
    /// It was granted.
    pub(crate) fn done(mut self) {
        self.outcome = "ok";
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        self.metrics.request(self.verb, self.outcome, self.began.elapsed());
    }
}

/// The bytes of one session's connection. The default counts for nobody.
#[derive(Clone, Debug, Default)]
pub(crate) struct SessionBytes {
    from_client: Counter,
    from_server: Counter,
}

impl SessionBytes {
    pub(crate) fn client_sent(&self, bytes: usize) {
        self.from_client.inc_by(bytes as u64);
    }

    pub(crate) fn server_sent(&self, bytes: usize) {
        self.from_server.inc_by(bytes as u64);
    }
}

impl Metrics {
    /// Counters at zero, for these connections.
    pub(crate) fn new(connections: impl IntoIterator<Item = ConnectionName>) -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        let shared = Shared {
            registry: Mutex::default(),
            known: RwLock::default(),
            requests: Family::default(),
            request_duration: Family::new_with_constructor(histogram),
            connect_duration: Family::new_with_constructor(histogram),
            upstream_errors: Family::default(),
            session_bytes: Family::default(),
            denied: Family::default(),
            gauges: Gauges::default(),
        };
        *shared.registry.lock().unwrap_or_else(PoisonError::into_inner) = shared.register();
        let metrics = Self { shared: Arc::new(shared) };
        metrics.configured(connections);
        metrics
    }

    /// Which connections there are from now on. Those that went are forgotten.
    pub(crate) fn configured(&self, connections: impl IntoIterator<Item = ConnectionName>) {
        let mut known = self.shared.known.write().unwrap_or_else(PoisonError::into_inner);
        let now: BTreeSet<_> = connections.into_iter().collect();
        if !known.is_subset(&now) {
            // Families cannot be asked for their labels; a counter that starts again at zero is
            // what readers of counters are made for.
            self.shared.connect_duration.clear();
            self.shared.upstream_errors.clear();
            self.shared.session_bytes.clear();
        }
        *known = now;
    }

    /// Begins a request. Its end is counted, with the time that it took.
    pub(crate) fn begin(&self, verb: Verb) -> Timed {
        Timed { metrics: self.clone(), verb, began: Instant::now(), outcome: "refused" }
    }

    /// A request that came to its end: `ok` or `refused`.
    pub(crate) fn request(&self, verb: Verb, outcome: &'static str, took: Duration) {
        let verb = verb.name();
        self.shared.requests.get_or_create(&RequestLabels { verb, outcome }).inc();
        self.shared.request_duration.get_or_create(&VerbLabel { verb }).observe(took.as_secs_f64());
    }

    /// A refusal, by the reason that its audit record has.
    pub(crate) fn denied(&self, reason: &'static str) {
        self.shared.denied.get_or_create(&ReasonLabel { reason: reason.into() }).inc();
    }

    /// A denial by policy, by the same.
    pub(crate) fn denied_by_policy(&self, reason: DenyReason) {
        let reason = reason.to_string().into();
        self.shared.denied.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// An authenticated link to a connection's server, from the first packet on.
    pub(crate) fn upstream_connect(&self, connection: &ConnectionName, took: Duration) {
        if let Some(label) = self.label(connection) {
            self.shared.connect_duration.get_or_create(&label).observe(took.as_secs_f64());
        }
    }

    /// A link that could not be had.
    pub(crate) fn upstream_error(&self, connection: &ConnectionName, reason: &'static str) {
        if let Some(ConnectionLabel { connection }) = self.label(connection) {
            let labels = UpstreamErrorLabels { connection, reason };
            self.shared.upstream_errors.get_or_create(&labels).inc();
        }
    }

    /// Counts what sessions of a connection carry. To be kept for as long as the session.
    pub(crate) fn session_bytes(&self, connection: &ConnectionName) -> SessionBytes {
        let Some(ConnectionLabel { connection }) = self.label(connection) else {
            return SessionBytes::default();
        };
        let counter = |direction| {
            let labels = BytesLabels { connection: connection.clone(), direction };
            self.shared.session_bytes.get_or_create_owned(&labels)
        };
        SessionBytes { from_client: counter("from_client"), from_server: counter("from_server") }
    }

    /// The text of a scrape (OpenMetrics 1.0).
    ///
    /// # Errors
    /// Never, as far as writing to a string goes.
    pub(crate) fn text(&self, snapshot: &Snapshot) -> Result<String, fmt::Error> {
        let registry = self.shared.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.gauges.set(snapshot);
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }

    /// A label for a name of the configuration, and none for any other.
    fn label(&self, connection: &ConnectionName) -> Option<ConnectionLabel> {
        let known = self.shared.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(connection).map(|name| ConnectionLabel { connection: name.clone() })
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Shared {
    /// Names and help texts. The library adds `_total` to counters and `_info` to the last.
    fn register(&self) -> Registry {
        let mut all = Registry::with_prefix("credbroker");
        let gauges = &self.gauges;
        all.register("handles", "Live handles", gauges.handles.clone());
        all.register("sessions", "Sessions, those being opened included", gauges.sessions.clone());
        all.register("requests", "Requests by verb and outcome", self.requests.clone());
        all.register(
            "request_duration_seconds",
            "Time from a request to its answer",
            self.request_duration.clone(),
        );
        all.register(
            "upstream_connect_duration_seconds",
            "Time to dial a database and log in",
            self.connect_duration.clone(),
        );
        all.register(
            "upstream_errors",
            "Links to a database that could not be had",
            self.upstream_errors.clone(),
        );
        all.register(
            "session_bytes",
            "Bytes relayed, by the side they came from",
            self.session_bytes.clone(),
        );
        all.register("denied", "Refusals, by the reason in the audit log", self.denied.clone());
        all.register("arena_bytes", "Locked memory, by who has it", gauges.arena.clone());
        all.register("audit_records", "Audit records in the chain", gauges.audit_records.clone());
        all.register(
            "audit_writable",
            "Whether the audit log can be written; while it is 0 nothing is granted",
            gauges.audit_writable.clone(),
        );
        all.register(
            "credential_expiry_timestamp_seconds",
            "When a credential ends, where that is known",
            gauges.credential_expiry.clone(),
        );
        all.register("warm_spares", "Links that wait for a client", gauges.warm_spares.clone());
        all.register(
            "config_last_reload_successful",
            "Whether the last configuration that was read is in force",
            gauges.last_reload_successful.clone(),
        );
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        all.register("build", "What this is", Info::new(version));
        all
    }
}

impl Gauges {
    fn set(&self, snapshot: &Snapshot) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.handles.set(number(snapshot.handles));
        self.sessions.set(number(snapshot.sessions));
        let Usage { own, registered, free, .. } = snapshot.arena;
        for (state, bytes) in [("own", own), ("registered", registered), ("free", free)] {
            self.arena.get_or_create(&StateLabel { state }).set(number(bytes));
        }
        self.audit_records.inner().store(snapshot.audit_records, Ordering::Relaxed);
        self.audit_writable.set(snapshot.audit_writable.into());
        self.credential_expiry.clear();
        for (connection, end) in &snapshot.credential_expiry {
            let label = ConnectionLabel { connection: connection.clone() };
            let since = end.duration_since(UNIX_EPOCH).unwrap_or_default();
            self.credential_expiry.get_or_create(&label).set(since.as_secs_f64());
        }
        self.warm_spares.clear();
        for (connection, count) in &snapshot.warm_spares {
            let label = ConnectionLabel { connection: connection.clone() };
            self.warm_spares.get_or_create(&label).set(number(*count));
        }
        self.last_reload_successful.set(snapshot.last_reload_successful.into());
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerbLabel {
    verb: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabel {
    connection: ConnectionName,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamErrorLabels {
    connection: ConnectionName,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BytesLabels {
    connection: ConnectionName,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: Cow<'static, str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

impl EncodeLabelValue for ConnectionName {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        self.as_str().encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ConnectionName {
        ConnectionName::parse(text).unwrap()
    }

    fn snapshot() -> Snapshot {
        let arena =
            Usage { capacity: 1000, own: 128, registered: 64, free: 808, largest_free: 700 };
        Snapshot {
            handles: 3,
            sessions: 2,
            arena,
            audit_records: 17,
            audit_writable: true,
            credential_expiry: Vec::new(),
            warm_spares: Vec::new(),
            last_reload_successful: true,
        }
    }

    fn lines(metrics: &Metrics, snapshot: &Snapshot) -> Vec<String> {
        metrics.text(snapshot).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_names_are_those_of_the_contract() {
        let metrics = Metrics::new([name("main_db")]);
        metrics.begin(Verb::Issue).done();
        drop(metrics.begin(Verb::Issue));
        metrics.denied("no_grant");
        metrics.upstream_connect(&name("main_db"), Duration::from_millis(3));
        metrics.upstream_error(&name("main_db"), "upstream_untrusted");
        metrics.session_bytes(&name("main_db")).client_sent(5);
        let mut full = snapshot();
        full.warm_spares = vec![(name("main_db"), 2)];
        full.credential_expiry = vec![(name("main_db"), UNIX_EPOCH + Duration::from_secs(99))];
        let lines = lines(&metrics, &full);
        for line in [
            "credbroker_handles 3",
            "credbroker_sessions 2",
            "credbroker_requests_total{verb=\"issue\",outcome=\"ok\"} 1",
            "credbroker_requests_total{verb=\"issue\",outcome=\"refused\"} 1",
            "credbroker_request_duration_seconds_count{verb=\"issue\"} 2",
            "credbroker_upstream_connect_duration_seconds_bucket{le=\"0.005\",connection=\"main_db\"} 1",
            "credbroker_upstream_errors_total{connection=\"main_db\",reason=\"upstream_untrusted\"} 1",
            "credbroker_session_bytes_total{connection=\"main_db\",direction=\"from_client\"} 5",
            "credbroker_denied_total{reason=\"no_grant\"} 1",
            "credbroker_arena_bytes{state=\"own\"} 128",
            "credbroker_arena_bytes{state=\"registered\"} 64",
            "credbroker_arena_bytes{state=\"free\"} 808",
            "credbroker_audit_records_total 17",
            "credbroker_audit_writable 1",
            "credbroker_credential_expiry_timestamp_seconds{connection=\"main_db\"} 99.0",
            "credbroker_warm_spares{connection=\"main_db\"} 2",
            "credbroker_config_last_reload_successful 1",
            concat!("credbroker_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "# EOF",
        ] {
            assert!(lines.iter().any(|found| found == line), "{line} is not in {lines:#?}");
        }
    }

    #[test]
    fn a_name_that_is_not_configured_makes_no_series() {
        let metrics = Metrics::new([name("main_db")]);
        for number in 0..100 {
            let typed = name(&format!("typed_{number}"));
            metrics.upstream_error(&typed, "upstream_unreachable");
            metrics.upstream_connect(&typed, Duration::ZERO);
            metrics.session_bytes(&typed).server_sent(1);
        }
        assert!(!metrics.text(&snapshot()).unwrap().contains("typed"));
    }

    #[test]
    fn a_connection_that_went_with_a_reload_is_forgotten() {
        let metrics = Metrics::new([name("old"), name("main_db")]);
        let counting = metrics.session_bytes(&name("old"));
        counting.client_sent(1);
        assert!(metrics.text(&snapshot()).unwrap().contains("\"old\""));
        metrics.configured([name("main_db"), name("new")]);
        counting.client_sent(1);
        metrics.session_bytes(&name("new")).client_sent(4);
        let text = metrics.text(&snapshot()).unwrap();
        assert!(!text.contains("\"old\"") && text.contains("\"new\""), "{text}");
    }

    #[test]
    fn a_credential_that_has_no_end_any_more_has_no_series() {
        let metrics = Metrics::new([name("main_db")]);
        let mut ending = snapshot();
        ending.credential_expiry = vec![(name("main_db"), SystemTime::now())];
        let has = |snapshot| {
            let lines = lines(&metrics, snapshot);
            lines
                .iter()
                .any(|line| line.starts_with("credbroker_credential_expiry_timestamp_seconds{"))
        };
        assert!(has(&ending) && !has(&snapshot()));
    }
}
