//! How much of a result is kept, and the truth about what was not.

use std::io;
use std::time::Duration;

use serde_json::Value;

use super::sink::Batch;
use super::value::{Codec, Malformed};
use super::{Body, Column, Format, csv};

/// Bounds of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows that are kept.
    pub max_rows: usize,
    /// Bytes of the rows as JSON or CSV text.
    pub max_bytes: usize,
    /// Bytes of one cell.
    pub max_cell_bytes: usize,
    /// Time from the first message to the database to the last row.
    pub statement_timeout: Duration,
}

impl Limits {
    /// Bytes of one message of the server's, such as a row. Binary values may be four times as
    /// long as their text (an int4 in an array), and a cell is cut only when it is there.
    pub(super) fn longest_message(&self) -> usize {
        const LEAST: usize = 16 << 20;
        self.max_bytes.max(self.max_cell_bytes).saturating_mul(4).max(LEAST)
    }
}

/// The largest `max_rows` that a call may ask for.
pub(crate) const MAX_ROWS_CEILING: usize = 50_000;

/// Why a result is not whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cut {
    /// A cell was longer than `max_cell_bytes`; it is a string with the beginning of its text.
    Cell,
    /// The next row would have gone beyond `max_bytes`.
    Bytes,
    /// There was a row after `max_rows`.
    Rows,
}

impl Cut {
    /// The name as it stands in results.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cell => "max_cell_bytes",
            Self::Bytes => "max_bytes",
            Self::Rows => "max_rows",
        }
    }
}

/// Whether a further row can be of use.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Room {
    Left,
    None,
}

/// Collects rows until a limit is met.
#[derive(Debug)]
pub(super) struct Collector<'a> {
    limits: &'a Limits,
    body: Body,
    rows: usize,
    bytes: usize,
    /// Bytes of the row that is being pushed, at least.
    row: usize,
    cut: Option<Cut>,
    /// Of `rows` and `bytes`, what no batch has taken yet.
    waiting_rows: usize,
    waiting_bytes: usize,
}

/// A batch is handed on when it has so many rows, or bytes.
const BATCH_ROWS: usize = 500;
const BATCH_BYTES: usize = 64 << 10;

impl<'a> Collector<'a> {
    pub(super) fn new(limits: &'a Limits, format: Format, columns: &[Column]) -> Self {
        let mut body = Body::empty(format);
        if let (Body::Csv(header), false) = (&mut body, columns.is_empty()) {
            let names: Vec<Value> =
                columns.iter().map(|column| column.name.as_str().into()).collect();
            csv::push_record(header, &names);
        }
        let (rows, bytes, row, waiting_rows, waiting_bytes) = (0, 0, 0, 0, 0);
        Self { limits, body, rows, bytes, row, cut: None, waiting_rows, waiting_bytes }
    }

    /// Takes a row that is there; `cells` is asked only when there is room for it, and may leave
    /// out what stands behind [`is_over`](Self::is_over).
    pub(super) fn push(
        &mut self,
        cells: impl FnOnce(&mut Self) -> Result<Vec<Value>, Malformed>,
    ) -> Result<Room, Malformed> {
        if self.rows >= self.limits.max_rows {
            self.cut = Some(Cut::Rows);
            return Ok(Room::None);
        }
        self.row = 0;
        let cells = cells(self)?;
        let before_bytes = self.bytes;
        let fits = match &mut self.body {
            Body::Rows(rows) => {
                let row = Value::Array(cells);
                self.bytes += json_len(&row) + 1;
                let fits = self.bytes <= self.limits.max_bytes;
                if fits {
                    rows.push(row);
                }
                fits
            }
            Body::Csv(text) => {
                let before = text.len();
                csv::push_record(text, &cells);
                self.bytes += text.len() - before;
                let fits = self.bytes <= self.limits.max_bytes;
                if !fits {
                    text.truncate(before);
                }
                fits
            }
        };
        if !fits {
            self.cut = Some(Cut::Bytes);
            return Ok(Room::None);
        }
        self.rows += 1;
        self.waiting_rows += 1;
        self.waiting_bytes += self.bytes - before_bytes;
        Ok(Room::Left)
    }

    /// The rows that wait, when they make a batch.
    pub(super) fn take_full(&mut self) -> Option<Batch> {
        let full = self.waiting_rows >= BATCH_ROWS || self.waiting_bytes >= BATCH_BYTES;
        if full { self.take() } else { None }
    }

    /// The rows that wait, if there are any; for CSV the header is enough.
    pub(super) fn take(&mut self) -> Option<Batch> {
        let body = match &mut self.body {
            Body::Rows(rows) if rows.is_empty() => return None,
            Body::Csv(text) if text.is_empty() => return None,
            Body::Rows(rows) => Body::Rows(std::mem::take(rows)),
            Body::Csv(text) => Body::Csv(std::mem::take(text)),
        };
        self.waiting_bytes = 0;
        Some(Batch { body, rows: std::mem::take(&mut self.waiting_rows) })
    }

    /// Decodes one cell of the row that is being pushed, cutting it to size.
    pub(super) fn cell(&mut self, codec: &Codec, bytes: &[u8]) -> Result<Value, Malformed> {
        let value = self.cut_cell(codec, bytes)?;
        self.row += value.as_str().map_or(1, str::len);
        Ok(value)
    }

    /// Whether the row that is being pushed cannot fit any more, whatever else is in it.
    pub(super) fn is_over(&self) -> bool {
        self.bytes + self.row > self.limits.max_bytes
    }

    fn cut_cell(&mut self, codec: &Codec, bytes: &[u8]) -> Result<Value, Malformed> {
        let max = self.limits.max_cell_bytes;
        if codec.is_text() && bytes.len() > max {
            self.note_cut_cell();
            let head = bytes.get(..max).unwrap_or(bytes);
            return Ok(whole_characters(head)?.into());
        }
        let value = codec.decode(bytes, max)?;
        if bytes.len() <= max / 8 && !codec.may_grow() {
            return Ok(value);
        }
        let text = match &value {
            Value::String(text) if text.len() > max => text.clone(),
            Value::Array(_) | Value::Object(_) if json_len(&value) > max => value.to_string(),
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_)
            | Value::Object(_) => return Ok(value),
        };
        self.note_cut_cell();
        let head = text.as_bytes().get(..max).unwrap_or(text.as_bytes());
        Ok(whole_characters(head)?.into())
    }

    fn note_cut_cell(&mut self) {
        self.cut = self.cut.max(Some(Cut::Cell));
    }

    /// How many rows there were in all, and why there are no more.
    pub(super) fn finish(self) -> (usize, Option<Cut>) {
        (self.rows, self.cut)
    }
}

/// The whole characters at the beginning of `bytes`, the last of which may have been cut.
fn whole_characters(bytes: &[u8]) -> Result<&str, Malformed> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) if error.error_len().is_none() => {
            let valid = bytes.get(..error.valid_up_to()).unwrap_or_default();
            std::str::from_utf8(valid).map_err(|_unreachable| Malformed)
        }
        Err(_invalid) => Err(Malformed),
    }
}

/// Length of `value` as JSON text, without making the text.
fn json_len(value: &Value) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // A Value always serialises, and counting never fails.
    let _ = serde_json::to_writer(&mut count, value);
    count.0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::value::Scalar;
    use super::*;

    const LIMITS: Limits = Limits {
        max_rows: 2,
        max_bytes: 40,
        max_cell_bytes: 8,
        statement_timeout: Duration::from_secs(1),
    };

    fn row(cell: &str) -> Result<Vec<Value>, Malformed> {
        Ok(vec![json!(cell)])
    }

    fn whole(mut collector: Collector<'_>) -> (Body, usize, Option<Cut>) {
        let body = collector.take().unwrap().body;
        let (rows, cut) = collector.finish();
        (body, rows, cut)
    }

    #[test]
    fn batches_are_the_whole() {
        let limits = Limits { max_rows: 5000, max_bytes: 1 << 20, ..LIMITS };
        for format in [Format::Json, Format::Csv] {
            let mut collector = Collector::new(&limits, format, &[]);
            let mut sizes = Vec::new();
            for _ in 0..1200 {
                assert_eq!(collector.push(|_| row("a")), Ok(Room::Left));
                sizes.extend(collector.take_full().map(|batch| batch.rows));
            }
            sizes.extend(collector.take().map(|batch| batch.rows));
            assert_eq!(sizes, [500, 500, 200]);
            assert_eq!(collector.take(), None);
            assert_eq!(collector.finish(), (1200, None));
        }
    }

    #[test]
    fn exactly_max_rows_is_not_a_cut() {
        let mut collector = Collector::new(&LIMITS, Format::Json, &[]);
        assert_eq!(collector.push(|_| row("a")), Ok(Room::Left));
        assert_eq!(collector.push(|_| row("b")), Ok(Room::Left));
        assert_eq!(whole(collector), (Body::Rows(vec![json!(["a"]), json!(["b"])]), 2, None));

        let mut collector = Collector::new(&LIMITS, Format::Json, &[]);
        assert_eq!(collector.push(|_| row("a")), Ok(Room::Left));
        assert_eq!(collector.push(|_| row("b")), Ok(Room::Left));
        assert_eq!(collector.push(|_| row("c")), Ok(Room::None));
        assert_eq!(collector.finish().1, Some(Cut::Rows));
    }

    #[test]
    fn a_row_that_does_not_fit_is_left_out_whole() {
        let columns = [Column { name: "a,b".into(), type_name: "text".into(), masked: false }];
        for format in [Format::Json, Format::Csv] {
            let mut collector = Collector::new(&LIMITS, format, &columns);
            assert_eq!(collector.push(|_| row("fits")), Ok(Room::Left));
            assert_eq!(collector.push(|_| row(&"x".repeat(60))), Ok(Room::None));
            let (body, rows, cut) = whole(collector);
            assert_eq!((rows, cut), (1, Some(Cut::Bytes)));
            match body {
                Body::Rows(rows) => assert_eq!(rows, [json!(["fits"])]),
                Body::Csv(text) => assert_eq!(text, "\"a,b\"\r\nfits\r\n"),
            }
        }
    }

    #[test]
    fn a_long_cell_is_cut_between_characters() {
        let mut collector = Collector::new(&LIMITS, Format::Json, &[]);
        let text = Codec::Scalar(Scalar::Text);
        let cell = collector.cell(&text, "1234567é".as_bytes()).unwrap();
        assert_eq!(cell, json!("1234567"));
        let cell = collector.cell(&Codec::Scalar(Scalar::Json), b"[1,2,3,4,5]").unwrap();
        assert_eq!(cell, json!("[1,2,3,4"));
        // Ten digits in eight bytes, and none of them is more than the cell's.
        let numeric = Codec::Scalar(Scalar::Numeric);
        let wire = [0, 1, 0, 2, 0, 0, 0, 0, 0, 1];
        assert_eq!(collector.cell(&numeric, &wire).unwrap(), json!("10000000"));
        let wire = [0, 1, 0x7f, 0xff, 0, 0, 0, 0, 0, 1];
        assert_eq!(collector.cell(&numeric, &wire).unwrap(), json!("10000000"));
        assert_eq!(collector.cell(&text, b"12345678").unwrap(), json!("12345678"));
        assert_eq!(collector.finish().1, Some(Cut::Cell));
    }
}
