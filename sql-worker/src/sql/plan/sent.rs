//! A statement's parameters as they are sent: every one as text, which the statement casts to the
//! type that the database inferred for it.

use sqlx::Arguments as _;
use sqlx::postgres::{PgArguments, PgConnection, PgStatement, PgTypeInfo};

use super::TEXT;
use crate::error::Failure;
use crate::sql::described::prepare;
use crate::sql::params::{Bound, to_text};
use crate::sql::postgres::Trouble;
use crate::sql::types::{ParamType, Type};

/// The values of a statement's parameters, and what each is cast to.
#[derive(Debug)]
pub(super) struct Sent {
    casts: Vec<ParamType>,
    values: Vec<Option<String>>,
}

impl Sent {
    /// Those of `bound`, by the types that the database `inferred` for it.
    pub(super) async fn of(
        connection: &mut PgConnection,
        inferred: &[Type],
        bound: &Bound<'_>,
    ) -> Result<Self, Trouble> {
        if inferred.len() != bound.values().len() {
            return Err(Failure::invalid("params do not match the statement's parameters").into());
        }
        let mut sent = Self { casts: Vec::new(), values: Vec::new() };
        for (at, (inferred, value)) in inferred.iter().zip(bound.values()).enumerate() {
            let cast = match inferred.parameter() {
                Some(cast) => cast,
                None => by_name(connection, inferred).await?,
            };
            sent.values.push(to_text(value, &cast.shown, at + 1)?);
            sent.casts.push(cast);
        }
        Ok(sent)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.casts.is_empty()
    }

    /// Each as text; a text that the server writes of one may be found by it.
    pub(super) fn values(&self) -> &[Option<String>] {
        &self.values
    }

    /// How a statement has the parameter `at`, counted from zero, in it.
    pub(super) fn cast(&self, at: usize) -> String {
        match self.casts.get(at) {
            Some(cast) => format!("(CAST(${}::{TEXT} AS {}))", at + 1, cast.sql),
            None => super::numbered(at),
        }
    }

    /// Has the server describe `sql`, which has the parameters in it.
    pub(super) async fn describe(
        &self,
        connection: &mut PgConnection,
        sql: String,
    ) -> Result<PgStatement, Trouble> {
        let text = <str as sqlx::Type<sqlx::Postgres>>::type_info();
        let types: Vec<PgTypeInfo> = vec![text; self.casts.len()];
        prepare(connection, sql, &types).await.map_err(|error| Trouble::new(&error, &self.values))
    }

    pub(super) fn arguments(&self) -> Result<PgArguments, Failure> {
        let mut arguments = PgArguments::default();
        for value in &self.values {
            arguments
                .add(value.as_deref())
                .map_err(|_too_long| Failure::invalid("a parameter is too long"))?;
        }
        Ok(arguments)
    }
}

/// The cast to a type that is not built in.
async fn by_name(connection: &mut PgConnection, inferred: &Type) -> Result<ParamType, Trouble> {
    // -1, not NULL: without a modifier "character" would mean one character.
    let name: String = sqlx::query_scalar(
        "select pg_catalog.format_type($1::pg_catalog.text::pg_catalog.oid, -1)",
    )
    .bind(inferred.oid().to_string())
    .fetch_one(connection)
    .await?;
    Ok(ParamType { shown: inferred.base().unwrap_or_else(|| name.clone()), sql: name })
}
