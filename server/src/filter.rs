//! The content filter: regular expressions that neither a request nor an answer may match.

use regex::Regex;

/// Patterns, from a file with one in each line. Empty lines and lines that begin with `#` say nothing.
#[derive(Debug, Default)]
pub struct Filter {
    patterns: Vec<Regex>,
}

/// A line that is no pattern.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct FilterError {
    line: usize,
    reason: String,
}

impl Filter {
    /// Reads patterns. Matching takes time linear in the text, whatever they are.
    ///
    /// # Errors
    /// The first line that is no pattern.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
        let pattern = |(at, line): (usize, &str)| {
            Regex::new(line).map_err(|error| {
                let reason = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
                FilterError { line: at + 1, reason }
            })
        };
        Ok(Self { patterns: lines.map(pattern).collect::<Result<_, _>>()? })
    }

    /// Whether it lets everything through.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Where the first match begins, in bytes.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<usize> {
        self.patterns.iter().filter_map(|pattern| pattern.find(text)).map(|found| found.start()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_lines_and_comments_are_none() {
        let filter = Filter::parse("# about\n\n(?i)forbidden\nb.d\n").unwrap();
        assert_eq!(filter.find("not bad, FORBIDDEN"), Some(4));
        assert_eq!(filter.find("fine"), None);
        assert!(Filter::parse("# nothing\n").unwrap().is_empty());
        assert!(Filter::parse("a\n\n(").unwrap_err().to_string().starts_with("line 3: "));
    }
}
