//! JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it, which is what the `tojson` of chat templates means:
//! a space after every comma and colon, nothing escaped for HTML.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Writes a template value as JSON; with `indent`, over several lines.
pub(super) fn to_json(value: &Value, indent: Option<usize>) -> Result<String, Error> {
    let mut text = String::new();
    write(value, indent, 0, &mut text)?;
    Ok(text)
}

fn write(value: &Value, indent: Option<usize>, depth: usize, text: &mut String) -> Result<(), Error> {
    // As deep as JSON parsers go.
    if depth > 128 {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply"));
    }
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&value.to_string()),
        ValueKind::String => write_string(value.as_str().unwrap_or_default(), text),
        ValueKind::Map => {
            let keys: Vec<Value> = value.try_iter()?.collect();
            write_all(['{', '}'], &keys, indent, depth, text, |key, text| {
                write_string(&key.to_string(), text);
                text.push_str(": ");
                write(&value.get_item(key)?, indent, depth + 1, text)
            })?;
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_all(['[', ']'], &items, indent, depth, text, |item, text| write(item, indent, depth + 1, text))?;
        }
        kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} is no JSON"))),
    }
    Ok(())
}

fn write_all(
    [open, close]: [char; 2],
    items: &[Value],
    indent: Option<usize>,
    depth: usize,
    text: &mut String,
    mut write_item: impl FnMut(&Value, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let new_line = |text: &mut String, depth: usize| {
        if let Some(indent) = indent.filter(|_| !items.is_empty()) {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    text.push(open);
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            text.push_str(if indent.is_some() { "," } else { ", " });
        }
        new_line(text, depth + 1);
        write_item(item, text)?;
    }
    new_line(text, depth);
    text.push(close);
    Ok(())
}

fn write_string(string: &str, text: &mut String) {
    text.push('"');
    for char in string.chars() {
        match char {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            control if control < ' ' => text.push_str(&format!("\\u{:04x}", u32::from(control))),
            char => text.push(char),
        }
    }
    text.push('"');
}
