//! The report as one self-contained page: no scripts, no references, charts in SVG.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{Report, Row, explain, macs};
use crate::page::{self, Axis, Dot, document, escape};
use crate::{Class, Problem};

/// Colours of the four phases.
const PHASES: [&str; 4] = ["#94a3b8", "#0d9488", "#1d4ed8", "#c2410c"];

pub(super) fn page(report: &Report) -> String {
    let mut page = format!(
        "<h1>The fastest kernels of this machine</h1><p class=\"soft\">{} · {} threads · ternion {}</p>",
        escape(&report.machine.signature()),
        report.threads,
        escape(ternion_compiler::FINGERPRINT)
    );
    page += &introduction(report);
    page += &roofline(report);
    page += &winners(report);
    page += &shapes(report);
    page += &phases(report);
    page += &warnings(report);
    document("ternion: kernels of this machine", &page)
}

fn introduction(report: &Report) -> String {
    let mut shapes: Vec<Problem> = report.rows.iter().map(|row| row.problem).collect();
    shapes.dedup();
    format!(
        "<section><h2>What this is</h2><p>Nearly all the time of a language model goes into multiplying a few kinds of \
         matrix with the numbers of the current tokens. There are many ways to write that loop. ternion compiled and \
         measured {} of them for the {} shapes of matrix in this model, and keeps the fastest for each. All of them give \
         exactly the same result; only the time differs.</p><p>A model meets each matrix in two situations. When it \
         <b>generates</b>, one token at a time (<code>n = 1</code>), every weight is read from memory and used once: memory is \
         the limit. When it reads a <b>prompt</b>, or serves several texts at once, a weight that was read is used for many tokens \
         (<code>n</code> of them): arithmetic becomes the limit.</p></section>",
        report.trials.len().max(report.rows.iter().map(|row| row.tried).sum()),
        shapes.len()
    )
}

fn dot(row: &Row) -> Dot {
    let Problem { m, k, .. } = row.problem;
    Dot {
        class: if row.class == Class::One { "one" } else { "many" },
        intensity: row.gmac_per_s / row.gb_per_s,
        speed: row.gmac_per_s,
        title: format!("{m}x{k}, n = {}: {:.1} GMAC/s, {:.1} GB/s", row.class.name(), row.gmac_per_s, row.gb_per_s),
    }
}

fn roofline(report: &Report) -> String {
    let (Some(bandwidth), Some(peak)) = (report.roofline.bandwidth, report.roofline.peak) else {
        return String::new();
    };
    let (bandwidth, peak) = (bandwidth / 1e9, peak / 1e9);
    let dots: Vec<Dot> = report.rows.iter().map(dot).collect();
    let svg = page::roofline(bandwidth, peak, &dots);
    format!(
        "<section><h2>The limits of this machine</h2><p>The grey line is the roofline: on the slope, memory sets the pace \
         ({bandwidth:.1} GB/s for {} threads); on the flat part, arithmetic does ({peak:.0} billion multiply-adds per second, the \
         fastest that any kernel reached here). Each dot is a winner: \
         <span class=\"key\" style=\"background:var(--one)\"></span>generating, \
         <span class=\"key\" style=\"background:var(--many)\"></span>prompts and batches. The nearer to the line, the less is left to \
         gain. Matrices that fit into a cache may lie above the slope.</p>{svg}</section>",
        report.threads
    )
}

fn winners(report: &Report) -> String {
    let mut table = String::from(
        "<div class=\"scroll\"><table><tr><th>matrix</th><th class=\"l\">columns n</th><th>time µs</th><th>GB/s</th><th>GMAC/s</th><th>of the roofline</th><th>× guess</th><th>× median</th><th>× worst</th></tr>",
    );
    for row in &report.rows {
        let percent = row.roofline_percent.map_or("–".to_owned(), |percent| format!("{percent:.0} %"));
        let guess = row.gain_over_guess.map_or("–".to_owned(), |gain| format!("{gain:.2}×"));
        let _ = write!(
            table,
            "<tr><td>{} × {}</td><td class=\"l\">{}</td><td>{:.1}</td><td>{:.1}</td><td>{:.0}</td><td>{percent}</td><td>{guess}</td><td>{:.2}×</td><td>{:.1}×</td></tr>",
            row.problem.m,
            row.problem.k,
            escape(row.class.name()),
            row.us,
            row.gb_per_s,
            row.gmac_per_s,
            row.gain_over_median,
            row.gain_over_worst
        );
    }
    table += "</table></div>";
    for remark in report.remarks() {
        let _ = write!(table, "<p class=\"soft\">{}</p>", escape(&remark));
    }
    format!(
        "<section><h2>The winners</h2><p>Times are medians of one product with the whole matrix. The last columns say how many times faster than the \
         guess, the median and the worst: the guess is what ternion would use without measuring; the median and the worst are over everything that was measured.</p>{table}</section>"
    )
}

fn shapes(report: &Report) -> String {
    let mut shapes: Vec<Problem> = report.rows.iter().map(|row| row.problem).collect();
    shapes.dedup();
    shapes.into_iter().map(|problem| shape(report, problem)).collect()
}

fn shape(report: &Report, problem: Problem) -> String {
    let Problem { m, k, count } = problem;
    let mut section = format!(
        "<section><h2>{m} × {k} <span class=\"soft\">· {count} in the model</span></h2><p>Every tick is one way to write the loop; \
         the further left, the faster. The filled dot is the one that was kept: it may not be the leftmost, since all \
         columns share one copy of the weights in one order.</p>"
    );
    for row in report.rows.iter().filter(|row| row.problem == problem) {
        section += &candidates(report, row);
        let lines = explain(&row.schedule, m, k).join("\n");
        let _ = write!(
            section,
            "<details><summary>What it does <code class=\"soft\">{}</code></summary><pre>{}</pre></details>",
            escape(&row.schedule.to_string()),
            escape(&lines)
        );
    }
    section + "</section>"
}

/// The candidates of one class on a line.
fn candidates(report: &Report, row: &Row) -> String {
    let Problem { m, k, .. } = row.problem;
    let times: Vec<f64> = report
        .trials
        .iter()
        .filter(|trial| (trial.m, trial.k, trial.class) == (m, k, row.class))
        .map(|trial| trial.us)
        .collect();
    let (low, high) = times.iter().fold((row.us, row.us * 1.5), |(low, high), us| (low.min(*us), high.max(*us)));
    let axis = Axis { low: low / 1.05, high: high * 1.05, from: 84.0, to: 900.0 };
    let class = if row.class == Class::One { "one" } else { "many" };
    let mut svg = format!(
        "<svg viewBox=\"0 0 960 44\" role=\"img\" aria-label=\"candidates\"><text x=\"4\" y=\"22\">n = {}</text><line x1=\"84\" y1=\"18\" x2=\"900\" y2=\"18\" stroke=\"var(--line)\"/>",
        escape(row.class.name())
    );
    // Of ticks at the same place, one: an exhaustive search has tens of thousands.
    let places: BTreeSet<i64> = times.iter().map(|us| (10.0 * axis.at(*us)) as i64).collect();
    for at in places.into_iter().map(|place| place as f64 / 10.0) {
        let _ = write!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"9\" x2=\"{at:.1}\" y2=\"27\" stroke=\"var(--soft)\" stroke-opacity=\".45\"/>"
        );
    }
    let speed = macs(m, k, row.class) / row.us * 1e-3;
    let _ = write!(
        svg,
        "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"18\" r=\"6\"><title>{:.1} µs, {speed:.0} GMAC/s</title></circle><text x=\"84\" y=\"41\">{low:.1} µs</text><text x=\"900\" y=\"41\" text-anchor=\"end\">{high:.1} µs</text></svg>",
        axis.at(row.us),
        row.us
    );
    svg
}

fn phases(report: &Report) -> String {
    let phases = [
        ("getting ready", report.phases.preparing),
        ("compiling and checking", report.phases.compiling),
        ("exploring", report.phases.exploring),
        ("final rounds", report.phases.racing),
    ];
    let total: f64 = phases.iter().map(|(_, time)| time.as_secs_f64()).sum::<f64>().max(1e-9);
    let mut bar = String::from("<div class=\"bar\">");
    let mut keys = String::new();
    for ((name, time), colour) in phases.into_iter().zip(PHASES) {
        let seconds = time.as_secs_f64();
        let _ = write!(bar, "<span style=\"width:{:.2}%;background:{colour}\"></span>", 100.0 * seconds / total);
        let _ = write!(keys, "<span class=\"key\" style=\"background:{colour}\"></span>{name} {seconds:.2} s");
    }
    format!(
        "<section><h2>Where the tuner's {:.1} s went</h2>{bar}</div><p class=\"soft\">{keys}</p></section>",
        report.spent_s
    )
}

fn warnings(report: &Report) -> String {
    if report.warnings.is_empty() {
        return String::new();
    }
    let lines: String = report.warnings.iter().map(|warning| format!("<li>{}</li>", escape(warning))).collect();
    format!("<section><h2>What went wrong</h2><ul>{lines}</ul></section>")
}
