//! A statement as the server describes it, before anything of it runs.

use sqlx::postgres::{PgColumn, PgConnection, PgStatement, PgTypeInfo};
use sqlx::{AssertSqlSafe, Column as _, Either, Executor as _, SqlSafeStr as _, Statement as _};

use super::pool::Session;
use super::postgres::Trouble;
use super::relay::{Description, Field};
use super::types::{Known, Type};

/// What a statement takes and gives.
#[derive(Debug)]
pub(super) struct Described {
    /// In order.
    pub(super) parameters: Vec<Type>,
    /// In order; none for a statement without a result set.
    pub(super) columns: Vec<DescribedColumn>,
    /// What sqlx can run; not where it does not know the kind of a type in there.
    pub(super) statement: Option<PgStatement>,
}

/// A column of a result set.
#[derive(Debug)]
pub(super) struct DescribedColumn {
    /// Its name; others may have the same.
    pub(super) name: String,
    /// Where it comes from.
    pub(super) origin: Origin,
    /// Its type.
    pub(super) column_type: Type,
}

/// The table that a column comes from and its number in there; `None` for what an expression gives.
pub(super) type Origin = Option<(u32, i16)>;

impl Described {
    /// Asks the server.
    ///
    /// sqlx resolves every type of a statement, and refuses it as a whole where one has a kind or a
    /// category that came after PostgreSQL 13: multiranges, and what the server has for itself
    /// (`pg_node_tree`). The server's answer was overheard then, and its types are looked up here.
    pub(super) async fn ask(session: &mut Session, sql: String) -> Result<Self, Trouble> {
        let Session { connection, overheard } = session;
        let error = match prepare(connection, sql, &[]).await {
            Ok(statement) => return Ok(Self::from(statement)),
            Err(error) => error,
        };
        match (&error, overheard.take_description()) {
            (sqlx::Error::ColumnDecode { .. }, Some(description)) => {
                Ok(Self::look_up(connection, description).await?)
            }
            _ => Err(error.into()),
        }
    }

    /// Where its columns come from.
    pub(super) fn origins(&self) -> Vec<Origin> {
        self.columns.iter().map(|column| column.origin).collect()
    }

    async fn look_up(
        connection: &mut PgConnection,
        description: Description,
    ) -> Result<Self, sqlx::Error> {
        let Description { parameters, columns } = description;
        let of_columns = columns.iter().map(|column| column.type_oid);
        let oids: Vec<u32> = of_columns.chain(parameters.iter().copied()).collect();
        let known = Known::ask(connection, &oids).await?;
        let columns = columns.into_iter().map(|Field { name, origin, type_oid }| DescribedColumn {
            name,
            origin,
            column_type: known.get(type_oid),
        });
        Ok(Self {
            parameters: parameters.into_iter().map(|oid| known.get(oid)).collect(),
            columns: columns.collect(),
            statement: None,
        })
    }
}

impl From<PgStatement> for Described {
    fn from(statement: PgStatement) -> Self {
        let parameters = match statement.parameters() {
            Some(Either::Left(parameters)) => parameters,
            Some(Either::Right(_)) | None => &[],
        };
        let columns = statement.columns().iter().map(|column| DescribedColumn {
            name: column.name().to_owned(),
            origin: origin(column),
            column_type: column.type_info().into(),
        });
        Self {
            parameters: parameters.iter().map(Type::from).collect(),
            columns: columns.collect(),
            statement: Some(statement),
        }
    }
}

/// [`Described::origins`] of what sqlx can run.
pub(super) fn origins(statement: &PgStatement) -> Vec<Origin> {
    statement.columns().iter().map(origin).collect()
}

fn origin(column: &PgColumn) -> Origin {
    column.relation_id().map(|oid| oid.0).zip(column.relation_attribute_no())
}

/// A statement that is ready to be run, with parameters of `types`.
pub(super) async fn prepare(
    connection: &mut PgConnection,
    sql: String,
    types: &[PgTypeInfo],
) -> Result<PgStatement, sqlx::Error> {
    // The text is the caller's statement with parameters numbered; no value is in it.
    let sql = AssertSqlSafe(sql).into_sql_str();
    connection.prepare_with(sql, types).await
}
