//! Makes a prepared file with canonical layouts from any model: `prepare SRC OUT`.

use std::ops::ControlFlow;
use std::path::Path;

use ternion_compiler::Layout;
use ternion_runtime::formats::{Checkpoint, FormatError, tern};

fn main() -> Result<(), FormatError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, output] = &arguments[..] else {
        eprintln!("usage: prepare SRC OUT");
        std::process::exit(2);
    };
    let model = Checkpoint::open(Path::new(source))?;
    let layout = |_, _, _, _| Layout::Canonical;
    let summary = tern::write(&model, Path::new(output), &layout, &mut |_, _| ControlFlow::Continue(()))?;
    println!("{output}: {} bytes, {} matrices, digest {:016x}", summary.bytes, summary.matrices, summary.digest);
    Ok(())
}
