//! Chat templates: a conversation becomes the one text that the model was trained to continue.
//!
//! Templates are Jinja as Hugging Face renders them: blocks are trimmed, Python's string and dictionary methods work,
//! and `raise_exception`, `strftime_now` and a plain `tojson` exist. A model without a template is no chat model;
//! [`ChatTemplate::plain`] still lets one talk to it.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use super::python_json;
use crate::formats::error::brief_line;

/// What [`ChatTemplate::plain`] renders: BOS, then each message's text as a paragraph.
const PLAIN: &str =
    "{{ bos_token }}{% for message in messages %}{{ message.content | trim }}{{ '\\n\\n' }}{% endfor %}";

const NAME: &str = "chat template";

/// Steps after which a template is taken to run forever.
const FUEL: u64 = 10_000_000;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The template is no Jinja, or uses something unknown.
    #[error("the model's chat template cannot be read ({0}): the model cannot chat, run it with a prompt instead")]
    Template(String),
    /// The template refused this conversation.
    #[error("the model's chat template does not accept this conversation: {0}")]
    Refused(String),
    /// The template failed.
    #[error("the model's chat template failed: {0}")]
    Failed(String),
}

/// A chat template, ready to render.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles a template. `bos_token` and `eos_token` are the texts of these tokens, for the template's use.
    ///
    /// # Errors
    /// If it is no template.
    pub fn new(template: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the default delimiters"));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime(format, now()));
        environment.add_filter("tojson", |value: &Value, options: Kwargs| {
            let indent = options.get::<Option<usize>>("indent")?;
            // Python's other options change nothing that a template of a known model relies on.
            python_json::to_json(value, indent)
        });
        environment
            .add_template_owned(NAME, template.to_owned())
            .map_err(|error| ChatError::Template(brief_line(&error)))?;
        let text = |token: Option<&str>| token.unwrap_or_default().to_owned();
        Ok(Self { environment, bos_token: text(bos_token), eos_token: text(eos_token) })
    }

    /// The fallback for a model without a template: turns as plain paragraphs, nothing marks who speaks. The model
    /// continues the text; it was not trained to answer.
    #[must_use]
    pub fn plain(bos_token: Option<&str>) -> Self {
        Self::new(PLAIN, bos_token, None).expect("a template of our own")
    }

    /// The conversation as one text; with `add_generation_prompt`, up to where the assistant begins to speak.
    ///
    /// Special tokens are written out in it, BOS included: encode it without adding another.
    ///
    /// # Errors
    /// If the template refuses the conversation, or fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let messages: Value = messages
            .iter()
            .map(|message| context! { role => &message.role, content => &message.content })
            .collect::<Vec<_>>()
            .into();
        let context = context! {
            messages,
            add_generation_prompt,
            bos_token => &self.bos_token,
            eos_token => &self.eos_token,
        };
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(context));
        rendered.map_err(|error| match refusal(&error) {
            Some(reason) => ChatError::Refused(reason),
            None => ChatError::Failed(brief_line(&error)),
        })
    }
}

/// Marks an error as the template's own `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(reason: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Refusal(reason.to_owned())))
}

fn refusal(error: &Error) -> Option<String> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(Refusal(reason)) = error.downcast_ref() {
            return Some(reason.split_whitespace().collect::<Vec<_>>().join(" "));
        }
        source = error.source();
    }
    None
}

/// Seconds since 1970, UTC.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Python's `strftime` at `seconds` since 1970, UTC, for the fields that templates use.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            text.push(char);
            continue;
        }
        text.push_str(&match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('%') => "%".to_owned(),
            other => {
                let field = other.map(String::from).unwrap_or_default();
                return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: unknown field %{field}")));
            }
        });
    }
    Ok(text)
}

/// Year, month and day of the day `days` after 1 January 1970 (H. Hinnant, "chrono-compatible low-level date
/// algorithms", `civil_from_days`): years begin in March, so that the leap day is the last.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, messages: &[Message]) -> Result<String, ChatError> {
        ChatTemplate::new(template, Some("<s>"), Some("</s>"))?.render(messages, true)
    }

    fn hello() -> Vec<Message> {
        vec![Message::new("system", " Be brief. "), Message::new("user", "Hi <b>&</b> 'you'\n")]
    }

    #[test]
    fn the_template_of_2b4t_gives_roles_and_trimmed_contents() {
        let template = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
                        message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{% if \
                        loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor \
                        %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";
        let text = "<s>System: Be brief.<|eot_id|>User: Hi <b>&</b> 'you'<|eot_id|>Assistant: ";
        assert_eq!(render(template, &hello()).unwrap(), text);
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        let template = "{% for m in messages %}\n    {% if m['role'].startswith('u') %}\n{{ m.content.strip().upper() \
                        }}\n    {% endif %}\n{% endfor %}\n{{ messages[0].get('name', 'nobody') }}{{ eos_token }}";
        assert_eq!(render(template, &hello()).unwrap(), "HI <B>&</B> 'YOU'\nnobody</s>");
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let template = "{{ messages[1] | tojson }} {{ [1, 2.5, none, true, 'ä\\n', {}] | tojson }}";
        let json = r#"{"role": "user", "content": "Hi <b>&</b> 'you'\n"} [1, 2.5, null, true, "ä\n", {}]"#;
        assert_eq!(render(template, &hello()).unwrap(), json);
        assert_eq!(
            render("{{ {'a': [1, []]} | tojson(indent=2) }}", &[]).unwrap(),
            "{\n  \"a\": [\n    1,\n    []\n  ]\n}"
        );
    }

    #[test]
    fn a_template_can_refuse_a_conversation_and_says_why() {
        let error = render("{{ raise_exception('roles must\\nalternate') }}", &[]).unwrap_err();
        assert!(matches!(&error, ChatError::Refused(reason) if reason == "roles must alternate"), "{error}");
    }

    #[test]
    fn bad_templates_are_errors_of_one_line() {
        assert!(matches!(render("{% if %}", &[]), Err(ChatError::Template(_))));
        for template in ["{{ missing.field.deeper }}", "{{ 1 / 0 }}", "{{ nothing() }}", "{{ strftime_now('%Q') }}"] {
            let error = render(template, &[]).unwrap_err();
            assert!(matches!(error, ChatError::Failed(_)) && !error.to_string().contains('\n'), "{error}");
        }
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(matches!(render(endless, &[]), Err(ChatError::Failed(_))));
    }

    #[test]
    fn without_a_template_turns_are_paragraphs() {
        let text = ChatTemplate::plain(Some("<s>")).render(&hello(), true).unwrap();
        assert_eq!(text, "<s>Be brief.\n\nHi <b>&</b> 'you'\n\n");
    }

    #[test]
    fn dates_are_written_as_python_writes_them() {
        // 29 February 2024, 12:34:56 UTC, a Thursday.
        let text = strftime("%A %a %d %B %b %Y-%m-%d %y %H:%M:%S %%", 1_709_210_096).unwrap();
        assert_eq!(text, "Thursday Thu 29 February Feb 2024-02-29 24 12:34:56 %");
        assert_eq!(strftime("%d %b %Y", 0).unwrap(), "01 Jan 1970");
        assert_eq!(strftime("%d %b %Y", 951_782_400 + 86_400).unwrap(), "01 Mar 2000");
    }
}
