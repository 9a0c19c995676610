//! Fingerprints the compiler's own sources, so that measured choices are not trusted after any of them has changed.

use std::hash::{DefaultHasher, Hasher};
use std::path::Path;

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=src");
    let mut sources = Vec::new();
    collect(Path::new("src"), &mut sources)?;
    sources.sort();
    let mut hasher = DefaultHasher::new();
    for source in sources {
        hasher.write(&std::fs::read(source)?);
    }
    println!("cargo::rustc-env=TERNION_COMPILER_FINGERPRINT={:016x}", hasher.finish());
    Ok(())
}

fn collect(directory: &Path, sources: &mut Vec<std::path::PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, sources)?;
        } else {
            sources.push(path);
        }
    }
    Ok(())
}
