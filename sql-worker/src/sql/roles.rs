//! What the role of a session is and holds, asked once when the session is opened.

use sqlx::postgres::PgConnection;

use super::failure;
use super::policy::{Policy, Role};
use crate::error::{Code, Failure};

/// Of the session's role itself and of every role that it is a member of: a member may SET
/// ROLE, whether it inherits or not. Every name is qualified, for the role may have put a
/// schema of its own before pg_catalog.
const HELD: &str = "
select r.rolname::pg_catalog.text, r.rolsuper, r.rolreplication, r.rolcreaterole
from pg_catalog.pg_roles r
where pg_catalog.pg_has_role(session_user, r.oid, 'MEMBER')
  and (r.rolsuper or r.rolreplication or r.rolcreaterole
       or r.rolname operator(pg_catalog.=) any ('{pg_execute_server_program,
          pg_read_server_files,pg_write_server_files}'::pg_catalog.name[]))";

/// Refuses a session whose role is or holds what `policy` does not name.
///
/// # Errors
/// `ACCESS_DENIED`, saying which and what to change.
pub(super) async fn check(connection: &mut PgConnection, policy: &Policy) -> Result<(), Failure> {
    let rows: Vec<(String, bool, bool, bool)> = sqlx::query_as(HELD)
        .persistent(false)
        .fetch_all(connection)
        .await
        .map_err(|error| failure::of_connect(&error))?;
    let mut held = Vec::new();
    for (name, superuser, replication, createrole) in rows {
        held.extend(Role::parse(&name));
        let attributes = [
            (superuser, Role::Superuser),
            (replication, Role::Replication),
            (createrole, Role::CreateRole),
        ];
        held.extend(attributes.into_iter().filter_map(|(has, role)| has.then_some(role)));
    }
    match policy.refuses(&held) {
        None => Ok(()),
        Some(role) => Err(refused(role)),
    }
}

fn refused(role: Role) -> Failure {
    let name = role.as_str();
    Failure::new(
        Code::AccessDenied,
        format!("the connection's database role is refused, because it is or holds {name}"),
    )
    .with_hint(format!(
        "an operator gives the connection a role without it, or names it in the worker's \
         configuration: allow_roles = [\"{name}\"]"
    ))
}
