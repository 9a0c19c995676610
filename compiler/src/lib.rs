//! Ternary matrix kernels, compiled to machine code at load time.
//!
//! A kernel is data: a [`KernelSpec`] says what it computes, a [`Schedule`] how, and [`compile`] turns the two into
//! machine code for a [`Cpu`], checked against `kernels-ref` before anyone gets to call it. Weights lie in memory in a
//! [`Layout`], activations in an [`ActivationFormat`]; both follow from the schedule.
//!
//! Emitters ([`emit`]) are written over the few operations of [`machine::Machine`] and know no instruction set.

pub mod activations;
mod candidates;
pub mod check;
pub mod compile;
pub mod emit;
pub mod harness;
pub mod kernel;
pub mod layout;
pub mod listed;
pub mod machine;
pub mod object;
pub mod schedule;
mod space;
pub mod spec;
pub mod target;

pub use activations::ActivationFormat;
pub use compile::{CompileError, asm_text, clif_text, code_bytes, compile, compile_each};
pub use emit::Family;
pub use kernel::{Activations, Kernel, OutRows};
pub use layout::Layout;
pub use listed::RecordList;
pub use object::object;
pub use schedule::{MachineKind, Multiply, Schedule, ScheduleError};
pub use spec::{Columns, KernelSpec};
pub use target::{Arch, Cpu, Feature};

/// Version and source hash of this compiler. It changes whenever the same schedule may compile to other code, so that
/// measured choices are not trusted across such a change.
pub const FINGERPRINT: &str = concat!(env!("CARGO_PKG_VERSION"), "-", env!("TERNION_COMPILER_FINGERPRINT"));
