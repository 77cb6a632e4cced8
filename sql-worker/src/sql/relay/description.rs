//! What a server says of a statement that it was asked to describe (PostgreSQL 15, 55.7:
//! ParameterDescription, then RowDescription or NoData).

/// The types of the messages that make a description.
pub(super) const MESSAGES: &[u8] = &[PARAMETERS, COLUMNS, NO_COLUMNS];
const PARAMETERS: u8 = b't';
const COLUMNS: u8 = b'T';
const NO_COLUMNS: u8 = b'n';

/// A statement's parameters and columns, by the object identifiers of their types.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(in crate::sql) struct Description {
    /// In order.
    pub(in crate::sql) parameters: Vec<u32>,
    /// In order; none for a statement without a result set.
    pub(in crate::sql) columns: Vec<Field>,
}

/// A column of a result set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::sql) struct Field {
    /// Its name.
    pub(in crate::sql) name: String,
    /// The table that it comes from and its number in there, where it comes from one.
    pub(in crate::sql) origin: Option<(u32, i16)>,
    /// Its type.
    pub(in crate::sql) type_oid: u32,
}

/// The last description of a session.
#[derive(Debug, Default)]
pub(super) enum Last {
    /// There was none, or one that cannot be read.
    #[default]
    None,
    /// Its first half.
    Parameters(Vec<u32>),
    /// All of it.
    Whole(Description),
}

impl Last {
    /// Takes one of [`MESSAGES`], without its body if that was too long to be kept. Columns count
    /// behind parameters only: those of a simple query describe what is run.
    pub(super) fn hear(&mut self, kind: u8, body: Option<&[u8]>) {
        match (kind, std::mem::take(self)) {
            (PARAMETERS, _) => {
                if let Some(parameters) = body.and_then(parameters) {
                    *self = Self::Parameters(parameters);
                }
            }
            (COLUMNS, Self::Parameters(parameters)) => {
                if let Some(columns) = body.and_then(columns) {
                    *self = Self::Whole(Description { parameters, columns });
                }
            }
            (NO_COLUMNS, Self::Parameters(parameters)) => {
                *self = Self::Whole(Description { parameters, columns: Vec::new() });
            }
            (_, last) => *self = last,
        }
    }
}

/// `None` where it is not what the protocol says.
fn parameters(body: &[u8]) -> Option<Vec<u32>> {
    let mut body = Reader(body);
    let count = u16::from_be_bytes(body.take()?);
    let types = (0..count).map(|_| body.take().map(u32::from_be_bytes)).collect();
    body.end(types)
}

/// `None` where it is not what the protocol says.
fn columns(body: &[u8]) -> Option<Vec<Field>> {
    let mut body = Reader(body);
    let count = u16::from_be_bytes(body.take()?);
    let columns = (0..count).map(|_| field(&mut body)).collect();
    body.end(columns)
}

fn field(body: &mut Reader<'_>) -> Option<Field> {
    let name = body.text()?.to_owned();
    let table = u32::from_be_bytes(body.take()?);
    let number = i16::from_be_bytes(body.take()?);
    let type_oid = u32::from_be_bytes(body.take()?);
    // The type's length and modifier, and the format.
    let _rest: [u8; 8] = body.take()?;
    let origin = (table != 0 && number != 0).then_some((table, number));
    Some(Field { name, origin, type_oid })
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    /// Up to a NUL, which is taken as well.
    fn text(&mut self) -> Option<&'a str> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let (text, rest) = self.0.split_at_checked(end)?;
        self.0 = rest.get(1..)?;
        std::str::from_utf8(text).ok()
    }

    /// `read`, if nothing is left.
    fn end<T>(self, read: Option<T>) -> Option<T> {
        read.filter(|_| self.0.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use fallible_iterator::FallibleIterator as _;
    use postgres_protocol::message::backend::Message;
    use proptest::prelude::*;

    use super::*;

    fn description() -> impl Strategy<Value = Description> {
        let origin = proptest::option::of((1..=u32::MAX, prop_oneof![-7..=-1_i16, 1..=1600_i16]));
        let column = ("[^\0]{0,12}", origin, any::<u32>())
            .prop_map(|(name, origin, type_oid)| Field { name, origin, type_oid });
        let parameters = proptest::collection::vec(any::<u32>(), 0..5);
        (parameters, proptest::collection::vec(column, 0..5))
            .prop_map(|(parameters, columns)| Description { parameters, columns })
    }

    /// The bodies of both messages.
    fn written(description: &Description) -> (Vec<u8>, Vec<u8>) {
        let count = |count: usize| u16::try_from(count).unwrap().to_be_bytes();
        let mut parameters = count(description.parameters.len()).to_vec();
        parameters.extend(description.parameters.iter().flat_map(|oid| oid.to_be_bytes()));
        let mut columns = count(description.columns.len()).to_vec();
        for column in &description.columns {
            let (table, number) = column.origin.unwrap_or_default();
            columns.extend(column.name.bytes().chain([0]));
            columns.extend(table.to_be_bytes());
            columns.extend(number.to_be_bytes());
            columns.extend(column.type_oid.to_be_bytes());
            columns.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
        }
        (parameters, columns)
    }

    fn heard(messages: &[(u8, &[u8])]) -> Option<Description> {
        let mut last = Last::default();
        for (kind, body) in messages {
            last.hear(*kind, Some(body));
        }
        match last {
            Last::Whole(description) => Some(description),
            Last::None | Last::Parameters(_) => None,
        }
    }

    /// The same by the parser of tokio-postgres; `None` where that refuses it.
    fn by_others(kind: u8, body: &[u8]) -> Option<Description> {
        let mut bytes = vec![kind];
        bytes.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        bytes.extend(body);
        let message = Message::parse(&mut bytes.as_slice().into()).ok()??;
        if let Message::ParameterDescription(body) = message {
            let parameters = body.parameters().collect().ok()?;
            Some(Description { parameters, ..Description::default() })
        } else if let Message::RowDescription(body) = message {
            let columns = body.fields().map(|field| {
                let (table, number) = (field.table_oid(), field.column_id());
                Ok(Field {
                    name: field.name().to_owned(),
                    origin: (table != 0 && number != 0).then_some((table, number)),
                    type_oid: field.type_oid(),
                })
            });
            Some(Description { columns: columns.collect().ok()?, ..Description::default() })
        } else {
            None
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(description in description()) {
            let (parameters, columns) = written(&description);
            let simple = columns.as_slice();
            let both = [(b'T', simple), (b't', &parameters), (b'T', simple), (b'T', b"")];
            prop_assert_eq!(heard(&both), Some(description.clone()));
            let none = heard(&[(b't', &parameters), (b'n', b"")]);
            prop_assert_eq!(none, Some(Description { columns: Vec::new(), ..description }));
        }

        #[test]
        fn others_read_the_same(
            description in description(),
            at in any::<proptest::sample::Index>(),
            spoiled in any::<Option<u8>>(),
            cut in any::<proptest::sample::Index>(),
        ) {
            let (parameters, columns) = written(&description);
            for (kind, mut body) in [(b't', parameters), (b'T', columns)] {
                let at = at.index(body.len());
                match spoiled {
                    Some(byte) => body[at] = byte,
                    None => body.truncate(cut.index(body.len() + 1)),
                }
                let own = match kind {
                    b't' => heard(&[(b't', &body), (b'n', b"")]),
                    _ => heard(&[(b't', b"\0\0"), (b'T', &body)]),
                };
                prop_assert_eq!(own, by_others(kind, &body));
            }
        }

        #[test]
        fn no_bytes_are_too_strange(
            messages in proptest::collection::vec(
                (0..3_usize, proptest::collection::vec(any::<u8>(), 0..60)),
                0..6,
            ),
        ) {
            let mut last = Last::default();
            for (kind, body) in &messages {
                last.hear(MESSAGES[*kind], Some(body));
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_no_description() {
        let one = b"\0\x01\0\0\0\x17";
        assert!(heard(&[(b't', one), (b'n', b"")]).is_some());
        for bad in [&b""[..], b"\0", b"\0\x01", b"\0\x02\0\0\0\x17", b"\0\0\0"] {
            assert_eq!(heard(&[(b't', bad), (b'n', b"")]), None, "{bad:?}");
            assert_eq!(heard(&[(b't', one), (b'T', bad)]), None, "{bad:?}");
        }
        let latin = b"\0\x01\xe9\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0";
        assert_eq!(heard(&[(b't', one), (b'T', latin)]), None);
        // Nor is what comes without its first half.
        assert_eq!(heard(&[(b'T', b"\0\0")]), None);
        assert_eq!(heard(&[(b'n', b"")]), None);
    }
}
