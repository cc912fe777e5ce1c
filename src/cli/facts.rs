//! Facts that a command found, as a tree: printed as JSON, or for people as an indented list of
//! the same fields.
//!
//! A list that a file can make long is not held as a tree: an item of it takes a kilobyte there and
//! a few bytes in the file. [`Rows`] makes its items one by one while they are printed.

use crate::telemetry::printable;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;
use std::io::{Result, Write};

/// A tree of facts.
pub(super) enum Facts {
    /// A number, a text, a truth or nothing.
    Scalar(Value),
    /// Named facts, in the order in which they are told.
    Fields(Vec<(String, Facts)>),
    /// A short list.
    List(Vec<Facts>),
    /// A list of any length.
    Rows(Rows),
}

/// A list whose items are made when they are printed.
pub(super) struct Rows {
    count: usize,
    row: Box<dyn Fn(usize) -> Value>,
}

impl Rows {
    /// One row for each of `items`.
    pub(super) fn of<T: 'static>(items: Vec<T>, row: fn(&T) -> Value) -> Self {
        Self { count: items.len(), row: Box::new(move |at| items.get(at).map_or(Value::Null, row)) }
    }

    fn iter(&self) -> impl Iterator<Item = Value> {
        (0..self.count).map(&self.row)
    }
}

impl From<Value> for Facts {
    fn from(value: Value) -> Self {
        match value {
            Value::Object(fields) => {
                let fields = fields.into_iter();
                Self::Fields(fields.map(|(name, field)| (name, field.into())).collect())
            }
            Value::Array(items) => Self::List(items.into_iter().map(Into::into).collect()),
            scalar => Self::Scalar(scalar),
        }
    }
}

impl From<Rows> for Facts {
    fn from(rows: Rows) -> Self {
        Self::Rows(rows)
    }
}

impl Serialize for Facts {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Scalar(value) => value.serialize(serializer),
            Self::Fields(fields) => {
                let mut map = serializer.serialize_map(Some(fields.len()))?;
                for (name, field) in fields {
                    map.serialize_entry(name, field)?;
                }
                map.end()
            }
            Self::List(items) => serializer.collect_seq(items),
            // The length says how an empty list is written, and nothing else.
            Self::Rows(rows) => serializer.collect_seq(rows.iter()),
        }
    }
}

impl Facts {
    /// These fields and one more, which is told last. Nothing but fields has more fields.
    pub(super) fn with(self, name: &str, field: impl Into<Self>) -> Self {
        debug_assert!(matches!(self, Self::Fields(_)), "what gets a field has fields");
        let mut fields = match self {
            Self::Fields(fields) => fields,
            other => vec![("value".to_owned(), other)],
        };
        fields.push((name.to_owned(), field.into()));
        Self::Fields(fields)
    }

    /// Whether a field of this name is among the fields.
    pub(super) fn has(&self, name: &str) -> bool {
        matches!(self, Self::Fields(fields) if fields.iter().any(|(field, _)| field == name))
    }

    /// Writes the tree as indented JSON and a newline.
    pub(super) fn write_json(&self, out: &mut dyn Write) -> Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        out.write_all(b"\n")
    }

    /// Writes the tree as an indented list.
    pub(super) fn write_outline(&self, out: &mut dyn Write) -> Result<()> {
        self.outline(0, out)
    }

    fn outline(&self, depth: usize, out: &mut dyn Write) -> Result<()> {
        let indent = "  ".repeat(depth);
        match self {
            Self::Scalar(value) => writeln!(out, "{indent}{}", plain(value)),
            Self::Fields(fields) => fields
                .iter()
                .try_for_each(|(name, field)| field.item(&format!("{indent}{name}:"), depth, out)),
            Self::List(items) => {
                items.iter().try_for_each(|item| item.item(&format!("{indent}-"), depth, out))
            }
            Self::Rows(rows) => {
                let label = format!("{indent}-");
                rows.iter().try_for_each(|row| Self::from(row).item(&label, depth, out))
            }
        }
    }

    fn item(&self, label: &str, depth: usize, out: &mut dyn Write) -> Result<()> {
        match self {
            Self::Scalar(value) => writeln!(out, "{label} {}", plain(value)),
            nested if nested.is_empty() => writeln!(out, "{label} none"),
            nested => {
                writeln!(out, "{label}")?;
                nested.outline(depth + 1, out)
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Scalar(_) => false,
            Self::Fields(fields) => fields.is_empty(),
            Self::List(items) => items.is_empty(),
            Self::Rows(rows) => rows.count == 0,
        }
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => printable(text).into_owned(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn outline(facts: &Facts) -> String {
        let mut text = Vec::new();
        facts.write_outline(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    fn json_text(facts: &Facts) -> String {
        let mut text = Vec::new();
        facts.write_json(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn facts_for_people_are_the_same_fields_indented() {
        let facts = Facts::from(json!({"a": 1, "b": {"c": "x", "d": []}, "e": [{"f": null}, 2]}));
        assert_eq!(outline(&facts), "a: 1\nb:\n  c: x\n  d: none\ne:\n  -\n    f: -\n  - 2\n");
    }

    #[test]
    fn a_text_stays_in_its_line_and_does_nothing_to_the_terminal() {
        let facts = Facts::from(json!({"uuid": "a\nb: forged\u{1b}[2J", "list": ["\r"]}));
        assert_eq!(outline(&facts), "uuid: a\\nb: forged\\u{1b}[2J\nlist:\n  - \\r\n");
    }

    #[test]
    fn rows_are_told_as_a_list_in_memory_would_be() {
        for count in 0..4 {
            let items: Vec<u64> = (0..count).collect();
            let row = |item: &u64| json!({"n": item, "of": {"none": [], "text": "\"\n"}});
            let list: Vec<Value> = items.iter().map(row).collect();
            let whole = json!({"head": null, "inner": {"x": 1, "rows": list}, "tail": {}});
            let inner = Facts::from(json!({"x": 1})).with("rows", Rows::of(items, row));
            let streamed = Facts::from(json!({"head": null})).with("inner", inner);
            let streamed = streamed.with("tail", json!({}));
            assert!(streamed.has("inner") && !streamed.has("rows"));
            assert_eq!(outline(&streamed), outline(&Facts::from(whole.clone())), "{count} rows");
            let expected = serde_json::to_string_pretty(&whole).unwrap() + "\n";
            assert_eq!(json_text(&streamed), expected, "{count} rows");
        }
    }
}
