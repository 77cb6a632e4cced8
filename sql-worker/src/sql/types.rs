//! The types of a described statement: how a column is decoded, what a parameter is cast to.

use std::collections::BTreeMap;

use sqlx::TypeInfo as _;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{PgConnection, PgTypeInfo, PgTypeKind};

use super::value::{Codec, Scalar, builtin};

/// Object identifiers below this are PostgreSQL's own, and so have names without surprises.
const FIRST_NORMAL_OID: u32 = 16_384;

/// Domains over arrays over domains …: deeper than this is not looked.
const DEEPEST: usize = 16;

/// A type, as far as it matters for how its values are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Type {
    oid: u32,
    name: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Array(Box<Type>),
    Domain(Box<Type>),
    /// Its labels are sent as text.
    Enum,
    /// It is what it is: a base type, range, multirange, composite or pseudo-type.
    Other,
}

/// What a parameter is cast to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ParamType {
    /// For messages, and to see whether it is JSON or an array.
    pub(super) shown: String,
    /// For `CAST(… AS …)`: qualified, so that no `search_path` can change its meaning.
    pub(super) sql: String,
}

impl Type {
    pub(super) fn oid(&self) -> u32 {
        self.oid
    }

    /// The name that results show for a column of it, and its codec; no codec when it has none.
    pub(super) fn column(&self) -> (String, Option<Codec>) {
        if let Some((name, scalar)) = self.scalar() {
            return (name.to_owned(), Some(Codec::Scalar(scalar)));
        }
        match &self.kind {
            Kind::Array(element) => match element.scalar() {
                Some((name, scalar)) => (format!("{name}[]"), Some(Codec::Array(scalar))),
                None => (format!("{}[]", element.name), None),
            },
            Kind::Domain(base) => (self.name.clone(), base.column().1),
            Kind::Enum | Kind::Other => (self.name.clone(), None),
        }
    }

    /// The cast of a parameter of a built-in type; others must be asked for by identifier.
    pub(super) fn parameter(&self) -> Option<ParamType> {
        let (oid, suffix) = match &self.kind {
            Kind::Array(element) => (element.oid, "[]"),
            Kind::Domain(_) | Kind::Enum | Kind::Other => (self.oid, ""),
        };
        builtin(oid).map(|(name, _)| ParamType {
            shown: format!("{name}{suffix}"),
            sql: format!("pg_catalog.\"{name}\"{suffix}"),
        })
    }

    /// The built-in type below a domain, whose values are written as that type's.
    pub(super) fn base(&self) -> Option<String> {
        match &self.kind {
            Kind::Domain(base) => base.parameter().map(|known| known.shown).or_else(|| base.base()),
            Kind::Array(element) => element.base().map(|name| format!("{name}[]")),
            Kind::Enum | Kind::Other => None,
        }
    }

    fn scalar(&self) -> Option<(&str, Scalar)> {
        match &self.kind {
            Kind::Enum => Some((&self.name, Scalar::Text)),
            Kind::Domain(base) => base.scalar().map(|(_, scalar)| (self.name.as_str(), scalar)),
            Kind::Array(_) | Kind::Other => builtin(self.oid),
        }
    }
}

impl From<&PgTypeInfo> for Type {
    fn from(info: &PgTypeInfo) -> Self {
        let oid = info.oid().map_or(0, |oid| oid.0);
        let name = match oid < FIRST_NORMAL_OID {
            true => info.name().to_lowercase(),
            false => info.name().to_owned(),
        };
        // sqlx has no kind for a type of which only the identifier is known.
        let kind = match (info.name() != "?").then(|| info.kind()) {
            Some(PgTypeKind::Array(element)) if !is_vector(oid) => {
                Kind::Array(Box::new(element.into()))
            }
            Some(PgTypeKind::Domain(base)) => Kind::Domain(Box::new(base.into())),
            Some(PgTypeKind::Enum(_)) => Kind::Enum,
            Some(
                PgTypeKind::Array(_)
                | PgTypeKind::Simple
                | PgTypeKind::Pseudo
                | PgTypeKind::Composite(_)
                | PgTypeKind::Range(_),
            )
            | None => Kind::Other,
        };
        Self { oid, name, kind }
    }
}

/// int2vector and oidvector have elements, and a text that is no array's.
fn is_vector(oid: u32) -> bool {
    matches!(oid, 22 | 30)
}

/// The types of which sqlx may not know the kind, with those that they are made of. Every name is
/// qualified, for `search_path` is the role's.
const TYPES: &str = "
with recursive used(oid) as (
  select pg_catalog.unnest($1::pg_catalog.oid[])
  union
  select case when t.typtype operator(pg_catalog.=) 'd' then t.typbasetype else t.typelem end
  from used u join pg_catalog.pg_type t on t.oid operator(pg_catalog.=) u.oid
  where t.typtype operator(pg_catalog.=) 'd' or t.typcategory operator(pg_catalog.=) 'A'
)
select t.oid, t.oid::pg_catalog.regtype::pg_catalog.text, t.typtype::pg_catalog.text,
  t.typcategory::pg_catalog.text, t.typbasetype, t.typelem
from used u join pg_catalog.pg_type t on t.oid operator(pg_catalog.=) u.oid";

type Row = (Oid, String, String, String, Oid, Oid);

/// What the server's catalogue says of types.
pub(super) struct Known(BTreeMap<u32, Row>);

impl Known {
    /// Asks for `oids`.
    pub(super) async fn ask(
        connection: &mut PgConnection,
        oids: &[u32],
    ) -> Result<Self, sqlx::Error> {
        let oids: Vec<Oid> = oids.iter().copied().map(Oid).collect();
        let rows: Vec<Row> =
            sqlx::query_as(TYPES).bind(oids).persistent(false).fetch_all(connection).await?;
        Ok(Self(rows.into_iter().map(|row| (row.0.0, row)).collect()))
    }

    pub(super) fn get(&self, oid: u32) -> Type {
        self.within(oid, DEEPEST)
    }

    fn within(&self, oid: u32, depth: usize) -> Type {
        let Some((_, name, kind, category, base, element)) = self.0.get(&oid) else {
            return Type { oid, name: "?".to_owned(), kind: Kind::Other };
        };
        let of = |inner: &Oid, left| Box::new(self.within(inner.0, left));
        let kind = match (kind.as_str(), category.as_str(), depth.checked_sub(1)) {
            ("d", _, Some(left)) => Kind::Domain(of(base, left)),
            ("b", "A", Some(left)) if element.0 != 0 && !is_vector(oid) => {
                Kind::Array(of(element, left))
            }
            ("e", ..) => Kind::Enum,
            _ => Kind::Other,
        };
        Type { oid, name: name.clone(), kind }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(rows: &[(u32, &str, &str, &str, u32, u32)]) -> Known {
        let rows = rows.iter().map(|(oid, name, kind, category, base, element)| {
            let [name, kind, category] = [name, kind, category].map(|text| (*text).to_owned());
            (*oid, (Oid(*oid), name, kind, category, Oid(*base), Oid(*element)))
        });
        Known(rows.collect())
    }

    #[test]
    fn kinds_are_those_of_the_catalogue() {
        let known = known(&[
            (4451, "int4multirange", "m", "R", 0, 0),
            (6150, "int4multirange[]", "b", "A", 0, 4451),
            (20_000, "spans", "d", "R", 4451, 0),
            (23, "integer", "b", "N", 0, 0),
            (1007, "integer[]", "b", "A", 0, 23),
            (20_001, "counts", "d", "A", 1007, 0),
            (20_002, "mood", "e", "E", 0, 0),
            (30, "oidvector", "b", "A", 0, 26),
        ]);
        let columns = [
            (4451, "int4multirange", None),
            (6150, "int4multirange[]", None),
            (20_000, "spans", None),
            (23, "int4", Some(Codec::Scalar(Scalar::Int4))),
            (1007, "int4[]", Some(Codec::Array(Scalar::Int4))),
            (20_001, "counts", Some(Codec::Array(Scalar::Int4))),
            (20_002, "mood", Some(Codec::Scalar(Scalar::Text))),
            (30, "oidvector", None),
            (7, "?", None),
        ];
        for (oid, name, codec) in columns {
            assert_eq!(known.get(oid).column(), (name.to_owned(), codec), "{oid}");
        }
        assert_eq!(known.get(20_001).base().as_deref(), Some("int4[]"));
        assert_eq!(known.get(20_000).base(), None);
        let shown = |oid| known.get(oid).parameter().map(|known| known.sql);
        assert_eq!(shown(1007).as_deref(), Some("pg_catalog.\"int4\"[]"));
        assert_eq!((shown(4451), shown(20_000)), (None, None));
    }

    /// No catalogue has one; a server that lies may.
    #[test]
    fn a_type_that_is_made_of_itself_comes_to_an_end() {
        let known =
            known(&[(20_000, "a", "d", "A", 20_001, 0), (20_001, "b", "b", "A", 0, 20_000)]);
        let (name, codec) = known.get(20_000).column();
        assert_eq!((name.as_str(), codec), ("a", None));
    }
}
