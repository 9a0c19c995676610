//! A family that is not the compiler's own goes through the same checks as all others, and one that is wrong is refused
//! by name before anyone calls it.

use ternion_compiler::emit::{Rules, for_each_tile};
use ternion_compiler::machine::Machine;
use ternion_compiler::{
    ActivationFormat, Columns, CompileError, Cpu, Family, KernelSpec, Layout, MachineKind, Multiply, Schedule,
    ScheduleError, compile,
};

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
        vec![Layout::Lanes { rows: 4, group: 4 }, Layout::Lanes { rows: 16, group: 4 }]
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![1]
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        vec![1, 2]
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

fn naught() -> Family {
    // SAFETY: the code writes the rows of its tiles in every column and reads nothing.
    unsafe { Family::of(&Naught) }
}

#[test]
fn a_wrong_family_is_refused_by_name_in_every_schedule() {
    let cpu = Cpu::host().expect("tests run where ternion emits code");
    for columns in [Columns::One, Columns::Many] {
        let spec = KernelSpec { k: 100, columns };
        let space = Schedule::space_of(&[naught()], &spec, &cpu);
        assert!(space.iter().any(|schedule| schedule.machine == MachineKind::Clif128));
        for schedule in space {
            let error = compile(&[(spec, schedule)], &cpu).expect_err("wrong results");
            assert!(matches!(error, CompileError::Mismatch { .. }), "{error}");
            assert!(error.to_string().starts_with("naught/"), "{error}");
        }
    }
}

#[test]
fn its_layouts_and_parameters_are_checked_like_those_of_any_family() {
    let cpu = Cpu::host().expect("tests run where ternion emits code");
    let spec = KernelSpec { k: 100, columns: Columns::One };
    let machine = MachineKind::Clif128;
    let layout = Layout::Rows { rows: 4, chunk: 16 };
    let schedule =
        Schedule { family: naught(), machine, layout, multiply: Multiply::Pairs, unroll: 1, ntile: 1, prefetch: 0 };
    let refusal = |schedule: Schedule| schedule.check(&spec, &cpu).map_err(|error| error.to_string());
    assert_eq!(refusal(schedule), Err("naught cannot read layout rows4x16: it needs lanes<R>x4".to_owned()));
    let layout = Layout::Lanes { rows: 4, group: 4 };
    assert_eq!(refusal(Schedule { layout, ..schedule }), Ok(()));
    assert!(refusal(Schedule { layout, ntile: 2, ..schedule }).is_err());
    assert!(refusal(Schedule { layout, multiply: Multiply::Dot, ..schedule }).is_err());
}
