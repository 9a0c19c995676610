//! A request's fields, each checked for its type and range before anything is done with it.

use std::ops::RangeInclusive;

use axum::body::Bytes;
use serde_json::{Map, Value};

use super::ApiError;

/// The fields of a JSON object. `null` is as good as nothing.
#[derive(Debug)]
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// If it is no UTF-8, no JSON or no object.
    pub fn parse(body: &Bytes) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::invalid("the body is no JSON object")),
            Err(error) => Err(ApiError::invalid(format!("the body is no JSON: {error}"))),
        }
    }

    /// The value as it is.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A value that has to be there.
    ///
    /// # Errors
    /// If it is not.
    pub fn required(&self, name: &str) -> Result<&Value, ApiError> {
        self.get(name).ok_or_else(|| ApiError::field(name, "is missing"))
    }

    /// A number in `range`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number as f32)),
            _ => Err(ApiError::field(name, format!("expected a number from {} to {}", range.start(), range.end()))),
        }
    }

    /// A whole number in `range`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn integer(&self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match whole(value).and_then(|number| usize::try_from(number).ok()) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                Err(ApiError::field(name, format!("expected a whole number from {} to {}", range.start(), range.end())))
            }
        }
    }

    /// A whole number of 64 bits, with or without a sign.
    ///
    /// # Errors
    /// If it is something else.
    pub fn seed(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        seed.map(Some).ok_or_else(|| ApiError::field(name, "expected a whole number of 64 bits"))
    }

    /// `true` or `false`; `false` if it is not there.
    ///
    /// # Errors
    /// If it is something else.
    pub fn boolean(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(ApiError::field(name, "expected true or false")),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// If it is something else.
    pub fn string(&self, name: &str) -> Result<Option<&str>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::field(name, "expected a string")),
        }
    }

    /// Refuses a field that would change the answer in a way that is not supported. What says nothing is accepted.
    ///
    /// # Errors
    /// If it says something.
    pub fn unsupported(&self, name: &str) -> Result<(), ApiError> {
        match self.get(name) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(Value::Array(items)) if items.is_empty() => Ok(()),
            Some(Value::Object(items)) if items.is_empty() => Ok(()),
            Some(Value::String(text)) if text.is_empty() => Ok(()),
            Some(_) => Err(ApiError::field(name, "is not supported by this server: leave it out")),
        }
    }
}

/// A whole number, which may be written as `5.0`: languages with one type of number do.
fn whole(value: &Value) -> Option<u64> {
    const EXACT: f64 = (1u64 << 53) as f64;
    let float = || value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..EXACT).contains(number));
    value.as_u64().or_else(|| float().map(|number| number as u64))
}
