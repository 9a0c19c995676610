//! What a kernel family is: a name, what it reads, which schedules of it are right, and its emitter.

use std::fmt;
use std::str::FromStr;

use super::{mad, sparse_columns, sparse_rows, t5, tl1, vlut};
use crate::machine::Machine;
use crate::schedule::ParseScheduleError;
use crate::{ActivationFormat, Columns, Cpu, KernelSpec, Layout, MachineKind, Schedule, ScheduleError};

/// The rules of a kernel family: everything that the rest of the compiler knows about it.
pub trait Rules: Sync {
    /// Its name in a schedule. Families of one name are one family.
    fn name(&self) -> &'static str;

    /// Whether it multiplies, so that [`Multiply`](crate::Multiply) says how, and it may prefetch.
    fn multiplies(&self) -> bool {
        false
    }

    /// What it is called with: `None` for one column and for many.
    fn list(&self) -> Option<Columns> {
        None
    }

    /// How the activations of one column must be laid out for it.
    fn activation_format(&self) -> ActivationFormat;

    /// Bytes of scratch memory, aligned to 64, that a call for `tiles` tiles needs.
    fn scratch_bytes(&self, _schedule: &Schedule, _tiles: usize) -> usize {
        0
    }

    /// Whether `schedule`, which the machine runs on `cpu` and whose `ntile` and `prefetch` are in range, computes the
    /// right thing: its layout, its parameters and the bounds of its sums. Registers are counted elsewhere.
    ///
    /// # Errors
    /// The first reason why not.
    fn check(&self, schedule: &Schedule, cpu: &Cpu) -> Result<(), ScheduleError>;

    /// The layouts that may pass [`check`](Self::check) on a machine.
    fn layouts(&self, machine: MachineKind) -> Vec<Layout>;

    /// The values of `unroll` that may.
    fn unrolls(&self) -> Vec<u8>;

    /// The values of `ntile` that may, for many columns.
    fn ntiles(&self, machine: MachineKind) -> Vec<u8>;

    /// Vector registers without which nothing of `schedule` can be emitted: cheap to tell, and never more than there
    /// really are in use.
    fn least_registers(&self, _schedule: &Schedule) -> usize {
        0
    }

    /// Emits the body of a kernel whose schedule [`Schedule::check`] has found legal.
    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule);
}

/// The idea behind a kernel: one of the [`Rules`], known by name.
#[derive(Clone, Copy)]
pub struct Family(&'static dyn Rules);

// Constants that stand where variants of an enum would: one row for each file of this directory.
#[allow(non_upper_case_globals)]
impl Family {
    /// Unpack two-bit codes, multiply-add bytes, subtract `Σa` once.
    pub const Mad: Self = Self(&mad::Mad);
    /// Two trits are an index into a table of their sums, looked up by byte shuffles.
    pub const Tl1: Self = Self(&tl1::Tl1);
    /// As [`Mad`](Self::Mad), with five trits in a byte.
    pub const T5: Self = Self(&t5::T5);
    /// For many columns at once: the weight byte is the row of a table of the sums of four activations.
    pub const Vlut: Self = Self(&vlut::Vlut);
    /// One column times the rows that a list names.
    pub const SparseRows: Self = Self(&sparse_rows::SparseRows);
    /// The weighted sum of the columns that a list names.
    pub const SparseColumns: Self = Self(&sparse_columns::SparseColumns);

    /// All families of this compiler.
    pub const ALL: [Self; 6] = [Self::Mad, Self::Tl1, Self::T5, Self::Vlut, Self::SparseRows, Self::SparseColumns];
}

impl Family {
    /// A family that is not the compiler's own. Its schedules are checked, compiled and compared with the reference as
    /// all others are; only [`FromStr`] does not know its name.
    ///
    /// # Safety
    /// For every schedule that [`Rules::check`] lets pass, the code that [`Rules::emit`] describes stays within the
    /// weights, activations, sums and results of its call and the scratch of [`Rules::scratch_bytes`], whatever bytes
    /// the weights are. Its results may be wrong: that is found before anyone sees them.
    #[must_use]
    pub const unsafe fn of(rules: &'static dyn Rules) -> Self {
        Self(rules)
    }

    /// Its rules.
    pub(crate) const fn rules(self) -> &'static dyn Rules {
        self.0
    }

    /// Its name in a schedule.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// The families that read whole matrices.
    pub fn dense() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|family| family.list().is_none())
    }

    /// What it is called with: `None` for one column and for many.
    #[must_use]
    pub fn list(self) -> Option<Columns> {
        self.0.list()
    }

    /// Whether it multiplies, so that [`Multiply`](crate::Multiply) says how.
    pub(crate) fn multiplies(self) -> bool {
        self.0.multiplies()
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.0.name() == other.0.name()
    }
}

impl Eq for Family {}

impl PartialOrd for Family {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Family {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.name().cmp(other.0.name())
    }
}

impl std::hash::Hash for Family {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.name().hash(state);
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name())
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name())
    }
}

impl FromStr for Family {
    type Err = ParseScheduleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|family| family.0.name() == text);
        known.ok_or_else(|| {
            let names = Self::ALL.map(|family| family.0.name()).join(", ");
            ParseScheduleError(format!("family `{text}`: expected one of {names}"))
        })
    }
}
