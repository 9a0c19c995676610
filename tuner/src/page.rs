//! Pages that need nothing else: one file, no scripts, no references, charts in SVG, light and dark as the reader likes.

use std::fmt::Write as _;

/// What all pages look like.
const STYLE: &str = "
:root{--ink:#1c2330;--soft:#667085;--line:#e3e7ee;--page:#f6f7f9;--card:#fff;--one:#c2410c;--many:#1d4ed8;--roof:#94a3b8}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa4b5;--line:#313a4a;--page:#12161d;--card:#1a202a;--one:#fb923c;--many:#7aa2ff;--roof:#64748b}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 64px}h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:0 0 6px}
h3{font-size:15px;margin:18px 0 4px}p{margin:4px 0 12px;max-width:78ch}.soft{color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:18px 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 9px;border-bottom:1px solid var(--line);white-space:nowrap}th{color:var(--soft);font-weight:600}
th:first-child,td:first-child,td.l,th.l{text-align:left}code,pre{font:12.5px/1.5 ui-monospace,monospace}
pre{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-x:auto;margin:6px 0 0}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.one{fill:var(--one)}.many{fill:var(--many)}details{margin:8px 0}summary{cursor:pointer}
.bar{display:flex;height:26px;border-radius:6px;overflow:hidden;margin:8px 0}.bar span{display:block}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 6px 0 14px;vertical-align:-1px}.key:first-child{margin-left:0}";

/// A whole page with this title and this body.
#[must_use]
pub fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>{}</title>\
         <style>{STYLE}</style></head><body><main>{body}</main></body></html>\n",
        escape(title)
    )
}

/// Text as it may stand in an element or an attribute.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Chart coordinates of a logarithmic axis.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    /// The value at `from`.
    pub low: f64,
    /// The value at `to`.
    pub high: f64,
    /// Where the axis starts.
    pub from: f64,
    /// Where it ends.
    pub to: f64,
}

impl Axis {
    /// Where a value lies; one beyond an end lies at it.
    #[must_use]
    pub fn at(&self, value: f64) -> f64 {
        let part = (value.max(self.low).ln() - self.low.ln()) / (self.high.ln() - self.low.ln());
        self.from + part.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// 1, 10, 100 … within the axis.
    pub fn decades(&self) -> impl Iterator<Item = f64> + use<> {
        let (low, high) = (self.low.log10().ceil() as i32, self.high.log10().floor() as i32);
        (low..=high).map(|power| 10f64.powi(power))
    }
}

/// A kernel on a [`roofline`].
#[derive(Clone, Debug)]
pub struct Dot {
    /// `one` or `many` columns, which is its colour.
    pub class: &'static str,
    /// Multiply-adds per byte of weights that is read.
    pub intensity: f64,
    /// Billion multiply-adds per second.
    pub speed: f64,
    /// What it says when pointed at.
    pub title: String,
}

/// The roofline of a machine that reads `bandwidth` GB/s and does `peak` billion multiply-adds per second, as SVG.
#[must_use]
pub fn roofline(bandwidth: f64, peak: f64, dots: &[Dot]) -> String {
    let x = Axis { low: 2.0, high: 2000.0, from: 64.0, to: 940.0 };
    let slowest = dots.iter().map(|dot| dot.speed).fold(peak / 20.0, f64::min);
    let y = Axis { low: slowest / 1.5, high: peak * 1.8, from: 340.0, to: 16.0 };
    let mut svg = String::from("<svg viewBox=\"0 0 960 390\" role=\"img\" aria-label=\"roofline\">");
    for value in x.decades() {
        let at = x.at(value);
        let _ = write!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"16\" x2=\"{at:.1}\" y2=\"340\" stroke=\"var(--line)\"/><text x=\"{at:.1}\" y=\"358\" text-anchor=\"middle\">{value}</text>"
        );
    }
    for value in y.decades() {
        let at = y.at(value);
        let _ = write!(
            svg,
            "<line x1=\"64\" y1=\"{at:.1}\" x2=\"940\" y2=\"{at:.1}\" stroke=\"var(--line)\"/><text x=\"56\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
            at + 4.0
        );
    }
    let knee = peak / bandwidth;
    let _ = write!(
        svg,
        "<polyline fill=\"none\" stroke=\"var(--roof)\" stroke-width=\"3\" points=\"{:.1},{:.1} {:.1},{:.1} {:.1},{:.1}\"/>",
        x.at(x.low.max(y.low / bandwidth)),
        y.at((x.low * bandwidth).max(y.low)),
        x.at(knee),
        y.at(peak),
        x.at(x.high),
        y.at(peak)
    );
    for dot in dots {
        let _ = write!(
            svg,
            "<circle class=\"{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\" fill-opacity=\".8\"><title>{}</title></circle>",
            dot.class,
            x.at(dot.intensity),
            y.at(dot.speed),
            escape(&dot.title)
        );
    }
    svg + "<text x=\"502\" y=\"382\" text-anchor=\"middle\">multiply-adds per byte of weights that is read</text><text x=\"64\" y=\"12\">billion multiply-adds per second</text></svg>"
}
