//! A laboratory for kernels: which there are, what they look like as code, how fast they are, and what limits them.
//!
//! Nothing here knows a family. What can be listed, emitted and measured comes from the compiler's tables and from
//! [`Schedule::check`](ternion_compiler::Schedule::check), so a new family appears here without a change.

#![forbid(unsafe_code)]

mod bench;
mod case;
mod catalogue;
mod emit;
mod entrant;
mod filter;
mod log;
mod plot;
mod report;
mod row;
mod shape;
mod sweep;

pub use bench::{Bench, BenchError, Limits, Samples};
pub use case::{Case, Weights, spec};
pub use catalogue::{Entry, catalogue};
pub use emit::{EmitError, Form, choose, emit, emit_step};
pub use entrant::Entrant;
pub use filter::{Condition, Filter, Parameter, ParseConditionError};
pub use log::{Log, LogError};
pub use plot::{Axes, plot};
pub use report::{Finding, Report};
pub use row::{Key, Row, cpu_name, table};
pub use shape::{ParseShapeError, Shape};
pub use sweep::{Done, Sweep};
