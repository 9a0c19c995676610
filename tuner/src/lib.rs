//! Probes the CPU and finds its fastest kernel schedules.
//!
//! [`probe`] says what this machine is. [`choose`] picks, for every shape of matrix that a model has, the schedules for
//! decoding and for prompts: remembered ones if this machine has been measured before, or else the winners of a race on
//! the caller's own threads, within a [`Budget`] of wall time. What a race finds is kept in a [`CacheDir`].
//!
//! A choice changes how fast a model runs and nothing else: every kernel that takes part has been checked against the
//! reference. Nothing here prints; what the user should know comes back as a [`Warning`].

mod bandwidth;
mod bench;
mod buffer;
mod choose;
mod class;
mod compare;
mod contest;
mod cost;
mod drift;
mod energy;
mod explore;
mod frontier;
mod held_out;
mod isolate;
mod journal;
mod linux;
mod load;
pub mod page;
mod probe;
mod product;
mod profile;
mod report;
mod request;
mod search;
mod seeds;
mod shipped;
mod shortlist;
mod space;
mod sparse;
mod stopwatch;
mod tried;
mod workers;

pub use bandwidth::{Streams, read};
pub use buffer::Buffer;
pub use choose::choose;
pub use class::{Choice, Class, Workload};
pub use compare::{Comparison, Gain, Which, compare, exhaustive_cost, gains, guess, known, profile_of};
pub use contest::Figures;
pub use isolate::{IsolationError, Order, choose_isolated, serve};
pub use probe::{Cache, Cores, CpuProfile, HugePages, Memory, probe};
pub use product::Product;
pub use profile::{CacheDir, MachineProfile, ProfileKey, Refusal, ShapeEntry, SparseEntry, Warning};
pub use report::{Report, Roofline, Row, explain};
pub use request::{
    Alternative, Budget, Choices, ClassResult, Effort, Found, Held, NoSchedule, Phase, Phases, Problem, Progress,
    Request, Source, Trial,
};
pub use sparse::{ListChoice, SparseChoice, SparseShape};
pub use stopwatch::{Stopwatch, SystemStopwatch};
pub use workers::{Workers, fill_shared, share};
