//! A statement with its parameters, and in what it may run.
//!
//! The words of a statement never decide whether it is harmless; the transaction does. They
//! only keep out what a reader has no use for, and find what cannot run in a block.

use super::params::Bound;
use super::policy::Access;
use super::{Params, Script};
use crate::error::{Code, Failure};

/// A statement whose parameters are all there.
#[derive(Debug)]
pub struct Statement<'a> {
    pub(super) bound: Bound<'a>,
    access: Access,
}

/// Bytes of a statement. The server takes more, at a price in memory there that nothing bounds.
const MAX_SQL: usize = 256 << 10;

/// Refuses a text that is no statement: too long, or with a NUL, which ends it in the server's
/// eyes, so that what follows would be read as the rest of the message.
pub(super) fn check_text(sql: &str) -> Result<(), Failure> {
    if sql.len() > MAX_SQL {
        let failure = Failure::invalid("the statement is longer than 256 KiB; nothing was run");
        return Err(failure.with_hint("pass values in params, or do it in several calls"));
    }
    if sql.contains('\0') {
        return Err(Failure::invalid("the statement has a NUL character; nothing was run"));
    }
    Ok(())
}

/// In what a statement runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// A read-only transaction, rolled back.
    Read,
    /// A transaction, committed.
    Write,
    /// No block: the server makes it a transaction of its own, or several.
    Alone,
}

/// With what a statement that only asks begins.
const QUERIES: [&str; 6] = ["select", "with", "values", "table", "show", "explain"];
/// What begins, ends or divides a transaction; `prepare` only as `PREPARE TRANSACTION`.
const TRANSACTION_CONTROL: [&str; 8] =
    ["begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release"];
/// What may commit by itself, or refuses to run in a block.
const ALONE: [&str; 5] = ["vacuum", "cluster", "reindex", "call", "do"];
/// What begins statements of which some refuse to run in a block, …
const ALONE_PERHAPS: [&str; 3] = ["create", "drop", "alter"];
/// … and the words by which those are known.
const ALONE_MARKS: [&str; 5] = ["database", "tablespace", "system", "subscription", "concurrently"];

impl<'a> Statement<'a> {
    /// Matches `sql` with its parameters; pure.
    ///
    /// # Errors
    /// `INVALID_REQUEST` when it is longer than 256 KiB or has a NUL, when a parameter is missing
    /// or left over, and for BEGIN, COMMIT and their like; `UNSUPPORTED` for COPY between client and
    /// server.
    pub fn parse(sql: &'a str, params: &Params) -> Result<Self, Failure> {
        check_text(sql)?;
        let bound = Script::parse(sql).bind(params)?;
        if bound.is_client_copy() {
            return Err(Failure::new(Code::Unsupported, "COPY between client and server")
                .with_hint("use SELECT or INSERT"));
        }
        if bound.begins_with(&TRANSACTION_CONTROL)
            || (bound.begins_with(&["prepare"]) && bound.has_second_word("transaction"))
        {
            return Err(Failure::invalid("every call is a transaction of its own")
                .with_hint("leave BEGIN, COMMIT and the like out"));
        }
        Ok(Self { bound, access: Access::ReadWrite })
    }

    /// The same statement with at most `access`.
    #[must_use]
    pub fn with_access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// In what it runs on a connection that has `policy`.
    pub(super) fn mode(&self, policy: Access) -> Mode {
        match (self.access, policy) {
            (Access::ReadOnly, _) | (_, Access::ReadOnly) => Mode::Read,
            (Access::ReadWrite, Access::ReadWrite) => {
                let alone = self.bound.begins_with(&ALONE)
                    || (self.bound.begins_with(&ALONE_PERHAPS)
                        && self.bound.has_word(&ALONE_MARKS));
                if alone { Mode::Alone } else { Mode::Write }
            }
        }
    }

    /// Whether it tells of another statement, and holds no value of any table.
    pub(super) fn is_explain(&self) -> bool {
        self.bound.begins_with(&["explain"])
    }

    /// Whether it can stand in no other statement.
    pub(super) fn is_report(&self) -> bool {
        self.bound.begins_with(&["explain", "show"])
    }

    /// Whether it calls a procedure, whose result stands in no other statement.
    pub(super) fn is_call(&self) -> bool {
        self.bound.begins_with(&["call"])
    }

    /// Whether it changes rows, so that it can stand in WITH only.
    pub(super) fn is_change(&self) -> bool {
        self.bound.begins_with(&["insert", "update", "delete", "merge"])
    }

    /// Whether it begins with WITH queries of which one may change rows, so that it can stand in no
    /// other statement; its main query can, as one of them.
    pub(super) fn is_list_of_changes(&self) -> bool {
        self.bound.begins_with(&["with"]) && self.bound.may_write()
    }

    /// Whether it changes who may use a table, for which the server locks none.
    pub(super) fn is_grant(&self) -> bool {
        self.bound.begins_with(&["grant", "revoke"])
    }

    /// Whether it begins as a statement does that only asks. An empty one does.
    pub(super) fn is_query(&self) -> bool {
        self.bound.begins_with(&QUERIES) || self.bound.is_empty()
    }
}

/// The answer to a statement that the server understands but a reader may not run.
pub(super) fn not_a_query() -> Failure {
    Failure::new(Code::ReadOnly, "the call is read-only; nothing was run").with_hint(
        "a read-only call takes SELECT, WITH, VALUES, TABLE, SHOW and EXPLAIN; writing takes \
         access = \"read-write\" for this connection in the worker's configuration",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(sql: &str) -> Statement<'_> {
        Statement::parse(sql, &Params::None).unwrap()
    }

    #[test]
    fn a_query_is_known_by_its_first_word() {
        for sql in [
            "select 1",
            "/* a /* b */ c */ -- d\n ; ( (SELECT 1))",
            "WITH x AS (select 1) table x",
            "values (1)",
            "Table t",
            "explain analyze select 1",
            "show work_mem",
            "-- nothing",
        ] {
            assert!(parse(sql).is_query(), "{sql}");
        }
        for sql in [
            "-- select\ninsert into t values (1)",
            "/* select */ do $$ $$",
            "set work_mem = 1",
            "\"select\" 1",
            "selec 1",
            "copy t to program 'x'",
            "fetch all from c",
            "+ select 1",
        ] {
            assert!(!parse(sql).is_query(), "{sql}");
        }
    }

    #[test]
    fn a_statement_has_a_longest() {
        let text = |length: usize| format!("select '{}'", "x".repeat(length - 9));
        assert!(Statement::parse(&text(MAX_SQL), &Params::None).is_ok());
        let failure = Statement::parse(&text(MAX_SQL + 1), &Params::None).unwrap_err();
        assert_eq!(failure.code(), Code::InvalidRequest);
        assert!(failure.to_string().contains("longer than 256 KiB"), "{failure}");
    }

    #[test]
    fn a_nul_is_in_no_statement() {
        for sql in ["\0", "select 1\0", "select 1\0\0\x01\0", "select '\0'", "-- \0\nselect 1"] {
            let failure = Statement::parse(sql, &Params::None).unwrap_err();
            assert_eq!(failure.code(), Code::InvalidRequest, "{sql:?}");
        }
    }

    #[test]
    fn transactions_are_not_the_callers() {
        for sql in [
            "begin",
            "START TRANSACTION",
            "; commit",
            "/**/ end",
            "rollback and chain",
            "abort",
            "savepoint a",
            "release a",
            "prepare transaction 'x'",
            "prepare /* */ transaction 'x'",
            "commit prepared 'x'",
        ] {
            let failure = Statement::parse(sql, &Params::None).unwrap_err();
            assert_eq!(failure.code(), Code::InvalidRequest, "{sql}");
        }
        assert!(Statement::parse("prepare p as select 1", &Params::None).is_ok());
        assert!(Statement::parse("select 'commit'", &Params::None).is_ok());
    }

    #[test]
    fn what_runs_in_no_block_runs_alone() {
        let cases = [
            ("vacuum t", Mode::Alone),
            ("create index concurrently i on t (a)", Mode::Alone),
            ("create index i on t (a)", Mode::Write),
            ("create database d", Mode::Alone),
            ("alter system set x = 1", Mode::Alone),
            ("call p()", Mode::Alone),
            ("insert into system values (1)", Mode::Write),
            ("select 1", Mode::Write),
        ];
        for (sql, mode) in cases {
            assert_eq!(parse(sql).mode(Access::ReadWrite), mode, "{sql}");
            assert_eq!(parse(sql).mode(Access::ReadOnly), Mode::Read, "{sql}");
            let narrowed = parse(sql).with_access(Access::ReadOnly);
            assert_eq!(narrowed.mode(Access::ReadWrite), Mode::Read, "{sql}");
        }
    }
}
