//! Names of kernels for profilers: the perf map.
//!
//! A profiler that meets an address in memory which no file was mapped to looks into `/tmp/perf-PID.map`: one line for
//! each function, its address and its bytes in hexadecimal, and its name. perf reads it, and so do others. With
//! `TERNION_PERF_MAP=1` in its environment, a process writes a line there for every kernel that it places in memory.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::{KernelSpec, Schedule};

/// The variable that asks for the map.
const VARIABLE: &str = "TERNION_PERF_MAP";

/// Adds functions that were placed in memory to the map, if it is asked for.
///
/// # Errors
/// If it is asked for and cannot be written.
pub(crate) fn name(functions: impl Iterator<Item = (String, *const u8, usize)>) -> Result<(), String> {
    static MAP: Mutex<Option<File>> = Mutex::new(None);
    if std::env::var_os(VARIABLE).is_none_or(|value| value.is_empty() || value == "0") {
        return Ok(());
    }
    let path = format!("/tmp/perf-{}.map", std::process::id());
    let mut map = MAP.lock().unwrap_or_else(PoisonError::into_inner);
    let file = match &mut *map {
        Some(file) => Ok(file),
        none => create(Path::new(&path)).map(|file| none.insert(file)),
    };
    // In one write, so that whoever reads meanwhile finds whole lines.
    let written = file.and_then(|file| file.write_all(lines(functions).as_bytes()));
    written.map_err(|error| format!("{path}, which {VARIABLE} asks for, cannot be written: {error}"))
}

/// A new file. One that an earlier process of this number has left behind is removed; nothing is followed to elsewhere.
fn create(path: &Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create_new(true).open(path)
}

fn lines(functions: impl Iterator<Item = (String, *const u8, usize)>) -> String {
    let mut lines = String::new();
    for (symbol, address, bytes) in functions {
        writeln!(lines, "{:x} {bytes:x} {symbol}", address.addr()).expect("a string takes everything");
    }
    lines
}

/// The name of a kernel, without spaces: `ternion::mad_k6912_n1_avx512_lanes16x4_dot_unroll2_ntile1`.
pub(crate) fn symbol(spec: &KernelSpec, schedule: &Schedule) -> String {
    let (spec, schedule_line) = (spec.to_string(), schedule.to_string());
    // The first word of a spec says what all of them say; that of a schedule is taken apart.
    let words = spec.split(' ').skip(1).map(str::to_owned);
    let parameters = schedule_line.split(' ').skip(1).map(str::to_owned);
    let words = words.chain([schedule.machine.to_string()]).chain(parameters).map(|word| match word.split_once('=') {
        Some(("layout" | "multiply", value)) => value.to_owned(),
        _ => word.replace('=', ""),
    });
    format!("ternion::{}_{}", schedule.family, words.collect::<Vec<_>>().join("_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbol_is_one_word_that_says_what_and_how() {
        let spec: KernelSpec = "ternary-gemm k=6912 n=1".parse().unwrap();
        let schedule = "mad/avx512 layout=lanes16x4 multiply=dot unroll=2 ntile=1 prefetch=4096".parse().unwrap();
        let expected = "ternion::mad_k6912_n1_avx512_lanes16x4_dot_unroll2_ntile1_prefetch4096";
        assert_eq!(symbol(&spec, &schedule), expected);
        let spec: KernelSpec = "ternary-gemm k=2560 n=1 rows=listed".parse().unwrap();
        let schedule = "sparse-rows/avx2 layout=rows1x64 multiply=pairs unroll=2 ntile=1".parse().unwrap();
        let expected = "ternion::sparse-rows_k2560_n1_rowslisted_avx2_rows1x64_pairs_unroll2_ntile1";
        assert_eq!(symbol(&spec, &schedule), expected);
    }

    #[test]
    fn a_map_is_a_line_of_address_bytes_and_name_for_each_function() {
        let spec: KernelSpec = "ternary-gemm k=64 n=many".parse().unwrap();
        let schedule: Schedule = "tl1/clif128 layout=lanes16 unroll=2 ntile=1".parse().unwrap();
        let function = || (symbol(&spec, &schedule), std::ptr::without_provenance(0x7f00_1234), 0x1a0);
        let line = "7f001234 1a0 ternion::tl1_k64_nmany_clif128_lanes16_unroll2_ntile1\n";
        assert_eq!(lines([function(), function()].into_iter()), line.repeat(2));
    }
}
