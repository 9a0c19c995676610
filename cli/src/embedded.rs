//! The model inside the binary, so that the first command needs no download and no path.

use anyhow::Result;
use ternion_runtime::formats::{Bytes, Checkpoint, OpenOptions};

/// Name of the embedded model in messages.
pub(crate) const NAME: &str = "ternary-tales (embedded)";

/// Weights are read in vectors: the file must start where a vector may.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("../../assets/ternary-tales.tern"));

/// Opens it.
pub(crate) fn open(options: &OpenOptions) -> Result<Checkpoint> {
    Ok(Checkpoint::from_bytes(NAME, Bytes::from_static(&MODEL.0), options)?)
}
