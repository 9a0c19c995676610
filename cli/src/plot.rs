//! The chart of `ternion eval --stats`: how much is zero, layer by layer, as SVG or as a page that needs nothing else.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use ternion_runtime::formats::Projection;

use crate::eval::{Statistics, table};
use crate::output;

/// Width and height in pixels.
const SIZE: (u32, u32) = (800, 480);

/// Writes the chart to a file whose name says which form it has.
pub(crate) fn write(path: &Path, model: &str, statistics: &Statistics) -> Result<()> {
    let chart = svg(statistics).map_err(|error| anyhow!("{} cannot be drawn: {error}", path.display()))?;
    let text = match path.extension().and_then(|extension| extension.to_str()) {
        Some("html") => page(model, &chart, statistics),
        _ => chart,
    };
    let mut file = output::create(path)?;
    file.write_all(text.as_bytes()).with_context(|| format!("{} cannot be written", path.display()))?;
    output::finish(file, path)
}

/// A line: its name, its colour and its value for each layer, in per cent.
type Line = (&'static str, RGBColor, Vec<f64>);

fn lines(statistics: &Statistics) -> Vec<Line> {
    let percent = |of: &dyn Fn(usize) -> Option<f64>| -> Option<Vec<f64>> {
        (0..statistics.layers.len()).map(|layer| of(layer).map(|fraction| fraction * 100.0)).collect()
    };
    let layers = &statistics.layers;
    let down = Projection::Down as usize;
    let candidates = [
        ("weights 0", RGBColor(31, 119, 180), percent(&|layer| Some(layers[layer].zero_weights_of_all))),
        ("gate ≤ 0", RGBColor(214, 39, 40), percent(&|layer| layers[layer].gate_not_positive)),
        (
            "down input 0 (int8)",
            RGBColor(44, 160, 44),
            percent(&|layer| layers[layer].zero_inputs.map(|zeros| zeros[down])),
        ),
    ];
    candidates.into_iter().filter_map(|(name, colour, values)| Some((name, colour, values?))).collect()
}

fn svg(statistics: &Statistics) -> Result<String, Box<dyn std::error::Error>> {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let last = statistics.layers.len().saturating_sub(1).max(1);
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0..last, 0.0..100.0)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("layer").y_desc("per cent").x_labels(16).y_label_formatter(&|y| format!("{y:.0}"));
    mesh.light_line_style(TRANSPARENT).bold_line_style(BLACK.mix(0.15)).draw()?;
    for (name, colour, values) in lines(statistics) {
        let points = values.into_iter().enumerate();
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    let mut labels = chart.configure_series_labels();
    labels.position(SeriesLabelPosition::LowerLeft).background_style(WHITE).border_style(BLACK).draw()?;
    area.present()?;
    drop(chart);
    drop(area);
    Ok(text)
}

fn page(model: &str, chart: &str, statistics: &Statistics) -> String {
    let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let (model, table) = (escape(model), escape(&table(statistics)));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{model}: zeros by layer</title>\n\
         <body style=\"font-family: sans-serif; max-width: 60em; margin: 2em auto\">\n<h1>{model}: zeros by layer</h1>\n\
         {chart}\n<pre>{table}</pre>\n</body>\n</html>\n"
    )
}
