//! Writes a made-up model of a published shape as a prepared file: `synthesise PRESET OUT`.

use std::ops::ControlFlow;
use std::path::Path;

use ternion_compiler::Layout;
use ternion_runtime::formats::{Checkpoint, synth, tern};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [preset, output] = &arguments[..] else {
        eprintln!("usage: synthesise PRESET OUT");
        std::process::exit(2);
    };
    let model = Checkpoint::synthetic(synth::Recipe::preset(preset)?)?;
    let layout = |_, _, _, _| Layout::Canonical;
    let summary = tern::write(&model, Path::new(output), &layout, &mut |_, _| ControlFlow::Continue(()))?;
    println!("{output}: {} bytes, {} matrices, digest {:016x}", summary.bytes, summary.matrices, summary.digest);
    Ok(())
}
