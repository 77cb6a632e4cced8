//! One statement, from description to last row.
//!
//! Order matters: the statement is described first, so that parameters get the types that the
//! database infers and a column that cannot be decoded is found while nothing has run yet.
//! Such columns are fetched as text by wrapping the statement, and the wrapped statement is
//! described as well; a statement is executed once, and only when every column has a codec.
//! All of it happens inside of the transaction that its mode asks for.

use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use sqlx::postgres::PgConnection;
use sqlx::{Either, Executor as _, Statement as _};
use tokio::time::timeout;

use super::limits::{Collector, Room};
use super::plan::Plan;
use super::policy::Policy;
use super::pool::Session;
use super::sink::{Kept, Sink, Summary};
use super::statement::{Mode, Statement, not_a_query};
use super::transaction::{Left, Scope};
use super::{Answer, Format, Guard, Lease, Limits, ResultSet, failure, guard};
use crate::error::{Code, Failure};

/// Runs `statement` and takes the lease with it: back to the pool after a clean end, else
/// closed, so that the database stops what it does. Dropping the future is how to cancel it.
///
/// # Errors
/// `SQL_ERROR` from the database, `READ_ONLY`, `ACCESS_DENIED` for what the connection does
/// not offer, `TIMEOUT`, `CANCELLED` when the handle ended, `UPSTREAM_UNREACHABLE` when the
/// session was lost, `UNSUPPORTED` for results that cannot be shown.
pub async fn execute(
    lease: Lease,
    statement: &Statement<'_>,
    format: Format,
    limits: &Limits,
) -> Result<Answer, Failure> {
    let mut kept = Kept::new(format);
    let done = execute_into(lease, statement, format, limits, &mut kept).await?;
    let Summary { row_count, affected_rows, cut, elapsed } = done;
    let Kept { columns, body } = kept;
    if columns.is_empty() {
        return Ok(Answer::Done { affected_rows: affected_rows.unwrap_or(0), elapsed });
    }
    Ok(Answer::Rows(ResultSet { columns, body, row_count, affected_rows, cut, elapsed }))
}

/// As [`execute`], but rows go to `sink` in batches while they come. The limits are the same,
/// and so is the time: what `sink` takes counts.
///
/// # Errors
/// Those of [`execute`], and those of `sink`.
pub async fn execute_into(
    lease: Lease,
    statement: &Statement<'_>,
    format: Format,
    limits: &Limits,
    sink: &mut impl Sink,
) -> Result<Summary, Failure> {
    let closed = lease.closed();
    let work = timeout(limits.statement_timeout, run(lease, statement, format, limits, sink));
    tokio::select! {
        biased;
        () = closed.cancelled() => Err(Failure::cancelled()),
        done = work => done.unwrap_or_else(|_elapsed| Err(timed_out(limits.statement_timeout))),
    }
}

fn timed_out(after: Duration) -> Failure {
    let seconds = after.as_secs_f64();
    Failure::new(Code::Timeout, format!("the statement was stopped after {seconds} s"))
        .with_hint("ask for less, or add an index; nothing that it changed was kept")
}

/// What is left to do with a session after a statement.
enum After {
    /// It is in step, and can be reset.
    Reset,
    /// Rows are still on their way.
    Close,
}

async fn run(
    mut lease: Lease,
    statement: &Statement<'_>,
    format: Format,
    limits: &Limits,
    sink: &mut impl Sink,
) -> Result<Summary, Failure> {
    let policy = lease.policy();
    let mode = statement.mode(policy.access);
    if mode == Mode::Alone && !policy.guard.is_open() {
        let what =
            "what runs outside of a transaction cannot be looked at, and is not offered here";
        return Err(Failure::new(Code::AccessDenied, what));
    }
    if mode == Mode::Write && statement.is_grant() && !policy.guard.is_open() {
        let what = "GRANT and REVOKE do not tell which tables they use, and are not offered here";
        return Err(Failure::new(Code::AccessDenied, what));
    }
    let mut scope = Scope::open(&mut lease, mode).await?;
    let call = Call { statement, mode, format, limits, policy: &policy };
    let outcome = call.run(scope.session(), sink).await;
    match outcome {
        Ok((summary, After::Close)) => Ok(summary),
        Ok((summary, After::Reset)) => match scope.finish().await {
            Ok(left) => {
                lease.give_back(left);
                Ok(summary)
            }
            Err(error) => {
                let Trouble { failure, after } = Trouble::new(&error, &[]);
                if let After::Reset = after {
                    // A COMMIT that fails has ended its transaction.
                    lease.give_back(Left::Nothing);
                }
                Err(failure)
            }
        },
        Err(Trouble { failure, after: After::Close }) => Err(lease.loss(failure)),
        Err(Trouble { failure, after: After::Reset }) => {
            let left = scope.abandon();
            lease.give_back(left);
            Err(failure)
        }
    }
}

/// A failure, and what it means for the session.
pub(super) struct Trouble {
    failure: Failure,
    after: After,
}

impl Trouble {
    pub(super) fn new(error: &sqlx::Error, values: &[Option<String>]) -> Self {
        let after = if failure::is_in_step(error) { After::Reset } else { After::Close };
        Self { failure: failure::of_statement(error, values), after }
    }

    /// What the server says of a plan that it makes: it may have run a function for it.
    pub(super) fn of_planning(error: &sqlx::Error, guard: &Guard) -> Self {
        let trouble = Self::new(error, &[]);
        match guard.withholds_errors(Mode::Read) {
            true => Self { failure: trouble.failure.without_quotes(), ..trouble },
            false => trouble,
        }
    }

    /// Whether the session can be given back.
    pub(super) fn is_in_step(&self) -> bool {
        match self.after {
            After::Reset => true,
            After::Close => false,
        }
    }

    /// The session is in the middle of something.
    fn close(failure: Failure) -> Self {
        Self { failure, after: After::Close }
    }
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Self {
        Self::new(&error, &[])
    }
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        trouble.failure
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self { failure, after: After::Reset }
    }
}

impl From<guard::Error> for Trouble {
    fn from(error: guard::Error) -> Self {
        match error {
            guard::Error::Refused(failure) => failure.into(),
            guard::Error::Server(error) => Self::new(&error, &[]),
        }
    }
}

/// A statement, and how it is run.
struct Call<'a> {
    statement: &'a Statement<'a>,
    mode: Mode,
    format: Format,
    limits: &'a Limits,
    policy: &'a Policy,
}

impl Call<'_> {
    async fn run(
        &self,
        session: &mut Session,
        sink: &mut impl Sink,
    ) -> Result<(Summary, After), Trouble> {
        let started = Instant::now();
        let guard = &self.policy.guard;
        let plan = Plan::make(session, self.statement, self.mode, guard, self.limits).await?;
        let connection = &mut session.connection;
        if self.mode == Mode::Read && !self.statement.is_query() {
            // The server has understood it, and run nothing.
            return Err(not_a_query().into());
        }
        let streaming = session.overheard.streaming();
        let fetched = self.fetch(connection, &plan, sink).await;
        drop(streaming);
        let Fetched { mut collector, affected_rows, after } =
            fetched.map_err(|trouble| match guard.withholds_errors(self.mode) {
                true => Trouble { failure: trouble.failure.without_quotes(), ..trouble },
                false => trouble,
            })?;
        if let Some(seen) = &plan.inspected {
            if let After::Close = after {
                let what = "the result is too long to be looked at as a whole";
                return Err(Trouble::close(Failure::new(Code::AccessDenied, what)));
            }
            if self.mode == Mode::Write {
                // What is left for the end of the transaction would not be looked at.
                let now = "set constraints all immediate";
                sqlx::raw_sql(now).execute(&mut *connection).await?;
            }
            guard.confirm(connection, seen).await?;
            sink.columns(&plan.columns).await.map_err(Trouble::close)?;
        }
        if let Some(batch) = collector.take() {
            sink.batch(batch).await.map_err(Trouble::close)?;
        }
        let (row_count, cut) = collector.finish();
        let writes = self.mode != Mode::Read
            && self.statement.bound.may_write()
            && !self.statement.is_report();
        let changes = plan.columns.is_empty() || writes;
        let affected_rows = changes.then_some(affected_rows);
        Ok((Summary { row_count, affected_rows, cut, elapsed: started.elapsed() }, after))
    }

    async fn fetch(
        &self,
        connection: &mut PgConnection,
        plan: &Plan,
        sink: &mut impl Sink,
    ) -> Result<Fetched<'_>, Trouble> {
        // What has yet to be confirmed is not shown.
        let held = plan.inspected.is_some();
        if !held {
            sink.columns(&plan.columns).await.map_err(Trouble::close)?;
        }
        let mut rows = connection.fetch_many(plan.statement.query_with(plan.arguments()?));
        let mut collector = Collector::new(self.limits, self.format, &plan.columns);
        let mut affected_rows = 0;
        let mut after = After::Reset;
        let mut room = Room::Left;
        while let Some(item) =
            rows.try_next().await.map_err(|error| Trouble::new(&error, plan.values()))?
        {
            match item {
                Either::Left(done) => affected_rows += done.rows_affected(),
                Either::Right(_) if room == Room::None => {}
                Either::Right(row) => {
                    room = collector
                        .push(|collector| plan.decode(&row, collector))
                        .map_err(|_malformed| not_text())?;
                    if !held && let Some(batch) = collector.take_full() {
                        sink.batch(batch).await.map_err(Trouble::close)?;
                    }
                    // A statement that writes must come to its end to be committed, and one
                    // that is looked at again to be so; their rows are read and left out. A
                    // query is stopped by closing its session.
                    if room == Room::None && !held && !self.statement.bound.may_write() {
                        after = After::Close;
                        break;
                    }
                }
            }
        }
        Ok(Fetched { collector, affected_rows, after })
    }
}

/// What came of a statement, as far as no sink has it yet.
struct Fetched<'a> {
    collector: Collector<'a>,
    affected_rows: u64,
    after: After,
}

fn not_text() -> Trouble {
    let failure = Failure::new(Code::SqlError, "a value is not valid text in UTF-8")
        .with_hint("cast the column to bytea");
    Trouble { failure, after: After::Close }
}
