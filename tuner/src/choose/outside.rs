//! A family that is not the compiler's own and computes something wrong: a search with real kernels rejects it by name.

use std::time::Duration;

use ternion_compiler::emit::{Rules, for_each_tile};
use ternion_compiler::machine::Machine;
use ternion_compiler::{ActivationFormat, Cpu, Family, KernelSpec, Layout, MachineKind, Schedule, ScheduleError};

use super::*;
use crate::profile::tests::key;
use crate::request::Budget;
use crate::workers::test_team::Scoped;
use crate::{CacheDir, Class, SystemStopwatch};

/// Says that every product is 0.
struct Naught;

impl Rules for Naught {
    fn name(&self) -> &'static str {
        "naught"
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::Planes
    }

    fn check(&self, schedule: &Schedule, _: &Cpu) -> Result<(), ScheduleError> {
        match schedule.layout {
            Layout::Lanes { rows, group: 4 } => schedule.check_width(4 * usize::from(rows)),
            _ => Err(schedule.layout_error("lanes<R>x4")),
        }
    }

    fn layouts(&self, _: MachineKind) -> Vec<Layout> {
        vec![Layout::Lanes { rows: 16, group: 4 }]
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![1]
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        vec![1]
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        let (tile_bytes, width) = (4 * schedule.layout.tile_rows(), m.vector_bytes());
        for_each_tile(m, spec, schedule, |m, tile| {
            tile.for_each_column(m, |m, _, out| {
                let zero = m.zero();
                for at in (0..tile_bytes).step_by(width) {
                    m.store(out, at as i32, zero);
                }
            });
        });
    }
}

#[test]
fn a_wrong_family_is_rejected_by_name_with_the_seed_and_remembered() {
    // SAFETY: the code writes the rows of its tiles in every column and reads nothing.
    let naught = unsafe { Family::of(&Naught) };
    let families = [Family::Tl1, naught];
    let cpu = Cpu::host().expect("tests run where ternion emits code");
    let stopwatch = SystemStopwatch::start();
    // Far more time than it takes: it ends when nothing is left to try.
    let request = Request::new(vec![Problem { m: 48, k: 96, count: 1 }], Budget::search(Duration::from_secs(120)));
    let search = Search {
        cpu: &cpu,
        request: &request,
        families: &families,
        stopwatch: &stopwatch,
        progress: &|_| {},
        threads: 1,
        batch: 2,
        meter: None,
        note: &|_| {},
    };
    let unknown = MachineProfile::new(key());
    let mut found = look_up(&search, &probe(), &unknown).unwrap();
    let team = Scoped(1);
    let buffer = Buffer::of_codes(1 << 16, 1 << 13, &team, || false).unwrap();
    let mut bench = KernelBench::new(cpu, &team, &stopwatch, buffer);
    let mut news = MachineProfile::new(key());
    let outcome = search.race_all(&mut found, &unknown, &mut bench, &mut news, &[]);

    assert_eq!(found[0].source, Source::Raced);
    assert!(Class::ALL.iter().all(|class| found[0].choice.of(*class).family != naught));
    let named: Vec<String> = outcome.warnings.iter().map(ToString::to_string).collect();
    assert!(!named.is_empty() && named.iter().all(|warning| warning.contains("naught/")), "{named:?}");
    assert!(named.iter().all(|warning| warning.contains("seed")), "{named:?}");
    assert!(news.refused.iter().all(|refusal| refusal.schedule.starts_with("naught/")));

    // What doctor reads, with and without the family at hand.
    let directory = tempfile::tempdir().unwrap();
    let cache = CacheDir::at(directory.path());
    cache.remember(&news).unwrap();
    let (known, warnings) = cache.load(&key(), &cpu);
    assert_eq!((&known.refused, warnings.as_slice()), (&news.refused, &[][..]));
    assert!(known.refused.iter().any(|refusal| refusal.reason.contains("seed")));
    // And it never runs again.
    let again = search.race_all(&mut found, &known, &mut bench, &mut MachineProfile::new(key()), &[]);
    assert!(again.warnings.is_empty(), "{:?}", again.warnings);
}
