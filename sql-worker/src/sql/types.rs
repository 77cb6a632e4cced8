//! The types of a described statement: how a column is decoded, what a parameter is cast to.

use sqlx::TypeInfo as _;
use sqlx::postgres::{PgTypeInfo, PgTypeKind};

use super::value::{Codec, Scalar, builtin};

/// Object identifiers below this are PostgreSQL's own, and so have names without surprises.
const FIRST_NORMAL_OID: u32 = 16_384;

/// The name that results show for a type, and its codec; no codec when it has none.
pub(super) fn column(info: &PgTypeInfo) -> (String, Option<Codec>) {
    if let Some((name, scalar)) = scalar(info) {
        return (name, Some(Codec::Scalar(scalar)));
    }
    match kind(info) {
        Some(PgTypeKind::Array(_)) if is_vector(info) => (name(info), None),
        Some(PgTypeKind::Array(element)) => match scalar(element) {
            Some((name, scalar)) => (format!("{name}[]"), Some(Codec::Array(scalar))),
            None => (format!("{}[]", name(element)), None),
        },
        Some(PgTypeKind::Domain(base)) => (name(info), column(base).1),
        Some(
            PgTypeKind::Simple
            | PgTypeKind::Pseudo
            | PgTypeKind::Composite(_)
            | PgTypeKind::Enum(_)
            | PgTypeKind::Range(_),
        )
        | None => (name(info), None),
    }
}

/// What a parameter is cast to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ParamType {
    /// For messages, and to see whether it is JSON or an array.
    pub(super) shown: String,
    /// For `CAST(… AS …)`: qualified, so that no `search_path` can change its meaning.
    pub(super) sql: String,
}

/// The cast of a built-in type; others must be asked for by identifier.
pub(super) fn parameter(info: &PgTypeInfo) -> Result<ParamType, u32> {
    let oid = info.oid().map_or(0, |oid| oid.0);
    let of = |oid, suffix: &str| {
        builtin(oid).map(|(name, _)| ParamType {
            shown: format!("{name}{suffix}"),
            sql: format!("pg_catalog.\"{name}\"{suffix}"),
        })
    };
    let found = match kind(info) {
        Some(PgTypeKind::Array(_)) if is_vector(info) => None,
        Some(PgTypeKind::Array(element)) => element.oid().and_then(|element| of(element.0, "[]")),
        Some(
            PgTypeKind::Simple
            | PgTypeKind::Pseudo
            | PgTypeKind::Domain(_)
            | PgTypeKind::Composite(_)
            | PgTypeKind::Enum(_)
            | PgTypeKind::Range(_),
        )
        | None => of(oid, ""),
    };
    found.ok_or(oid)
}

/// The built-in type below a domain, whose values are written as that type's.
pub(super) fn base(info: &PgTypeInfo) -> Option<String> {
    match kind(info)? {
        PgTypeKind::Domain(inner) => {
            parameter(inner).ok().map(|known| known.shown).or_else(|| base(inner))
        }
        PgTypeKind::Array(element) => base(element).map(|name| format!("{name}[]")),
        PgTypeKind::Simple
        | PgTypeKind::Pseudo
        | PgTypeKind::Composite(_)
        | PgTypeKind::Enum(_)
        | PgTypeKind::Range(_) => None,
    }
}

fn scalar(info: &PgTypeInfo) -> Option<(String, Scalar)> {
    if let Some((name, scalar)) = info.oid().and_then(|oid| builtin(oid.0)) {
        return Some((name.to_owned(), scalar));
    }
    match kind(info)? {
        // Labels are sent as text.
        PgTypeKind::Enum(_) => Some((name(info), Scalar::Text)),
        PgTypeKind::Domain(base) => scalar(base).map(|(_, scalar)| (name(info), scalar)),
        PgTypeKind::Simple
        | PgTypeKind::Pseudo
        | PgTypeKind::Composite(_)
        | PgTypeKind::Array(_)
        | PgTypeKind::Range(_) => None,
    }
}

/// int2vector and oidvector have elements, and a text that is no array's.
fn is_vector(info: &PgTypeInfo) -> bool {
    info.oid().is_some_and(|oid| matches!(oid.0, 22 | 30))
}

/// `None` for a type of which only the identifier is known: sqlx panics for its kind.
fn kind(info: &PgTypeInfo) -> Option<&PgTypeKind> {
    (info.name() != "?").then(|| info.kind())
}

fn name(info: &PgTypeInfo) -> String {
    let name = info.name();
    match info.oid() {
        Some(oid) if oid.0 < FIRST_NORMAL_OID => name.to_lowercase(),
        Some(_) | None => name.to_owned(),
    }
}
