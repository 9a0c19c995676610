//! A model says the same, bit for bit, whatever form its file has, and what the file holds ready is used where it lies.

mod support;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use ternion_compiler::{Columns, Cpu, Family, KernelSpec, Layout, Schedule};
use ternion_runtime::formats::tern::{self, Form, HeadType};
use ternion_runtime::formats::{Bytes, Checkpoint, Projection};
use ternion_runtime::model::{KernelChoice, LoadReport, Model, Session, SessionOptions, Wanted, problems, ready_form};
use ternion_runtime::team::Team;
use ternion_tuner::{Choice, Class};
use xxhash_rust::xxh3::xxh3_64;

fn cpu() -> Cpu {
    Cpu::host().expect("a CPU that ternion compiles for")
}

fn write(model: &Checkpoint, path: &Path, layout: &tern::ChooseLayout<'_>, form: impl Into<Form>) -> Checkpoint {
    let form = form.into();
    let planned = tern::planned_bytes(model, layout, form.clone()).unwrap();
    let written = tern::write_with(model, path, layout, form, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(written.bytes, planned);
    let checkpoint = Checkpoint::open(path).unwrap();
    checkpoint.verify_checksums().unwrap();
    checkpoint.verify_derived().unwrap();
    checkpoint
}

/// A digest of all logits of a text, with the likeliest tokens of each position as the head's screen finds them.
fn digest(checkpoint: &Checkpoint, kernels: &KernelChoice) -> (u64, LoadReport) {
    let team = Arc::new(Team::new(2).unwrap());
    let model = Model::load(checkpoint, kernels, &cpu(), &*team, &|_| {}).unwrap();
    let report = model.report();
    let mut session = Session::new(Arc::new(model), team, &SessionOptions::default()).unwrap();
    let tokens = checkpoint.tokenizer().unwrap().encode("Once upon a time there was a king who had three sons", true);
    let tokens = tokens.unwrap();
    let mut bytes = Vec::new();
    session.prefill_all(&tokens, &mut |_, logits| bytes.extend(logits.iter().flat_map(|x| x.to_le_bytes()))).unwrap();
    for token in tokens {
        bytes.extend(session.step(token).unwrap().iter().flat_map(|x| x.to_le_bytes()));
    }
    (xxh3_64(&bytes), report)
}

fn bare(report: &LoadReport) -> [usize; 3] {
    [
        report.packed_bytes,
        report.record_bytes - report.mapped_record_bytes,
        report.screen_bytes - report.stored_screen_bytes,
    ]
}

#[test]
fn every_form_of_a_file_gives_the_same_logits() {
    let directory = tempfile::tempdir().unwrap();
    let original = support::embedded();
    for family in [Family::Mad, Family::Tl1] {
        let kernels = KernelChoice::Family(family);
        let (expected, report) = digest(&original, &kernels);
        let ready = Form { screen: true, ..ready_form(&original, &kernels, &cpu(), HeadType::Own).unwrap() };
        let own = |_, _, m, k| kernels.of(m, k, &cpu()).unwrap().layout();
        let path = directory.path().join(format!("{family}.tern"));
        let prepared = write(&original, &path, &own, ready.clone());
        assert!(tern::has_form(&prepared, &own, ready.clone()).unwrap());
        assert!(!tern::has_form(&prepared, &own, HeadType::Own).unwrap());
        let (found, ready_report) = digest(&prepared, &kernels);
        assert_eq!(found, expected, "{family}: the form that these kernels read");
        assert_eq!(bare(&ready_report), [0, 0, 0], "{family}: nothing is computed");
        assert_eq!(ready_report.record_bytes, report.record_bytes);
        assert!(ready_report.mapped_bytes > 0 && ready_report.stored_screen_bytes > 0);

        // Layouts that these kernels do not read, for everything that has a layout.
        let foreign = Form {
            records: Some([Layout::Rows { rows: 1, chunk: 16 }, Layout::Columns { chunk: 16 }]),
            copies: problems(original.config()).iter().map(|p| ((p.m, p.k), Layout::Fives { rows: 16 })).collect(),
            ..ready
        };
        let strange = |layer: usize, _: Projection, _: usize, _: usize| match layer % 3 {
            0 => Layout::Threes { rows: 16 },
            1 => Layout::Rows { rows: 3, chunk: 32 },
            _ => Layout::Lanes { rows: 48, group: 1 },
        };
        let prepared = write(&original, &path, &strange, foreign);
        let (found, foreign_report) = digest(&prepared, &kernels);
        assert_eq!(found, expected, "{family}: foreign layouts");
        assert!(foreign_report.packed_bytes > 0 && foreign_report.mapped_bytes == 0);
    }
}

#[test]
fn two_copies_are_stored_for_kernels_that_read_two_layouts() {
    let directory = tempfile::tempdir().unwrap();
    let original = support::embedded();
    let (k, cpu) = (original.config().hidden, cpu());
    let one = Schedule::candidates(&KernelSpec { k, columns: Columns::One }, &cpu)[0];
    let many = Schedule::candidates(&Class::Chunk.spec(k), &cpu);
    let many = many.into_iter().find(|many| many.layout != one.layout).expect("another layout for many columns");
    let kernels = KernelChoice::Schedules(Choice::pair(one, many));
    let form = ready_form(&original, &kernels, &cpu, HeadType::Own).unwrap();
    assert!(!form.copies.is_empty() && !form.screen, "{form:?}");
    let path = directory.path().join("two.tern");
    let prepared = write(&original, &path, &|_, _, _, _| one.layout, form);
    let ((expected, report), (found, mapped)) = (digest(&original, &kernels), digest(&prepared, &kernels));
    assert_eq!(found, expected);
    assert_eq!(bare(&mapped), [0, 0, 0]);
    assert_eq!(mapped.mapped_bytes, report.packed_bytes + report.mapped_bytes);
}

#[test]
fn a_ready_file_becomes_the_plain_one_again_byte_for_byte() {
    let directory = tempfile::tempdir().unwrap();
    let original = support::embedded();
    let kernels = KernelChoice::Family(Family::Mad);
    let form = Form { screen: true, ..ready_form(&original, &kernels, &cpu(), HeadType::Own).unwrap() };
    let own = |_, _, m, k| kernels.of(m, k, &cpu()).unwrap().layout();
    let ready = write(&original, &directory.path().join("ready.tern"), &own, form.clone());
    let again = directory.path().join("again.tern");
    write(&ready, &again, &|_, _, _, _| Layout::Canonical, HeadType::Own);
    assert!(std::fs::read(&again).unwrap() == std::fs::read(support::embedded_path()).unwrap());
    // Also in its own place, while it is mapped.
    #[cfg(unix)]
    {
        let place = directory.path().join("ready.tern");
        let whole = std::fs::read(&place).unwrap();
        write(&ready, &place, &|_, _, _, _| Layout::Canonical, HeadType::Own);
        assert!(std::fs::read(&place).unwrap() == std::fs::read(&again).unwrap());
        write(&Checkpoint::open(&place).unwrap(), &place, &own, form);
        assert!(std::fs::read(&place).unwrap() == whole);
    }
}

/// Where a section's bytes are in a file.
fn section(bytes: &[u8], name: &str) -> std::ops::Range<usize> {
    let length = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[32..32 + length]).unwrap();
    let sections = header["sections"].as_array().unwrap();
    let section = sections.iter().find(|section| section["name"] == name).unwrap();
    let number = |field: &str| section[field].as_u64().unwrap() as usize;
    let start = (32 + length).next_multiple_of(4096) + number("offset");
    start..start + number("bytes")
}

#[test]
fn a_damaged_screen_is_refused_before_it_can_hide_a_token() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("screened.tern");
    let form = Form { screen: true, ..Form::default() };
    write(&support::embedded(), &path, &|_, _, _, _| Layout::Canonical, form);
    let whole = std::fs::read(&path).unwrap();
    let screen = section(&whole, "head.screen");
    let team = Team::new(1).unwrap();
    for at in [screen.start, (screen.start + screen.end) / 2, screen.end - 1] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x40;
        let model = Checkpoint::from_prepared("screened.tern", Bytes::from(damaged)).unwrap();
        let loaded = Model::load(&model, &KernelChoice::Family(Family::Mad), &cpu(), &team, &|_| {});
        let message = loaded.map(drop).unwrap_err().to_string();
        assert!(message.contains("head.screen") && message.contains("checksum"), "{message}");
    }
}

#[test]
fn what_does_not_follow_from_the_model_is_found_by_verifying() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ready.tern");
    let original = support::embedded();
    let records = Some([Layout::Rows { rows: 1, chunk: 64 }, Layout::Columns { chunk: 64 }]);
    let copies = problems(original.config()).into_iter().map(|p| ((p.m, p.k), Layout::Lanes { rows: 16, group: 1 }));
    let form = Form { screen: true, records, copies: copies.collect(), ..Form::default() };
    write(&original, &path, &|_, _, _, _| Layout::Canonical, form);
    let whole = std::fs::read(&path).unwrap();
    let names = [
        "head.screen",
        "layers.2.self_attn.k_proj.copy",
        "layers.1.mlp.up_proj.rows",
        "layers.5.mlp.down_proj.columns",
    ];
    for name in names {
        let mut forged = whole.clone();
        let range = section(&whole, name);
        forged[range.start + 3] ^= 1;
        // Whoever forges a section puts its checksum right.
        let length = u64::from_le_bytes(forged[16..24].try_into().unwrap()) as usize;
        let before = format!("{:016x}", xxh3_64(&whole[range.clone()]));
        let after = format!("{:016x}", xxh3_64(&forged[range]));
        // The last one: an up-projection may have the same bytes as its records.
        let at = 32 + String::from_utf8_lossy(&whole[32..32 + length]).rfind(&before).unwrap();
        forged[at..at + 16].copy_from_slice(after.as_bytes());
        let checksum = xxh3_64(&[&forged[..24], &forged[32..32 + length]].concat());
        forged[24..32].copy_from_slice(&checksum.to_le_bytes());
        let model = Checkpoint::from_prepared("ready.tern", Bytes::from(forged)).unwrap();
        model.verify_checksums().unwrap();
        let message = model.verify_derived().unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn greedy_tokens_come_through_a_stored_screen() {
    let directory = tempfile::tempdir().unwrap();
    let original = support::embedded();
    let form = Form { screen: true, head: HeadType::Int8, ..Form::default() };
    let canonical = |_, _, _, _| Layout::Canonical;
    let plain = write(&original, &directory.path().join("plain.tern"), &canonical, HeadType::Int8);
    let screened = write(&original, &directory.path().join("screened.tern"), &canonical, form);
    let (team, kernels) = (Arc::new(Team::new(2).unwrap()), KernelChoice::Family(Family::Mad));
    let [plain, screened] = [plain, screened].map(|checkpoint| {
        let model = Arc::new(Model::load(&checkpoint, &kernels, &cpu(), &*team, &|_| {}).unwrap());
        let screened = model.report().stored_screen_bytes > 0;
        let mut session = Session::new(model, Arc::clone(&team), &SessionOptions::default()).unwrap();
        let mut token = 1;
        let tokens: Vec<(u32, u32)> = (0..40)
            .map(|_| {
                session.read(&[token]).unwrap();
                let found = session.candidates(Wanted::Top(1), &[]);
                let best = found.iter().max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1))).unwrap();
                token = best.1;
                (best.0.to_bits(), best.1)
            })
            .collect();
        (tokens, screened)
    });
    assert_eq!(plain.0, screened.0);
    assert!(!plain.1 && screened.1);
}
