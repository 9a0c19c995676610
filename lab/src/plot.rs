//! A sweep as one self-contained page: roofline, heat maps over two parameters, ranked bars.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use ternion_tuner::page::{Dot, document, escape, roofline};

use crate::{Parameter, Row, Weights};

/// Bars of a chart, the fastest.
const BARS: usize = 24;

/// Characters of the longest schedule's line that fits beside its bar.
const LABEL: usize = 76;

/// The parameters of the heat maps: those that vary most where `None`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Axes {
    /// From left to right.
    pub x: Option<Parameter>,
    /// From top to bottom.
    pub y: Option<Parameter>,
}

/// Cases that are compared with each other: shape, columns, threads, weights.
type Group = (usize, usize, usize, usize, Weights);

/// The page of these rows. Of several rows about the same case the last one counts.
#[must_use]
pub fn plot(rows: &[Row], axes: Axes) -> String {
    let latest: BTreeMap<_, _> = rows.iter().map(|row| (row.key(), row)).collect();
    let mut groups: BTreeMap<Group, Vec<&Row>> = BTreeMap::new();
    for row in latest.values().copied().filter(|row| row.median_us.is_some()) {
        groups.entry((row.m, row.k, row.n, row.threads, row.weights)).or_default().push(row);
    }
    groups.values_mut().for_each(|rows| rows.sort_by(|a, b| time(a).total_cmp(&time(b))));
    let cpus: BTreeSet<_> = latest.values().map(|row| row.cpu.as_str()).collect();
    let compilers: BTreeSet<_> = latest.values().map(|row| row.compiler.as_str()).collect();
    let join = |names: BTreeSet<&str>| names.into_iter().map(escape).collect::<Vec<_>>().join(", ");
    let measured: usize = groups.values().map(Vec::len).sum();
    let mut body = format!(
        "<h1>{measured} kernels, measured</h1><p class=\"soft\">{} · ternion {}</p>",
        join(cpus),
        join(compilers)
    );
    body += &roof(&groups);
    for (group, rows) in &groups {
        body += &section(*group, rows, axes);
    }
    body += &refusals(latest.values().copied());
    document("ternion lab: a sweep", &body)
}

fn time(row: &Row) -> f64 {
    row.median_us.unwrap_or(f64::INFINITY)
}

fn name((m, k, n, threads, weights): Group) -> String {
    let weights = if weights == Weights::Cold { "cold" } else { "hot" };
    let threads = if threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") };
    format!("{m} × {k} · n = {n} · {threads} · weights {weights}")
}

/// The fastest of every family and machine in every group under the limits of the machine.
fn roof(groups: &BTreeMap<Group, Vec<&Row>>) -> String {
    let all = || groups.values().flatten();
    let most = |of: &dyn Fn(&Row) -> Option<f64>| all().filter_map(|row| of(row)).reduce(f64::max);
    let (Some(bandwidth), Some(peak)) = (
        most(&|row| row.read_gb_per_s),
        most(&|row| row.limit_gmac_per_s.into_iter().chain(row.gmac_per_s).reduce(f64::max)),
    ) else {
        return String::new();
    };
    let mut seen = BTreeSet::new();
    let mut dots = Vec::new();
    for (group, rows) in groups {
        for row in rows.iter().filter(|row| seen.insert((*group, &row.family, &row.machine))) {
            let (Some(speed), Some(bytes)) = (row.gmac_per_s, row.gb_per_s.filter(|bytes| *bytes > 0.0)) else {
                continue;
            };
            dots.push(Dot {
                class: if row.n == 1 { "one" } else { "many" },
                intensity: speed / bytes,
                speed,
                title: format!("{}: {}, {speed:.1} GMAC/s, {bytes:.1} GB/s", name(*group), row.schedule),
            });
        }
    }
    format!(
        "<section><h2>The limits of the machine</h2><p>On the slope memory sets the pace: {bandwidth:.1} GB/s, as the same \
         threads read it in the same rounds. On the flat part arithmetic does: {peak:.0} billion multiply-adds per second, what \
         the fastest operation at the heart of a kernel does alone. Each dot is the fastest schedule of a family on a machine, for \
         <span class=\"key\" style=\"background:var(--one)\"></span>one column and \
         <span class=\"key\" style=\"background:var(--many)\"></span>many. Weights that were in a cache may lie above the \
         slope.</p>{}</section>",
        roofline(bandwidth, peak, &dots)
    )
}

fn section(group: Group, rows: &[&Row], axes: Axes) -> String {
    let mut section = format!("<section><h2>{}</h2>", escape(&name(group)));
    if let Some((x, y)) = choose(rows, axes) {
        let _ = write!(
            section,
            "<h3>{} and {}</h3><p class=\"soft\">Each field is the fastest of the schedules with these two values, whatever the \
             others are, in percent of the fastest of all {}.</p>{}",
            x.name(),
            y.name(),
            rows.len(),
            heat_map(rows, x, y)
        );
    }
    let _ = write!(
        section,
        "<h3>The fastest {}</h3><p class=\"soft\">Bars are speeds, thin lines reach from the first to the third quartile.</p>{}",
        rows.len().min(BARS),
        bars(rows)
    );
    section + "</section>"
}

/// Values of a parameter in rows, in the order of its numbers.
fn values(rows: &[&Row], parameter: Parameter) -> Vec<String> {
    let values: BTreeSet<_> = rows.iter().map(|row| parameter.of(&row.schedule)).collect();
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by_key(|value| numbers(value));
    values
}

/// A text in parts: what comes before each number, and the number.
fn numbers(text: &str) -> Vec<(String, u64)> {
    let mut parts = vec![(String::new(), 0_u64)];
    let mut in_number = false;
    for character in text.chars() {
        let digit = character.to_digit(10);
        if digit.is_none() && in_number {
            parts.push((String::new(), 0));
        }
        in_number = digit.is_some();
        if let Some((before, number)) = parts.last_mut() {
            match digit {
                Some(digit) => *number = number.saturating_mul(10).saturating_add(digit.into()),
                None => before.push(character),
            }
        }
    }
    parts
}

/// The axes that were asked for, or the parameters that vary most, the one with the longest values from top to bottom.
fn choose(rows: &[&Row], axes: Axes) -> Option<(Parameter, Parameter)> {
    let mut vary: Vec<_> = Parameter::ALL.map(|parameter| (values(rows, parameter).len(), parameter)).to_vec();
    vary.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    let asked = [axes.x, axes.y];
    let mut free = vary.into_iter().filter(|(count, parameter)| *count > 1 && !asked.contains(&Some(*parameter)));
    let mut next = || free.next().map(|(_, parameter)| parameter);
    let longest = |parameter| values(rows, parameter).iter().map(String::len).max();
    match asked {
        [Some(x), Some(y)] => Some((x, y)),
        [Some(x), None] => Some((x, next()?)),
        [None, Some(y)] => Some((next()?, y)),
        [None, None] => {
            let (first, second) = (next()?, next()?);
            Some(if longest(first) > longest(second) { (second, first) } else { (first, second) })
        }
    }
}

fn heat_map(rows: &[&Row], x: Parameter, y: Parameter) -> String {
    let (xs, ys) = (values(rows, x), values(rows, y));
    let mut best: BTreeMap<(String, String), &Row> = BTreeMap::new();
    // Rows come fastest first.
    for row in rows {
        best.entry((x.of(&row.schedule), y.of(&row.schedule))).or_insert(row);
    }
    let fastest = rows.first().map_or(1.0, |row| time(row));
    let (left, top, height) = (110.0, 22.0, 24.0);
    let width = ((960.0 - left) / xs.len() as f64).min(90.0);
    let bottom = top + height * ys.len() as f64;
    let mut svg = format!(
        "<svg viewBox=\"0 0 960 {:.0}\" role=\"img\" aria-label=\"heat map\"><text x=\"{left}\" y=\"14\">{}</text><text x=\"4\" y=\"14\">{}</text>",
        bottom + 22.0,
        escape(x.name()),
        escape(y.name())
    );
    for (column, value) in xs.iter().enumerate() {
        let at = left + width * (column as f64 + 0.5);
        let _ = write!(
            svg,
            "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 16.0,
            escape(value)
        );
    }
    for (line, value) in ys.iter().enumerate() {
        let at = top + height * line as f64;
        let _ = write!(svg, "<text x=\"4\" y=\"{:.1}\">{}</text>", at + 16.0, escape(value));
        for (column, other) in xs.iter().enumerate() {
            let from = left + width * column as f64;
            let Some(row) = best.get(&(other.clone(), value.clone())) else { continue };
            let part = fastest / time(row);
            let _ = write!(
                svg,
                "<g><title>{}: {}</title><rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"3\" class=\"many\" fill-opacity=\"{:.2}\"/>",
                escape(&row.schedule.to_string()),
                speed(row),
                from + 1.0,
                at + 1.0,
                width - 2.0,
                height - 2.0,
                0.05 + 0.6 * part * part
            );
            if width >= 26.0 {
                let _ = write!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" style=\"fill:var(--ink)\">{:.0}</text>",
                    from + width / 2.0,
                    at + 16.0,
                    100.0 * part
                );
            }
            svg += "</g>";
        }
    }
    svg + "</svg>"
}

/// What a row's speed is measured in: bytes where memory is the limit, multiply-adds elsewhere.
fn speed(row: &Row) -> String {
    let number = |value: Option<f64>, unit| value.map_or("–".to_owned(), |value| format!("{value:.1} {unit}"));
    if row.n == 1 { number(row.gb_per_s, "GB/s") } else { number(row.gmac_per_s, "GMAC/s") }
}

fn bars(rows: &[&Row]) -> String {
    let rows = &rows[..rows.len().min(BARS)];
    let Some(fastest) = rows.first().map(|row| time(row)) else { return String::new() };
    let (left, right, height) = (456.0, 856.0, 20.0);
    // The axis ends where the fastest quartile is.
    let longest = rows.iter().filter_map(|row| row.lower_us).fold(fastest, f64::min);
    let at = |us: f64| left + (right - left) * longest / us;
    let mut svg = format!(
        "<svg viewBox=\"0 0 960 {:.0}\" role=\"img\" aria-label=\"ranked bars\">",
        height * rows.len() as f64 + 6.0
    );
    for (place, row) in rows.iter().enumerate() {
        let y = height * place as f64 + 3.0;
        let class = if row.n == 1 { "one" } else { "many" };
        let line: String = row.schedule.to_string().chars().take(LABEL).collect();
        let _ = write!(
            svg,
            "<g><title>{}: {:.1} µs</title><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" style=\"font:9.6px ui-monospace,monospace\">{}</text><rect class=\"{class}\" fill-opacity=\".75\" x=\"{left}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\"/>",
            escape(&row.schedule.to_string()),
            time(row),
            left - 8.0,
            y + 12.0,
            escape(&line),
            at(time(row)) - left,
            height - 5.0
        );
        if let (Some(lower), Some(upper)) = (row.lower_us, row.upper_us) {
            let _ = write!(
                svg,
                "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"var(--ink)\"/>",
                at(upper),
                at(lower),
                y + height / 2.0 - 2.5,
                y + height / 2.0 - 2.5
            );
        }
        let _ = write!(svg, "<text x=\"{:.1}\" y=\"{:.1}\">{}</text></g>", right + 8.0, y + 12.0, speed(row));
    }
    svg + "</svg>"
}

fn refusals<'a>(rows: impl Iterator<Item = &'a Row>) -> String {
    let lines: Vec<_> = rows.filter_map(|row| row.refused.as_ref()).map(|reason| escape(reason)).collect();
    if lines.is_empty() {
        return String::new();
    }
    let items: String = lines.iter().map(|line| format!("<li>{line}</li>")).collect();
    format!("<section><h2>{} not measured</h2><ul>{items}</ul></section>", lines.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BenchError, Case, Shape};

    fn row(n: usize, unroll: u8, layout: &str, us: f64) -> Row {
        let line = format!("mad/clif128 layout={layout} multiply=pairs unroll={unroll} ntile=1");
        let case = Case {
            shape: Shape { m: 64, k: 256 },
            n,
            schedule: line.parse().unwrap(),
            weights: Weights::Cold,
            zeros: 0,
        };
        Row {
            refused: None,
            lower_us: Some(us * 0.9),
            median_us: Some(us),
            upper_us: Some(us * 1.2),
            gb_per_s: Some(4.0 / us),
            gmac_per_s: Some(16.0 / us),
            read_gb_per_s: Some(8.0),
            limit_gmac_per_s: Some(64.0),
            ..Row::refused(&case, 1, "CPU", &BenchError::NoCpu)
        }
    }

    #[test]
    fn the_page_is_self_contained_and_has_all_three_charts_of_every_group() {
        let rows = [
            row(1, 1, "rows4x16", 1.0),
            row(1, 2, "rows4x16", 2.0),
            row(1, 1, "rows8x16", 3.0),
            row(8, 1, "rows4x16", 1.0),
            Row { refused: Some("<b>no</b>".to_owned()), median_us: None, ..row(1, 4, "rows4x16", 1.0) },
        ];
        let page = plot(&rows, Axes::default());
        for reference in ["src=", "href=", "url(", "<script", "@import", "<b>no"] {
            assert!(!page.contains(reference), "{reference}");
        }
        assert!(page.contains("&lt;b&gt;no"));
        // One group has two parameters that vary, the other none.
        for (label, count) in [("roofline", 1), ("heat map", 1), ("ranked bars", 2)] {
            assert_eq!(page.matches(&format!("aria-label=\"{label}\"")).count(), count, "{label}");
        }
        assert!(page.contains("unroll and layout"), "the longer values go from top to bottom");
        assert!(page.contains(">33</text>"), "rows8x16 takes three times as long");
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("prefers-color-scheme:dark"));
    }

    #[test]
    fn values_are_in_the_order_of_their_numbers() {
        let rows = [row(1, 1, "rows8x64", 1.0), row(1, 2, "rows4x16", 1.0), row(1, 4, "lanes16x4", 1.0)];
        let rows: Vec<_> = rows.iter().collect();
        assert_eq!(values(&rows, Parameter::Layout), ["lanes16x4", "rows4x16", "rows8x64"]);
        assert_eq!(values(&rows, Parameter::Unroll), ["1", "2", "4"]);
        assert!(numbers("lanes16x4") > numbers("lanes8x4"));
    }

    #[test]
    fn asked_axes_are_taken_and_of_two_rows_about_a_case_the_last_counts() {
        let rows = [row(1, 1, "rows4x16", 1.0), row(1, 2, "rows4x16", 9.0), row(1, 2, "rows4x16", 2.0)];
        let page = plot(&rows, Axes { x: Some(Parameter::Unroll), y: Some(Parameter::Machine) });
        assert!(page.contains("unroll and machine") && page.contains(">50</text>"), "{page}");
        assert!(page.contains("2 kernels, measured"));
    }
}
