//! Multiple choice as evaluation harnesses score it: the choice whose text is the most likely after its context.

use std::ops::ControlFlow;
use std::path::Path;

use serde::Deserialize;

use super::EvaluateError;
use super::loss::predict;
use crate::model::Session;
use crate::text::Tokenizer;

/// One question: a line of a JSONL file, `{"context": "…", "choices": ["…", …], "gold": 0}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// What comes before each choice.
    pub contexts: Vec<String>,
    /// The choices.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub gold: usize,
}

#[derive(Deserialize)]
struct Line {
    #[serde(alias = "query")]
    context: Context,
    choices: Vec<String>,
    gold: usize,
}

/// One for all choices, or one for each.
#[derive(Deserialize)]
#[serde(untagged, expecting = "context is neither a text nor a list of texts")]
enum Context {
    One(String),
    Each(Vec<String>),
}

/// Reads questions, one JSON object a line. `query` may stand for `context`; a list of contexts has one for each choice
/// (where the choice lies in the middle of a sentence, as in WinoGrande). Empty lines and other fields are passed over.
///
/// # Errors
/// The first line that is no question, and a file without any.
pub fn read_questions(path: &Path, text: &str) -> Result<Vec<Question>, EvaluateError> {
    let question = |(at, line): (usize, &str)| {
        let error = |problem: String| EvaluateError::Question { path: path.to_owned(), line: at + 1, problem };
        let Line { context, choices, gold } = serde_json::from_str(line).map_err(|source| error(source.to_string()))?;
        if choices.len() < 2 || gold >= choices.len() {
            return Err(error(format!("gold is {gold} of {} choices", choices.len())));
        }
        if choices.iter().any(String::is_empty) {
            return Err(error("a choice is empty".to_owned()));
        }
        let contexts = match context {
            Context::One(context) => vec![context; choices.len()],
            Context::Each(contexts) if contexts.len() == choices.len() => contexts,
            Context::Each(contexts) => {
                return Err(error(format!("{} contexts for {} choices", contexts.len(), choices.len())));
            }
        };
        Ok(Question { contexts, choices, gold })
    };
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let questions: Vec<Question> = lines.map(question).collect::<Result<_, _>>()?;
    if questions.is_empty() {
        let problem = "there is no question".to_owned();
        return Err(EvaluateError::Question { path: path.to_owned(), line: 1, problem });
    }
    Ok(questions)
}

/// How likely one choice is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChoiceScore {
    /// `Σ ln p` of its tokens.
    pub log_probability: f64,
    /// Length of its text in bytes, without the delimiter.
    pub bytes: usize,
    /// Number of its tokens.
    pub tokens: usize,
    /// Whether greedy decoding would write it.
    pub greedy: bool,
}

/// How a question was answered.
#[derive(Clone, Debug, PartialEq)]
pub struct QuestionScore {
    /// Scores of the choices.
    pub choices: Vec<ChoiceScore>,
    /// Index of the right one.
    pub gold: usize,
    /// Index of the most likely one.
    pub likeliest: usize,
    /// Index of the one that is most likely per byte.
    pub likeliest_per_byte: usize,
    /// Whether the beginning of a context was left out, because it was too long.
    pub truncated: bool,
}

/// Accuracies over some questions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Questions.
    pub questions: usize,
    /// Questions of which a context was too long.
    pub truncated: usize,
    /// Fraction of questions whose most likely choice is right.
    pub acc: f64,
    /// Its standard error, `√(p (1 − p) / (n − 1))`; `None` for a single question.
    pub acc_stderr: Option<f64>,
    /// Fraction of questions whose choice of the largest `ln p` per byte is right.
    pub acc_norm: f64,
    /// Its standard error.
    pub acc_norm_stderr: Option<f64>,
}

/// Scores every choice of every question: `delimiter` stands between context and choice. `progress` is told how many
/// questions are done and can stop: the answers are then those of the part.
///
/// A context and a choice are encoded together; the choice's tokens are those beyond the context's own. Whitespace at a
/// context's end counts as the choice's, since most vocabularies write a word with the space before it. Where both do not
/// fit, the context loses its beginning.
///
/// # Errors
/// If a text cannot be encoded, or a choice has no tokens of its own or more than the context holds.
pub fn score(
    session: &mut Session,
    tokenizer: &Tokenizer,
    questions: &[Question],
    delimiter: &str,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<QuestionScore>, EvaluateError> {
    let mut scores = Vec::with_capacity(questions.len());
    for (number, Question { contexts, choices, gold }) in questions.iter().enumerate() {
        let (mut scored, mut truncated) = (Vec::with_capacity(choices.len()), false);
        for (at, (context, choice)) in contexts.iter().zip(choices).enumerate() {
            let error =
                |problem: &str| EvaluateError::Choice { question: number + 1, choice: at, problem: problem.to_owned() };
            let (mut tokens, mut first) = encode_pair(tokenizer, context, delimiter, choice)?;
            if first == 0 {
                // Something has to be there to predict the first token from.
                let begin = tokenizer.bos().or(tokenizer.eos());
                tokens.insert(0, begin.ok_or_else(|| error("the context is empty, and the model has no BOS token"))?);
                first = 1;
            }
            let length = tokens.len() - first;
            if length == 0 {
                return Err(error("the choice has no tokens of its own after its context"));
            }
            // The last token is only predicted, never read.
            let excess = (tokens.len() - 1).saturating_sub(session.context());
            if excess >= first {
                return Err(error(&format!("its {length} tokens do not fit a context of {}", session.context())));
            }
            truncated |= excess > 0;
            let mut score = ChoiceScore { log_probability: 0.0, bytes: choice.len(), tokens: length, greedy: true };
            predict(session, &tokens[excess..], first - excess, &mut |_, token| {
                score.log_probability += token.log_probability;
                score.greedy &= token.greedy;
            })?;
            scored.push(score);
        }
        let likeliest = largest(scored.iter().map(|score| score.log_probability));
        let likeliest_per_byte = largest(scored.iter().map(|score| score.log_probability / score.bytes as f64));
        scores.push(QuestionScore { choices: scored, gold: *gold, likeliest, likeliest_per_byte, truncated });
        if progress(number + 1).is_break() {
            break;
        }
    }
    Ok(scores)
}

/// Tokens of context and choice together, and the number of them that the context alone has.
fn encode_pair(
    tokenizer: &Tokenizer,
    context: &str,
    delimiter: &str,
    choice: &str,
) -> Result<(Vec<u32>, usize), EvaluateError> {
    let trimmed = context.trim_end();
    let bos = tokenizer.adds_bos();
    let whole = tokenizer.encode(&format!("{context}{delimiter}{choice}"), bos)?;
    let first = tokenizer.encode(trimmed, bos)?.len();
    let first = first.min(whole.len());
    Ok((whole, first))
}

/// Index of the largest; ties go to the lowest index.
fn largest(values: impl Iterator<Item = f64>) -> usize {
    let best = values.enumerate().fold((0, f64::NEG_INFINITY), |best, (i, x)| if x > best.1 { (i, x) } else { best });
    best.0
}

/// Accuracies over answered questions.
#[must_use]
pub fn summarise(scores: &[QuestionScore]) -> Summary {
    let questions = scores.len();
    let accuracy = |right: fn(&QuestionScore) -> bool| {
        let p = scores.iter().filter(|score| right(score)).count() as f64 / questions as f64;
        (p, (questions > 1).then(|| (p * (1.0 - p) / (questions - 1) as f64).sqrt()))
    };
    let (acc, acc_stderr) = accuracy(|score| score.likeliest == score.gold);
    let (acc_norm, acc_norm_stderr) = accuracy(|score| score.likeliest_per_byte == score.gold);
    let truncated = scores.iter().filter(|score| score.truncated).count();
    Summary { questions, truncated, acc, acc_stderr, acc_norm, acc_norm_stderr }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Question>, String> {
        read_questions(Path::new("q.jsonl"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_line_is_a_question_with_one_context_or_one_for_each_choice() {
        let questions = read(
            "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 1, \"id\": 7}\n\n\
             {\"query\": [\"x\", \"y\"], \"choices\": [\"z\", \"z\"], \"gold\": 0}\n",
        );
        let questions = questions.unwrap();
        assert_eq!((questions[0].contexts[1].as_str(), questions[0].gold), ("a", 1));
        assert_eq!(questions[1].contexts, ["x", "y"]);
    }

    #[test]
    fn what_is_no_question_is_refused_with_its_line() {
        let good = "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 1}\n";
        for (line, word) in [
            ("{", "EOF"),
            ("{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 2}", "gold is 2 of 2"),
            ("{\"context\": \"a\", \"choices\": [\"b\"], \"gold\": 0}", "of 1 choices"),
            ("{\"context\": \"a\", \"choices\": [\"b\", \"\"], \"gold\": 0}", "empty"),
            ("{\"context\": [\"a\"], \"choices\": [\"b\", \"c\"], \"gold\": 0}", "1 contexts for 2"),
            ("{\"context\": 5, \"choices\": [\"b\", \"c\"], \"gold\": 0}", "neither a text nor a list"),
            ("{\"choices\": [\"b\", \"c\"], \"gold\": 0}", "context"),
        ] {
            let error = read(&format!("{good}{line}\n")).unwrap_err();
            assert!(error.starts_with("q.jsonl, line 2: ") && error.contains(word), "{error}");
        }
        assert!(read("\n\n").unwrap_err().contains("no question"));
    }

    #[test]
    fn standard_errors_are_those_of_a_mean() {
        let score = |likeliest, likeliest_per_byte| QuestionScore {
            choices: Vec::new(),
            gold: 0,
            likeliest,
            likeliest_per_byte,
            truncated: false,
        };
        let summary = summarise(&[score(0, 1), score(0, 1), score(0, 0), score(1, 1)]);
        assert_eq!((summary.acc, summary.acc_norm), (0.75, 0.25));
        // Sample standard deviation of 1, 1, 1, 0, over the root of 4.
        assert!((summary.acc_stderr.unwrap() - 0.25).abs() < 1e-12);
        assert_eq!(summarise(&[score(0, 0)]).acc_stderr, None);
    }

    #[test]
    fn of_equals_the_first_wins() {
        assert_eq!(largest([-2.0, -1.0, -1.0].into_iter()), 1);
    }
}
