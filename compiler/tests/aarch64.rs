//! The aarch64 kernels, executed: compiled to object files on whatever machine this is, linked with a small C driver and
//! run under `qemu-aarch64` between guard pages.
//!
//! Needs `aarch64-linux-gnu-gcc` and `qemu-aarch64` (Debian: gcc-aarch64-linux-gnu, qemu-user). Without them the
//! test says so and passes, unless `TERNION_REQUIRE_AARCH64=1` is set.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use ternion_compiler::harness::{Data, FloatData, FloatRow, Problem};
use ternion_compiler::listed::GROUP;
use ternion_compiler::{
    ActivationFormat, Columns, Cpu, KernelSpec, Layout, MachineKind, Multiply, RecordList, Schedule, Step, StepSpec,
    object, step_object,
};
use ternion_kernels_ref::{QuantizedRow, gemm};

const COMPILER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";

/// Row lengths: one weight byte, tails of every kind, and beyond all flushes of 16-bit sums.
const ROW_LENGTHS: [usize; 6] = [4, 36, 100, 260, 1028, 2600];

/// Rows of the matrices: whole tiles of every layout and a tail.
const M: usize = 69;

fn cpu(text: &str) -> Cpu {
    text.parse().unwrap()
}

/// Whether `program` can be started.
fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Whether the tools are there; complains if they have to be.
fn tools() -> bool {
    let missing: Vec<_> = [COMPILER, EMULATOR].into_iter().filter(|program| !has(program)).collect();
    if missing.is_empty() {
        return true;
    }
    let required = std::env::var("TERNION_REQUIRE_AARCH64").is_ok_and(|value| value == "1");
    assert!(!required, "TERNION_REQUIRE_AARCH64=1, but there is no {}", missing.join(" and no "));
    eprintln!("skipped: aarch64 kernels were not run, there is no {}", missing.join(" and no "));
    false
}

/// All candidates for `cpu` that `without` cannot have, for all row lengths.
fn candidates(cpu: &Cpu, without: Option<&Cpu>) -> Vec<(KernelSpec, Schedule)> {
    let all = [Columns::One, Columns::Many, Columns::ListedRows, Columns::ListedColumns];
    let specs = ROW_LENGTHS.into_iter().flat_map(|k| all.map(|columns| KernelSpec { k, columns }));
    specs
        .flat_map(|spec| Schedule::candidates(&spec, cpu).into_iter().map(move |schedule| (spec, schedule)))
        .filter(|(spec, schedule)| without.is_none_or(|lesser| schedule.check(spec, lesser).is_err()))
        .collect()
}

#[test]
fn kernels_for_plain_aarch64_agree_with_the_reference() {
    // The oldest core there is: it would not know an instruction that the kernels may not use.
    run("aarch64", "cortex-a53", &candidates(&cpu("aarch64"), None));
}

#[test]
fn kernels_for_aarch64_with_dot_products_agree_with_the_reference() {
    let jobs = candidates(&cpu("aarch64 +dotprod"), Some(&cpu("aarch64")));
    assert!(jobs.iter().all(|(_, schedule)| schedule.multiply == Multiply::Dot) && !jobs.is_empty());
    run("aarch64 +dotprod", "neoverse-n1", &jobs);
}

#[test]
fn dot_products_change_only_the_schedules_that_ask_for_them() {
    let spec = KernelSpec { k: 260, columns: Columns::One };
    let jobs: Vec<_> = Schedule::candidates(&spec, &cpu("aarch64"))
        .into_iter()
        .enumerate()
        .map(|(i, schedule)| (spec, schedule, format!("kernel{i}")))
        .collect();
    let jobs: Vec<_> = jobs.iter().map(|(spec, schedule, symbol)| (*spec, *schedule, symbol.as_str())).collect();
    assert_eq!(object(&jobs, &cpu("aarch64")), object(&jobs, &cpu("aarch64 +dotprod")));
}

#[test]
fn multiplications_become_the_instructions_that_are_meant_for_them() {
    // Vd.4s, Vn.16b, Vm.16b; and smull/smull2 Vd.8h from bytes.
    let count = |words: &[u8], mask, bits| {
        let words = words.as_chunks::<4>().0;
        words.iter().filter(|word| u32::from_le_bytes(**word) & mask == bits).count()
    };
    let sdot = |file: &[u8]| count(file, 0xffe0_fc00, 0x4e80_9400);
    let smull = |file: &[u8]| count(file, 0xbfe0_fc00, 0x0e20_c000);
    for spec in [Columns::One, Columns::Many].map(|columns| KernelSpec { k: 260, columns }) {
        for (text, name) in [("aarch64 +dotprod", "multiply=dot"), ("aarch64", "multiply=pairs")] {
            for schedule in Schedule::candidates(&spec, &cpu(text)) {
                let file = object(&[(spec, schedule, "kernel")], &cpu(text)).unwrap();
                let found = (sdot(&file) > 0, smull(&file) > 0);
                match schedule.to_string() {
                    line if line.contains("multiply=dot") => assert_eq!(found, (true, false), "{line}"),
                    line if line.contains("multiply=pairs") => assert_eq!(found, (false, true), "{line}"),
                    line => assert_eq!(found, (false, false), "{line}"),
                }
            }
            assert!(Schedule::candidates(&spec, &cpu(text)).iter().any(|s| s.to_string().contains(name)));
        }
    }
}

#[test]
fn steps_on_activations_for_aarch64_agree_with_the_reference() {
    let cpu = cpu("aarch64");
    // Besides, rows that end within a vector.
    let specs = ROW_LENGTHS.into_iter().chain([1, 15, 67, 321]);
    let specs: Vec<_> = specs.flat_map(|k| Step::all().map(move |step| StepSpec { step, k })).collect();
    let jobs: Vec<_> = specs.iter().map(|spec| (*spec, spec.machine(&cpu).unwrap())).collect();
    assert!(jobs.iter().all(|(_, machine)| *machine == MachineKind::Clif128));
    let symbols: Vec<_> = (0..jobs.len()).map(|i| format!("step{i}")).collect();
    let named: Vec<_> =
        jobs.iter().zip(&symbols).map(|((spec, machine), symbol)| (*spec, *machine, symbol.as_str())).collect();
    let names = specs.iter().zip(&symbols).map(|(spec, symbol)| (symbol.as_str(), spec.to_string()));
    let object = step_object(&named, &cpu).unwrap();
    drive("aarch64-steps", "cortex-a53", &object, &table(names), &step_vectors(&specs));
}

/// Compiles `jobs` for `target` and runs them on an emulated `core`.
fn run(target: &str, core: &str, jobs: &[(KernelSpec, Schedule)]) {
    let symbols: Vec<_> = (0..jobs.len()).map(|i| format!("kernel{i}")).collect();
    let named: Vec<_> =
        jobs.iter().zip(&symbols).map(|((spec, schedule), symbol)| (*spec, *schedule, symbol.as_str())).collect();
    let names = named.iter().map(|(spec, schedule, symbol)| (*symbol, format!("{schedule}; {spec}")));
    let object = object(&named, &cpu(target)).unwrap();
    drive(&target.replace(" +", "-"), core, &object, &table(names), &vectors(jobs));
}

/// Links an object file with its table and the driver, and runs it on its vectors on an emulated `core`.
fn drive(name: &str, core: &str, object: &[u8], table: &str, vectors: &[u8]) {
    if !tools() {
        return;
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&directory).unwrap();
    let file = |name: &str| directory.join(name);
    std::fs::write(file("kernels.o"), object).unwrap();
    std::fs::write(file("table.c"), table).unwrap();
    std::fs::write(file("vectors"), vectors).unwrap();

    let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/aarch64/driver.c");
    let linked = Command::new(COMPILER)
        .args(["-static", "-O1", "-Wall", "-Werror", "-o"])
        .args([file("driver"), driver, file("table.c"), file("kernels.o")])
        .output()
        .unwrap();
    assert!(linked.status.success(), "{}", String::from_utf8_lossy(&linked.stderr));
    let output = Command::new(EMULATOR).args(["-cpu", core]).args([file("driver"), file("vectors")]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{name}: {said}{}", String::from_utf8_lossy(&output.stderr));
    println!("{name}: {said}");
}

/// The C table of kernels, by symbol and name, that the driver declares.
fn table<'a>(kernels: impl Iterator<Item = (&'a str, String)>) -> String {
    let (mut declarations, mut rows) = (String::new(), String::new());
    for (symbol, name) in kernels {
        writeln!(declarations, "void {symbol}(const void *);").unwrap();
        writeln!(rows, "    {{{symbol}, \"{name}\"}},").unwrap();
    }
    format!(
        "struct kernel {{ void (*run)(const void *); const char *name; }};\n{declarations}\
         const struct kernel kernels[] = {{\n{rows}}};\n"
    )
}

/// Words of a case, `struct vector` of the driver.
const CASE_WORDS: usize = 18;

/// What every kernel runs on: three problems each, so that all kinds of data are met by all kinds of kernels.
fn vectors(jobs: &[(KernelSpec, Schedule)]) -> Vec<u8> {
    let mut data = Blobs { start: 8 + jobs.len() * 3 * CASE_WORDS * 8, bytes: Vec::new(), places: BTreeMap::new() };
    let mut problems: BTreeMap<(usize, Data), Problem> = BTreeMap::new();
    let mut cases: Vec<u64> = Vec::new();
    for (kernel, (spec, schedule)) in jobs.iter().enumerate() {
        for kind in [Data::Random, Data::ALL[1 + kernel % 8], Data::ALL[1 + (kernel + 3) % 8]] {
            let k = spec.k;
            if spec.columns.are_listed() {
                cases.extend(listed_case(&mut data, kernel, *spec, *schedule, kind).map(|word| word as u64));
                continue;
            }
            let problem = problems.entry((k, kind)).or_insert_with(|| Problem::new(kind, M, k, 17, k as u64));
            let n = if spec.columns == Columns::One { 1 } else { usize::from(schedule.ntile) + 1 };
            assert!(n <= problem.columns().len());
            let (layout, format) = (schedule.layout, schedule.activation_format());
            let rows = layout.tiles(M) * layout.tile_rows();
            let stride = format.bytes(k);
            let key = |what| Key { k, kind, what };
            let name = data.place(key(What::Name), || problem.to_string().into_bytes());
            let weights = data.place(key(What::Weights(layout)), || problem.pack(layout));
            let activations = data.place(key(What::Activations(format)), || {
                let mut bytes = vec![0xa5; problem.columns().len() * stride];
                for (column, target) in problem.columns().iter().zip(bytes.chunks_exact_mut(stride)) {
                    format.prepare(column.values(), target);
                }
                bytes
            });
            let sums = data.place(key(What::Sums), || {
                problem.columns().iter().flat_map(|column| column.sum().to_le_bytes()).collect()
            });
            let expected = problem.expected().map_or(0, |expected| {
                data.place(key(What::Expected), || expected.iter().flat_map(|sum| sum.to_le_bytes()).collect()).0
            });
            let case: [usize; CASE_WORDS] = [
                kernel,
                name.0,
                name.1,
                weights.0,
                weights.1,
                layout.tiles(M),
                activations.0,
                n * stride,
                stride,
                sums.0,
                n,
                expected,
                M,
                rows,
                rows + 5,
                schedule.scratch_bytes(layout.tiles(M)).next_multiple_of(64),
                0,
                0,
            ];
            cases.extend(case.map(|word| word as u64));
        }
    }
    data.file(&cases)
}

/// Every step on floats of every kind, as cases without tiles: a column of results in 32-bit words, then scale and sum.
fn step_vectors(specs: &[StepSpec]) -> Vec<u8> {
    let start = 8 + specs.len() * FloatData::ALL.len() * CASE_WORDS * 8;
    let mut data = Blobs { start, bytes: Vec::new(), places: BTreeMap::new() };
    let mut cases: Vec<u64> = Vec::new();
    for (kernel, StepSpec { step, k }) in specs.iter().enumerate() {
        for (kind, seed) in FloatData::ALL.into_iter().zip(kernel as u64..) {
            let row = FloatRow::new(kind, *k, seed);
            let (mut expected, quantised) = row.expected(*step);
            // What nobody writes keeps its poison.
            let result = quantised.map_or([0xa5a5_a5a5; 2], |of| [of.q.to_bits(), of.sum.cast_unsigned()]);
            expected.extend(result.iter().flat_map(|word| word.to_le_bytes()));
            let words = expected.len() / 4;
            let name = data.add(row.to_string().into_bytes());
            let input = data.add(row.input(*step));
            let weights = data.add(row.weights().iter().flat_map(|weight| weight.to_le_bytes()).collect());
            let epsilon = data.add(row.epsilon().to_le_bytes().to_vec());
            let expected = data.add(expected);
            let case: [usize; CASE_WORDS] = [
                kernel,
                name.0,
                name.1,
                weights.0,
                weights.1,
                0,
                input.0,
                input.1,
                input.1,
                epsilon.0,
                1,
                expected.0,
                words,
                words,
                words,
                StepSpec::SCRATCH,
                0,
                0,
            ];
            cases.extend(case.map(|word| word as u64));
        }
    }
    data.file(&cases)
}

/// A case of a kernel that reads a list: every record but each third.
fn listed_case(
    data: &mut Blobs,
    kernel: usize,
    spec: KernelSpec,
    schedule: Schedule,
    kind: Data,
) -> [usize; CASE_WORDS] {
    let (layout, k) = (schedule.layout, spec.k);
    let by_rows = spec.columns == Columns::ListedRows;
    let problem = if by_rows { Problem::new(kind, M, k, 1, k as u64) } else { Problem::new(kind, k, M, 1, k as u64) };
    let column = &problem.columns()[0];
    let listed: Vec<usize> = (0..M).filter(|i| i % 3 != 1).collect();
    let factor = |i: usize| if by_rows { 0 } else { column.values()[i] };
    let mut list = RecordList::default();
    list.fill(listed.iter().map(|i| ((i * layout.row_bytes(k)) as u32, factor(*i))));

    let (weights, activations, sum) = if by_rows {
        let format = schedule.activation_format();
        let mut bytes = vec![0; format.bytes(k)];
        format.prepare(column.values(), &mut bytes);
        (problem.pack(layout), bytes, column.sum())
    } else {
        let factors: Vec<_> = list.factors().iter().map(|factor| factor.cast_unsigned()).collect();
        let sum = list.factors().iter().map(|factor| i32::from(*factor)).sum();
        (problem.pack_transposed(layout), factors, sum)
    };
    let places = list.groups() * GROUP;
    let expected: Vec<i32> = match problem.expected() {
        None => Vec::new(),
        Some(all) if by_rows => listed.iter().map(|row| all[*row]).collect(),
        Some(_) => {
            let mut values = vec![0; M];
            listed.iter().for_each(|i| values[*i] = column.values()[*i]);
            gemm::gemm(problem.weights(), &[QuantizedRow::from_values(values).unwrap()])
        }
    };
    let rows = if by_rows { places } else { 4 * layout.row_bytes(k) };
    let name = data.add(problem.to_string().into_bytes());
    let (weights, activations) = (data.add(weights), data.add(activations));
    let sum = data.add(i32::to_le_bytes(sum).to_vec());
    let offsets = data.add(list.offsets().iter().flat_map(|offset| offset.to_le_bytes()).collect());
    let compared = expected.len();
    let expected = data.add(expected.iter().flat_map(|sum| sum.to_le_bytes()).collect());
    [
        kernel,
        name.0,
        name.1,
        weights.0,
        weights.1,
        places,
        activations.0,
        activations.1,
        activations.1,
        sum.0,
        1,
        if compared == 0 { 0 } else { expected.0 },
        compared,
        rows,
        rows,
        0,
        offsets.0,
        offsets.1,
    ]
}

/// Bytes of the file that several cases share.
struct Blobs {
    start: usize,
    bytes: Vec<u8>,
    places: BTreeMap<Key, (usize, usize)>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    k: usize,
    kind: Data,
    what: What,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Name,
    Weights(Layout),
    Activations(ActivationFormat),
    Sums,
    Expected,
}

impl Blobs {
    /// Offset in the file and number of bytes of what `key` stands for.
    fn place(&mut self, key: Key, bytes: impl FnOnce() -> Vec<u8>) -> (usize, usize) {
        if let Some(place) = self.places.get(&key) {
            return *place;
        }
        let place = self.add(bytes());
        self.places.insert(key, place);
        place
    }

    /// The file: the number of cases, their words, and the bytes.
    fn file(self, cases: &[u64]) -> Vec<u8> {
        let count = (cases.len() / CASE_WORDS) as u64;
        let mut file: Vec<u8> = [count].iter().chain(cases).flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(file.len(), self.start);
        file.extend(self.bytes);
        file
    }

    /// As [`place`](Self::place), for bytes that only one case needs.
    fn add(&mut self, bytes: Vec<u8>) -> (usize, usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let at = self.start + self.bytes.len();
        self.bytes.extend(&bytes);
        (at, bytes.len())
    }
}
