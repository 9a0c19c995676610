//! The prepared file: what is written comes back, damage is always noticed, and a failed write leaves nothing.

mod support;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::Value;
use support::{Dress, HuggingFaceFixture, embedded, embedded_path};
use ternion_compiler::Layout;
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::tern::{self, Form, HeadType};
use ternion_runtime::formats::{Bytes, Checkpoint, FormatError, LayerNorm, ModelConfig, Projection, RowType};
use xxhash_rust::xxh3::xxh3_64;

static EMBEDDED: LazyLock<Vec<u8>> = LazyLock::new(|| std::fs::read(embedded_path()).unwrap());

fn open(bytes: Vec<u8>) -> Result<Checkpoint, FormatError> {
    Checkpoint::from_prepared("model.tern", Bytes::from(bytes))
}

fn error(bytes: Vec<u8>) -> String {
    open(bytes).map(drop).expect_err("a damaged file").to_string()
}

/// Opens a model and reads all that running it would read; the bytes of every section are touched.
fn read_all(bytes: Vec<u8>) -> Result<u64, FormatError> {
    let model = open(bytes)?;
    let mut sum = 0;
    let mut touch = |bytes: &[u8]| sum += bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    touch(&model.tokenizer_json()?);
    touch(&model.embedding()?.bytes);
    touch(&model.head()?.map_or_else(Vec::new, |head| head.bytes.to_vec()));
    for layer in 0..model.config().layers {
        for projection in Projection::ALL {
            let tensor = model.projection(layer, projection)?;
            touch(&tensor.bytes);
            // Codes of a damaged section may be invalid, but that is an error, too.
            let _ = tensor.to_matrix();
        }
        for norm in LayerNorm::ALL {
            assert_eq!(model.norm(layer, norm)?.len(), norm.width(model.config()));
        }
    }
    assert_eq!(model.final_norm()?.len(), model.config().hidden);
    let _ = model.verify_checksums();
    Ok(sum)
}

/// A different layout for every projection of a layer.
fn mixed_layouts(layer: usize, projection: Projection, _m: usize, _k: usize) -> Layout {
    match (layer % 2, projection) {
        (_, Projection::Query) => Layout::Rows { rows: 4, chunk: 64 },
        (0, Projection::Key) => Layout::Rows { rows: 3, chunk: 16 },
        (_, Projection::Value) => Layout::Lanes { rows: 32, group: 1 },
        (1, Projection::Gate) => Layout::Lanes { rows: 48, group: 1 },
        _ => Layout::Canonical,
    }
}

fn canonical(_: usize, _: Projection, _: usize, _: usize) -> Layout {
    Layout::Canonical
}

fn names(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn what_is_written_in_any_layout_comes_back_and_can_be_turned_into_the_original() {
    let directory = tempfile::tempdir().unwrap();
    let (mixed, again) = (directory.path().join("mixed.tern"), directory.path().join("again.tern"));
    let original = embedded();
    let mut steps = Vec::new();
    let summary = tern::write(&original, &mixed, &mixed_layouts, &mut |done, total| {
        steps.push((done, total));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(summary.bytes, std::fs::metadata(&mixed).unwrap().len());
    assert_eq!(summary.matrices, 42);
    assert_eq!((steps[0], *steps.last().unwrap()), ((0, summary.bytes), (summary.bytes, summary.bytes)));
    assert!(steps.is_sorted());

    let model = Checkpoint::open(&mixed).unwrap();
    assert_eq!(model.digest(), Some(summary.digest));
    assert_eq!(model.verify_checksums().unwrap(), 3 + 42);
    for layer in 0..6 {
        for projection in Projection::ALL {
            let (tensor, expected) =
                (model.projection(layer, projection).unwrap(), original.projection(layer, projection).unwrap());
            assert_eq!(tensor.layout, mixed_layouts(layer, projection, tensor.m, tensor.k));
            assert_eq!(tensor.scale.to_bits(), expected.scale.to_bits());
            assert!(tensor.to_matrix() == expected.to_matrix());
        }
    }
    tern::write(&model, &again, &canonical, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert!(std::fs::read(&again).unwrap() == *EMBEDDED);
}

#[test]
fn a_head_of_its_own_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let fixture = HuggingFaceFixture { untied: true, ..HuggingFaceFixture::new(Dress::PackedDirect) };
    fixture.write(&embedded(), directory.path());
    let output = directory.path().join("untied.tern");
    let model = Checkpoint::open(directory.path()).unwrap();
    tern::write(&model, &output, &canonical, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let model = Checkpoint::open(&output).unwrap();
    assert_eq!(model.verify_checksums().unwrap(), 4 + 42);
    let (head, embedding) = (model.head().unwrap().unwrap(), model.embedding().unwrap());
    assert!(!model.config().tied_head);
    assert_eq!(head.row(0), embedding.row(embedding.rows - 1));
    assert_eq!(
        model.projection(5, Projection::Down).unwrap().scale,
        embedded().projection(5, Projection::Down).unwrap().scale
    );
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let whole = &*EMBEDDED;
    for length in [0, 1, 7].into_iter().chain((8..64).step_by(7)).chain((64..whole.len()).step_by(9973)) {
        let message = error(whole[..length].to_vec());
        let words = if length < 8 { "not a prepared model" } else { "cut off" };
        assert!(message.contains(words), "{length}: {message}");
    }
    assert!(error(whole[..whole.len() - 1].to_vec()).contains("cut off"));
    assert!(error([whole, &[0][..]].concat()).contains("damaged"));
}

#[test]
fn foreign_and_newer_files_are_told_apart_from_damaged_ones() {
    assert!(
        error(b"GGUF\x03\0\0\0 and so on, for long enough to be a header".to_vec()).contains("not a prepared model")
    );
    let mut newer = EMBEDDED.clone();
    newer[8] = 3;
    let message = error(newer);
    assert!(message.contains("version 3") && message.contains("update ternion"), "{message}");
    let mut damaged = EMBEDDED.clone();
    damaged[40] ^= 1;
    assert!(error(damaged).contains("checksum"));
}

#[test]
fn damage_is_not_prepared_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut damaged = EMBEDDED.clone();
    let at = damaged.len() - 5;
    damaged[at] ^= 0x10;
    let output = directory.path().join("out.tern");
    let result = tern::write(&open(damaged).unwrap(), &output, &canonical, &mut |_, _| ControlFlow::Continue(()));
    assert!(result.unwrap_err().to_string().contains("layers.5.mlp.down_proj"));
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn a_write_that_fails_or_is_cancelled_leaves_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.tern");
    std::fs::write(&output, "before").unwrap();
    let cancelled = tern::write(&embedded(), &output, &canonical, &mut |done, total| {
        if done > total / 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(cancelled, Err(FormatError::Cancelled { .. })));
    assert_eq!(std::fs::read(&output).unwrap(), b"before");
    std::fs::remove_file(directory.path().join("out.tern.part")).unwrap();
    assert_eq!(names(directory.path()), ["out.tern"]);

    // A model that turns out to be damaged while it is read.
    let source = tempfile::tempdir().unwrap();
    HuggingFaceFixture::damaged(support::Damage::Code3).write(&embedded(), source.path());
    let model = Checkpoint::open(source.path()).unwrap();
    let failed = tern::write(&model, &output, &canonical, &mut |_, _| ControlFlow::Continue(()));
    assert!(failed.unwrap_err().to_string().contains("code 3"));
    assert_eq!(std::fs::read(&output).unwrap(), b"before");
    assert_eq!(names(directory.path()), ["out.tern"]);

    for unwritable in [directory.path().join("missing/out.tern"), directory.path().to_owned(), "/dev/null".into()] {
        let result = tern::write(&embedded(), &unwritable, &canonical, &mut |_, _| ControlFlow::Continue(()));
        let message = result.unwrap_err().to_string();
        assert!(message.starts_with("cannot write") && message.contains(unwritable.to_str().unwrap()), "{message}");
    }
}

/// Writes until `stop` bytes are there, and leaves it at that.
fn interrupted(model: &Checkpoint, output: &Path, head: HeadType, stop: u64) {
    let stopped = tern::write_with(model, output, &mixed_layouts, head, &mut |done, _| {
        if done > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(stopped, Err(FormatError::Cancelled { .. })), "{stopped:?}");
}

#[test]
fn what_was_interrupted_is_continued_and_ends_with_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (whole, output) = (directory.path().join("whole.tern"), directory.path().join("out.tern"));
    let part = directory.path().join("out.tern.part");
    let model = embedded();
    let write = |output: &Path, head| {
        tern::write_with(&model, output, &mixed_layouts, head, &mut |_, _| ControlFlow::Continue(())).unwrap()
    };
    for head in [HeadType::Own, HeadType::Int8] {
        let expected = write(&whole, head);
        let mut before = 0;
        for percent in [5, 40, 70, 97] {
            interrupted(&model, &output, head, expected.bytes * percent / 100);
            // An unfinished file is never taken for a model.
            let message = Checkpoint::open(&part).map(drop).unwrap_err().to_string();
            assert!(message.contains("unfinished") && !output.exists(), "{message}");
        }
        // What is damaged in the meantime, by a power failure, is not believed.
        let mut bytes = std::fs::read(&part).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..middle + 4096].fill(0x55);
        std::fs::write(&part, bytes).unwrap();
        let mut first = None;
        let summary = tern::write_with(&model, &output, &mixed_layouts, head, &mut |done, _| {
            first.get_or_insert(done);
            before = done;
            ControlFlow::Continue(())
        })
        .unwrap();
        assert!(summary.resumed > expected.bytes / 3 && first == Some(summary.resumed), "{summary:?}");
        assert_eq!(before, expected.bytes);
        assert_eq!((summary.digest, summary.head_error), (expected.digest, expected.head_error));
        assert!(std::fs::read(&output).unwrap() == std::fs::read(&whole).unwrap());
        assert!(!part.exists());
        std::fs::remove_file(&output).unwrap();
    }
}

#[test]
fn an_embedding_that_was_interrupted_in_its_middle_is_continued_there() {
    let directory = tempfile::tempdir().unwrap();
    let (whole, output) = (directory.path().join("whole.tern"), directory.path().join("out.tern"));
    let part = directory.path().join("out.tern.part");
    let config =
        ModelConfig { layers: 1, hidden: 256, heads: 4, kv_heads: 4, head_dim: 64, ffn: 256, ..small_config() };
    let config = ModelConfig { vocabulary: 40_000, ..config };
    let model = Checkpoint::synthetic(Recipe { config, ..Recipe::preset("125M").unwrap() }).unwrap();
    for head in [HeadType::Own, HeadType::Int8] {
        let form = || Form { head, screen: true, ..Form::default() };
        let write = |output: &Path, tell: &mut (dyn FnMut(u64, u64) -> ControlFlow<()> + Send)| {
            tern::write_with(&model, output, &canonical, form(), tell)
        };
        let expected = write(&whole, &mut |_, _| ControlFlow::Continue(())).unwrap();
        // The embedding is most of the file's first half, and most of the rest is its screen.
        let mut before = 0;
        for percent in [30, 50, 90] {
            let mut first = None;
            let stopped = write(&output, &mut |done, total| {
                first.get_or_insert(done);
                if done > total * percent / 100 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(matches!(stopped, Err(FormatError::Cancelled { .. })), "{stopped:?}");
            assert!(first >= Some(before), "what was there is there: {first:?}, {before}");
            before = first.unwrap();
        }
        assert!(before > expected.bytes / 10, "blocks of an unfinished section are kept: {before}");
        // One of them is damaged in the meantime: it alone is made again.
        let mut bytes = std::fs::read(&part).unwrap();
        let at = bytes.len() / 10;
        bytes[at] ^= 1;
        std::fs::write(&part, bytes).unwrap();
        let summary = write(&output, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert!(summary.resumed > expected.bytes / 4 && summary.resumed < expected.bytes, "{summary:?}");
        assert_eq!(summary, tern::WriteSummary { resumed: summary.resumed, ..expected });
        assert!(std::fs::read(&output).unwrap() == std::fs::read(&whole).unwrap());
        let written = Checkpoint::open(&output).unwrap();
        written.verify_checksums().unwrap();
        written.verify_derived().unwrap();
        assert!(!part.exists());
    }
}

/// All units are there, and the process was killed before the file got its name.
#[test]
fn a_file_that_lacks_nothing_but_its_header_gets_it() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.tern");
    let stopped = tern::write(&embedded(), &output, &canonical, &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(FormatError::Cancelled { .. })));
    // One step at a time, until no step is left.
    let mut resumed = Vec::new();
    let summary = loop {
        let mut steps = 0;
        let result = tern::write(&embedded(), &output, &canonical, &mut |done, _| {
            if steps == 0 {
                resumed.push(done);
            }
            steps += 1;
            if steps > 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match result {
            Ok(summary) => break summary,
            Err(error) => assert!(matches!(error, FormatError::Cancelled { .. }), "{error}"),
        }
    };
    assert!(resumed.is_sorted() && resumed.len() > 10, "{resumed:?}");
    assert_eq!(Some(&summary.resumed), resumed.last());
    assert!(std::fs::read(&output).unwrap() == *EMBEDDED);
}

#[test]
fn what_was_to_become_something_else_is_begun_again() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.tern");
    interrupted(&embedded(), &output, HeadType::Own, 1 << 20);
    let summary =
        tern::write_with(&embedded(), &output, &canonical, HeadType::Own, &mut |_, _| ControlFlow::Continue(()))
            .unwrap();
    assert_eq!(summary.resumed, 0);
    assert!(std::fs::read(&output).unwrap() == *EMBEDDED);
    // Nothing that happens to lie there does any harm.
    for junk in [b"".to_vec(), b"\x89TERNPRT".to_vec(), vec![0xff; EMBEDDED.len()]] {
        std::fs::write(directory.path().join("out.tern.part"), junk).unwrap();
        tern::write(&embedded(), &output, &canonical, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert!(std::fs::read(&output).unwrap() == *EMBEDDED);
        assert_eq!(names(directory.path()), ["out.tern"]);
    }
}

#[test]
fn one_process_at_a_time_writes_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.tern");
    let mut second = None;
    tern::write(&embedded(), &output, &canonical, &mut |_, _| {
        second.get_or_insert_with(|| {
            tern::write(&embedded(), &output, &canonical, &mut |_, _| ControlFlow::Continue(()))
                .unwrap_err()
                .to_string()
        });
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(second.unwrap().contains("another process is writing it"));
    assert!(std::fs::read(&output).unwrap() == *EMBEDDED);
}

#[test]
fn a_head_may_be_stored_in_fewer_bits_and_is_the_models_head_then() {
    let directory = tempfile::tempdir().unwrap();
    let original = embedded();
    let own = original.embedding().unwrap();
    let mut sizes = Vec::new();
    for (head, kind, bound) in [
        (HeadType::F16, RowType::F16, 1e-3),
        (HeadType::Int8, RowType::Int8, 0.02),
        (HeadType::Q6K, RowType::Q6K, 0.03),
    ] {
        let output = directory.path().join(format!("{kind}.tern"));
        let planned = tern::planned_bytes(&original, &canonical, head).unwrap();
        let written =
            tern::write_with(&original, &output, &canonical, head, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert_eq!((written.head, written.bytes), (kind, planned));
        assert_eq!(std::fs::metadata(&output).unwrap().len(), planned);
        let model = Checkpoint::open(&output).unwrap();
        model.verify_checksums().unwrap();
        let rows = model.embedding().unwrap();
        assert_eq!((rows.dtype, rows.bytes.len()), (kind, rows.rows * kind.row_bytes(rows.columns)));
        // The error that is told is the error that was made.
        let (mut error, mut whole) = (0.0f64, 0.0f64);
        let (mut a, mut b) = (vec![0.0; own.columns], vec![0.0; own.columns]);
        for at in 0..own.rows {
            own.widen_row(at, &mut a);
            rows.widen_row(at, &mut b);
            error += a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            whole += a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
        }
        let error = (error / whole).sqrt();
        assert!((written.head_error - error).abs() <= 1e-6 * error && error < bound, "{kind}: {written:?}, {error}");
        // Prepared again as it is, nothing is rounded again.
        let again = directory.path().join("again.tern");
        let summary = tern::write(&model, &again, &canonical, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert_eq!(summary.head_error, 0.0);
        assert!(std::fs::read(&again).unwrap() == std::fs::read(&output).unwrap());
        sizes.push(planned);
    }
    assert!(sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");
}

#[test]
fn a_head_whose_rows_no_whole_blocks_divide_is_refused_with_advice() {
    let directory = tempfile::tempdir().unwrap();
    let config = ModelConfig { layers: 1, hidden: 96, heads: 3, kv_heads: 3, head_dim: 32, ..small_config() };
    let recipe = Recipe { config, gate_sparsity: None, ..Recipe::preset("125M").unwrap() };
    let model = Checkpoint::synthetic(recipe).unwrap();
    let output = directory.path().join("out.tern");
    let refused = tern::write_with(&model, &output, &canonical, HeadType::Q6K, &mut |_, _| ControlFlow::Continue(()));
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("96 weights") && message.contains("choose int8 or f16"), "{message}");
    assert_eq!(names(directory.path()), [""; 0]);
    tern::write_with(&model, &output, &canonical, HeadType::Int8, &mut |_, _| ControlFlow::Continue(())).unwrap();
}

fn small_config() -> ModelConfig {
    ModelConfig { ffn: 128, vocabulary: 300, ..Recipe::preset("125M").unwrap().config }
}

/// The file with another header, its length and checksum put right.
fn with_header(json: &[u8]) -> Vec<u8> {
    let length = u64::from_le_bytes(EMBEDDED[16..24].try_into().unwrap()) as usize;
    let data = (32 + length).next_multiple_of(4096);
    let mut bytes = EMBEDDED[..16].to_vec();
    bytes.extend((json.len() as u64).to_le_bytes());
    let checksum = xxh3_64(&[&bytes, json].concat());
    bytes.extend(checksum.to_le_bytes());
    bytes.extend(json);
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    bytes.extend(&EMBEDDED[data..]);
    bytes
}

fn header() -> Value {
    let length = u64::from_le_bytes(EMBEDDED[16..24].try_into().unwrap()) as usize;
    serde_json::from_slice(&EMBEDDED[32..32 + length]).unwrap()
}

#[test]
fn a_header_that_was_not_changed_is_accepted_again() {
    assert!(open(with_header(&serde_json::to_vec(&header()).unwrap())).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn one_changed_byte_is_always_noticed(at in any::<prop::sample::Index>(), change in 1u8..) {
        let mut bytes = EMBEDDED.clone();
        // Half of the changes hit the header.
        let at = if change % 2 == 0 { at.index(bytes.len()) } else { at.index(8192) };
        bytes[at] ^= change;
        if let Ok(model) = open(bytes) {
            prop_assert!(model.verify_checksums().is_err(), "byte {}", at);
        }
    }

    #[test]
    fn a_header_with_any_value_replaced_never_panics(
        changes in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::sample::select(vec![
                "0", "1", "2", "3", "4095", "4096", "1048576", "4294967296", "9223372036854775807",
                "18446744073709551615", "-1", "1e300", "0.5", "null", "true", "\"\"", "\"norms\"", "\"f32\"", "\"bf16\"",
                "\"canonical\"", "\"rows1x16\"", "\"lanes240\"", "\"7f800000\"", "\"3f800000\"", "[]", "{}",
            ])),
            1..4,
        ),
    ) {
        let mut header = header();
        for (at, replacement) in changes {
            let mut all = Vec::new();
            support::pointers(&header, String::new(), &mut all);
            *header.pointer_mut(&all[at.index(all.len())]).unwrap() = serde_json::from_str(replacement).unwrap();
        }
        if let Err(error) = read_all(with_header(&serde_json::to_vec(&header).unwrap())) {
            prop_assert!(!error.to_string().contains('\n'), "{}", error);
        }
    }

    #[test]
    fn a_header_of_random_bytes_never_panics(json in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(open(with_header(&json)).is_err());
    }
}
