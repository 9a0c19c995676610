//! A laboratory for kernels: which there are, and what they look like as code.
//!
//! Nothing here knows a family. What can be listed and emitted comes from the compiler's tables and from
//! [`Schedule::check`](ternion_compiler::Schedule::check), so a new family appears here without a change.

#![forbid(unsafe_code)]

mod catalogue;
mod emit;
mod shape;

pub use catalogue::{Entry, catalogue, spec};
pub use emit::{EmitError, Form, choose, emit};
pub use shape::{ParseShapeError, Shape};
