//! Kernel families, one file each, written once over the [`Machine`](crate::machine::Machine).

mod mad;
pub(crate) mod tl1;

use crate::machine::Machine;
use crate::{Family, KernelSpec, Schedule};

/// Emits the body of the kernel for a schedule that [`Schedule::check`] has found legal.
pub(crate) fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    match schedule.family {
        Family::Mad => mad::emit(m, spec, schedule),
        Family::Tl1 => tl1::emit(m, spec, schedule),
    }
}
