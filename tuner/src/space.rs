//! What there is to search.

use ternion_compiler::{Cpu, KernelSpec, Schedule};

/// Every schedule that is legal for `spec` on `cpu` and worth a trial.
pub(crate) fn legal(spec: &KernelSpec, cpu: &Cpu) -> Vec<Schedule> {
    Schedule::candidates(spec, cpu)
}
