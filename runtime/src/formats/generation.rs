//! How a model's authors want it to be sampled: `generation_config.json`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::brief;

/// Defaults of generation; `None` where the model's files say nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GenerationDefaults {
    /// Whether to sample; greedy otherwise.
    pub do_sample: Option<bool>,
    /// Sampling temperature, from 0.
    pub temperature: Option<f32>,
    /// Number of most likely tokens to keep; 0 keeps all.
    pub top_k: Option<usize>,
    /// Probability mass to keep, 0 to 1.
    pub top_p: Option<f32>,
    /// Smallest probability to keep, as a part of the largest, 0 to 1.
    pub min_p: Option<f32>,
    /// Divisor of positive and factor of negative logits of tokens seen before, above 0.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end the text; empty if the model's files name none.
    pub eos: Vec<u32>,
    /// Token that begins every text.
    pub bos: Option<u32>,
    /// Longest sequence in tokens, prompt included.
    pub max_length: Option<usize>,
}

impl GenerationDefaults {
    /// Reads `generation_config.json`, token ids from `config.json` where it names none.
    ///
    /// # Errors
    /// The field that holds something else than it should, and what that is.
    pub(super) fn from_json(generation: &Value, config: &Value) -> Result<Self, (&'static str, String)> {
        let float = |field, low: f64, high: f64| match &generation[field] {
            Value::Null => Ok(None),
            value => match value.as_f64() {
                Some(number) if (low..=high).contains(&number) => Ok(Some(number as f32)),
                _ => Err((field, format!("is {}, not a number in {low}..={high}", brief(value)))),
            },
        };
        let count = |field| match &generation[field] {
            Value::Null => Ok(None),
            value => match value.as_u64().and_then(|number| usize::try_from(number).ok()) {
                Some(number) => Ok(Some(number)),
                None => Err((field, format!("is {}, not a count", brief(value)))),
            },
        };
        let tokens = |field| {
            let value = if generation[field].is_null() { &config[field] } else { &generation[field] };
            let ids = match value {
                Value::Null => return Ok(Vec::new()),
                Value::Array(ids) => ids.iter().map(token_id).collect(),
                id => token_id(id).map(|id| vec![id]),
            };
            ids.ok_or_else(|| (field, format!("is {}, not a token id or a list of them", brief(value))))
        };
        let max = f64::from(f32::MAX);
        Ok(Self {
            do_sample: match &generation["do_sample"] {
                Value::Null => None,
                Value::Bool(sample) => Some(*sample),
                value => return Err(("do_sample", format!("is {}, not true or false", brief(value)))),
            },
            temperature: float("temperature", 0.0, max)?,
            top_k: count("top_k")?,
            top_p: float("top_p", 0.0, 1.0)?,
            min_p: float("min_p", 0.0, 1.0)?,
            repetition_penalty: float("repetition_penalty", f64::from(f32::MIN_POSITIVE), max)?,
            eos: tokens("eos_token_id")?,
            bos: tokens("bos_token_id")?.first().copied(),
            max_length: count("max_length")?,
        })
    }
}

fn token_id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

#[cfg(test)]
mod tests {
    use super::GenerationDefaults;
    use serde_json::{Value, json};

    #[test]
    fn generation_config_comes_first_and_config_fills_the_token_ids() {
        let generation = json!({"do_sample": true, "temperature": 0.6, "top_k": 40, "eos_token_id": [7, 9]});
        let config = json!({"eos_token_id": 1, "bos_token_id": 5, "temperature": 2.0});
        let defaults = GenerationDefaults::from_json(&generation, &config).unwrap();
        assert_eq!(defaults.temperature, Some(0.6));
        assert_eq!((defaults.top_k, defaults.top_p), (Some(40), None));
        assert_eq!((defaults.eos, defaults.bos), (vec![7, 9], Some(5)));
        assert_eq!(GenerationDefaults::from_json(&Value::Null, &config).unwrap().eos, [1]);
    }

    #[test]
    fn a_value_out_of_range_is_named() {
        for (json, field) in [
            (json!({"temperature": -1}), "temperature"),
            (json!({"top_p": 1.5}), "top_p"),
            (json!({"top_k": "many"}), "top_k"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"eos_token_id": [1, -2]}), "eos_token_id"),
            (json!({"do_sample": 1}), "do_sample"),
        ] {
            assert_eq!(GenerationDefaults::from_json(&json, &Value::Null).unwrap_err().0, field);
        }
    }
}
