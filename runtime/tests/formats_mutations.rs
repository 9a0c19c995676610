//! Thousands of damaged files of every format: each ends in one clear line or in a model that can be read, none in a
//! panic, a hang, or memory beyond the file's size plus 64 MB.
//!
//! A process of its own: its allocator counts.

mod support;

use std::alloc::{GlobalAlloc, Layout as Allocation, System};
use std::fmt::Display;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ternion_compiler::Layout;
use ternion_kernels_ref::SplitMix64;
use ternion_runtime::formats::gguf::{TernaryType, TokenRowType, export};
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::tern::{self, Form, HeadType};
use ternion_runtime::formats::{
    Bytes, Checkpoint, FormatError, LayerNorm, ModelConfig, OpenOptions, Projection, export_hf,
};
use ternion_runtime::lora::Adapter;
use ternion_runtime::model::problems;
use xxhash_rust::xxh3::xxh3_64;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is; only numbers are kept.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, allocation: Allocation) -> *mut u8 {
        let now = NOW.fetch_add(allocation.size(), Ordering::Relaxed) + allocation.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(allocation) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, allocation: Allocation) {
        NOW.fetch_sub(allocation.size(), Ordering::Relaxed);
        // SAFETY: `memory` came from `alloc` above, which had it from the system.
        unsafe { System.dealloc(memory, allocation) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One format at a time, so that memory is its own.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const FILES: usize = 5000;
const EXTRA_MEMORY: usize = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(5);

/// A model of a few kilobytes.
fn tiny() -> Checkpoint {
    let config = ModelConfig {
        layers: 1,
        hidden: 32,
        ffn: 32,
        heads: 1,
        kv_heads: 1,
        head_dim: 32,
        vocabulary: 270,
        ..Recipe::preset("125M").unwrap().config
    };
    let recipe = Recipe { config, gate_sparsity: None, ..Recipe::preset("125M").unwrap() };
    Checkpoint::synthetic(recipe).unwrap()
}

/// Opens a model and reads all that running it would read.
fn read_all(model: &Checkpoint) -> Result<(), FormatError> {
    let tokenizer = model.tokenizer()?;
    let _ = tokenizer.encode("Once upon a time 🦊", true);
    model.embedding()?;
    model.head()?;
    model.final_norm()?;
    for layer in 0..model.config().layers.min(3) {
        LayerNorm::ALL.into_iter().try_for_each(|norm| model.norm(layer, norm).map(drop))?;
        for projection in Projection::ALL {
            let _ = model.projection(layer, projection)?.to_matrix();
            model.bias(layer, projection)?;
        }
    }
    let _ = model.verify_checksums();
    let _ = model.verify_derived();
    let _ = model.chat();
    Ok(())
}

/// A generator of damage, the same each time.
struct Damage(SplitMix64);

impl Damage {
    fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound)
    }

    /// Flips bits, replaces bytes, cuts, doubles, and puts telling numbers where a length may be; mostly in the first
    /// `head` bytes.
    fn apply(&mut self, bytes: &mut Vec<u8>, head: usize) {
        const LENGTHS: [u64; 14] = [
            0,
            1,
            2,
            255,
            4096,
            65_535,
            1 << 20,
            u32::MAX as u64,
            1 << 32,
            1 << 40,
            i64::MAX as u64,
            1 << 63,
            u64::MAX - 7,
            u64::MAX,
        ];
        for _ in 0..=self.below(3) {
            let range = if self.below(4) == 0 { bytes.len() } else { head.min(bytes.len()) };
            let at = self.below(range);
            match self.below(8) {
                0..3 => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.below(8);
                    }
                }
                3 => {
                    let value = self.below(256) as u8;
                    bytes.get_mut(at).into_iter().for_each(|byte| *byte = value);
                }
                4 => bytes.truncate(at),
                5 => {
                    let length = LENGTHS[self.below(LENGTHS.len())].to_le_bytes();
                    let width = [4, 8][self.below(2)];
                    bytes.iter_mut().skip(at).zip(&length[..width]).for_each(|(byte, new)| *byte = *new);
                }
                6 => {
                    let count = self.below(64).min(bytes.len() - at.min(bytes.len()));
                    let again = bytes[at.min(bytes.len())..][..count].to_vec();
                    bytes.splice(at.min(bytes.len())..at.min(bytes.len()), again);
                }
                _ => {
                    let count = self.below(16).min(bytes.len() - at.min(bytes.len()));
                    bytes.drain(at.min(bytes.len())..at.min(bytes.len()) + count);
                }
            }
        }
    }
}

/// A JSON document in which some values are others, or are gone: still JSON, but not what it should be.
fn damage_json(damage: &mut Damage, whole: &Value) -> Vec<u8> {
    let strange = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(0.5),
        json!(1e300),
        json!(7),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!("\u{0}🦊"),
        json!("(?:[a"),
        json!("(a*)*b"),
        json!("{% for"),
        json!("x".repeat(3000)),
        json!([]),
        json!({}),
        json!([[], {}, null, "a", -3]),
    ];
    let mut json = whole.clone();
    for _ in 0..=damage.below(2) {
        let mut places = Vec::new();
        support::pointers(&json, String::new(), &mut places);
        // A vocabulary has more values than all the rest.
        let (words, rest): (Vec<_>, Vec<_>) = places.into_iter().partition(|at| at.starts_with("/model/vocab/"));
        let places = if damage.below(8) == 0 && !words.is_empty() { words } else { rest };
        let other = json.pointer(&places[damage.below(places.len())]).cloned().unwrap_or_default();
        let Some(value) = json.pointer_mut(&places[damage.below(places.len())]) else { continue };
        match (damage.below(4), value) {
            (0, Value::Array(items)) if !items.is_empty() => drop(items.remove(damage.below(items.len()))),
            (0, Value::Object(fields)) if !fields.is_empty() => {
                let name = fields.keys().nth(damage.below(fields.len())).cloned().unwrap();
                fields.remove(&name);
            }
            (1, value) => *value = other,
            (_, value) => *value = strange[damage.below(strange.len())].clone(),
        }
    }
    json.to_string().into_bytes()
}

/// Reads `FILES` damaged files, which take `size` bytes when they are whole; `read` says how one is made and read.
fn survive<E: Display>(size: usize, mut read: impl FnMut(&mut Damage) -> Result<(), E>) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut damage = Damage(SplitMix64::new(0x5eed));
    let mut refused = 0;
    for file in 0..FILES {
        let (before, start) = (NOW.load(Ordering::Relaxed), Instant::now());
        PEAK.store(before, Ordering::Relaxed);
        if let Err(error) = read(&mut damage) {
            let message = error.to_string();
            assert!(!message.contains('\n') && message.len() < 2000, "file {file}: {message}");
            refused += 1;
        }
        let peak = PEAK.load(Ordering::Relaxed) - before;
        assert!(peak <= size + EXTRA_MEMORY, "file {file} took {peak} bytes");
        assert!(start.elapsed() < PATIENCE, "file {file} took {:?}", start.elapsed());
    }
    assert!(refused > FILES / 4, "only {refused} files were refused: the damage is too mild to tell anything");
}

fn directory_of(write: impl FnOnce(&Path)) -> (tempfile::TempDir, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model");
    write(&path);
    let bytes = if path.is_dir() { Vec::new() } else { std::fs::read(&path).unwrap() };
    (directory, bytes)
}

#[test]
fn damaged_gguf_files() {
    for kind in [TernaryType::I2S, TernaryType::F16] {
        let (_directory, whole) = directory_of(|path| {
            export(&tiny(), path, kind, TokenRowType::Q8_0, &mut |_, _| ControlFlow::Continue(())).unwrap();
        });
        let options = OpenOptions::default();
        survive(whole.len(), |damage| {
            let mut bytes = whole.clone();
            // Sizes and the tensors' table lie at the two ends of the head; the vocabulary between them is dull.
            let head = if damage.below(2) == 0 { 1500 } else { bytes.len() - 16_000 };
            damage.apply(&mut bytes, head);
            read_all(&Checkpoint::from_bytes("model.gguf", Bytes::from(bytes), &options)?)
        });
    }
}

#[test]
fn damaged_prepared_files() {
    let (_directory, whole) = directory_of(|path| {
        let go = &mut |_, _| ControlFlow::Continue(());
        tern::write_with(&tiny(), path, &|_, _, _, _| Layout::Canonical, HeadType::Int8, go).unwrap();
    });
    survive_prepared(&whole);
}

/// Files with everything that loading would have to compute otherwise.
#[test]
fn damaged_prepared_files_that_are_ready_to_run() {
    let model = tiny();
    let (_directory, whole) = directory_of(|path| {
        let go = &mut |_, _| ControlFlow::Continue(());
        let shapes = problems(model.config());
        let form = Form {
            head: HeadType::Own,
            screen: true,
            copies: shapes.iter().map(|p| ((p.m, p.k), Layout::Lanes { rows: 16, group: 4 })).collect(),
            records: Some([Layout::Rows { rows: 1, chunk: 64 }, Layout::Columns { chunk: 64 }]),
        };
        tern::write_with(&model, path, &|_, _, _, _| Layout::Rows { rows: 4, chunk: 64 }, form, go).unwrap();
    });
    survive_prepared(&whole);
}

fn survive_prepared(whole: &[u8]) {
    let header = 32 + u64::from_le_bytes(whole[16..24].try_into().unwrap()) as usize;
    survive(whole.len(), |damage| {
        let mut bytes = whole.to_vec();
        damage.apply(&mut bytes, header);
        // Half of the files have a checksum that fits what became of the header.
        if damage.below(2) == 0 && bytes.len() > 32 {
            let length = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
            let end = length.saturating_add(32).min(bytes.len());
            let checksum = xxh3_64(&[&bytes[..24], &bytes[32..end]].concat());
            bytes[24..32].copy_from_slice(&checksum.to_le_bytes());
        }
        read_all(&Checkpoint::from_prepared("model.tern", Bytes::from(bytes))?)
    });
}

/// Damages one of a directory's files for as long as `read` reads it: its JSON every second time if it is some, or else
/// its bytes, for the most part among the first 4000.
fn with_damaged<E>(
    file: &(PathBuf, Vec<u8>),
    damage: &mut Damage,
    read: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let (name, whole) = file;
    let mut bytes = whole.clone();
    let json = || serde_json::from_slice(whole).ok().filter(|_| name.extension().is_some_and(|kind| kind == "json"));
    match json().filter(|_| damage.below(2) == 0) {
        Some(json) => bytes = damage_json(damage, &json),
        None => damage.apply(&mut bytes, 4000),
    }
    // A mapped file must not change while it is open, so it is another one each time.
    std::fs::remove_file(name).unwrap();
    std::fs::write(name, bytes).unwrap();
    let result = read();
    std::fs::remove_file(name).unwrap();
    std::fs::write(name, whole).unwrap();
    result
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn files_of(directory: &Path, names: &[&str]) -> Vec<(PathBuf, Vec<u8>)> {
    let path = |name: &&str| directory.join(name);
    names.iter().map(path).map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn damaged_hugging_face_directories() {
    let (directory, _) = directory_of(|path| {
        export_hf::export(&tiny(), path, &mut |_, _| ControlFlow::Continue(())).unwrap();
    });
    let path = directory.path().join("model");
    let size = |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(_, bytes)| bytes.len()).sum();
    // Everything that a tokenizer may have.
    let mut tokenizer = support::small_tokenizer();
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "Prepend", "prepend": "Ġ"}, {"type": "Replace", "pattern": {"String": "~"}, "content": "-"},
    ]});
    tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\s+(?!\S)|\s+"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]});
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    });
    tokenizer["model"]["vocab"]["on"] = json!(258);
    tokenizer["model"]["merges"] = json!([["o", "n"]]);
    std::fs::write(path.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(path.join("tokenizer_config.json"), r#"{"bos_token": "<s>", "eos_token": "</s>"}"#).unwrap();
    for (names, opens) in [
        (&["model.safetensors"][..], true),
        (&["config.json", "generation_config.json", "tokenizer_config.json"], true),
        (&["tokenizer.json"], false),
    ] {
        let files = files_of(&path, names);
        let whole = Checkpoint::open(&path).unwrap();
        survive(size(&files), |damage| {
            let file = &files[damage.below(files.len())];
            with_damaged(file, damage, || {
                if opens {
                    return read_all(&Checkpoint::open(&path)?);
                }
                let tokenizer = whole.tokenizer()?;
                let _ = tokenizer.encode("Once upon a time 🦊, 12345", true).map(|tokens| tokenizer.decode(&tokens));
                Ok(())
            })
        });
    }
}

/// The families' tokenizers as SentencePiece has them.
#[test]
fn damaged_sentencepiece_models() {
    let fixture = fixtures().join("sentencepiece/tokenizer.model");
    let (directory, _) = directory_of(|path| {
        export_hf::export(&tiny(), path, &mut |_, _| ControlFlow::Continue(())).unwrap();
    });
    let path = directory.path().join("model");
    std::fs::remove_file(path.join("tokenizer.json")).unwrap();
    std::fs::copy(fixture, path.join("tokenizer.model")).unwrap();
    let files = files_of(&path, &["tokenizer.model"]);
    let model = Checkpoint::open(&path).unwrap();
    survive(files[0].1.len(), |damage| with_damaged(&files[0], damage, || model.tokenizer_json().map(drop)));
}

#[test]
fn damaged_adapters() {
    let config = Checkpoint::open(&fixtures().join("families/bitnet-2b4t")).unwrap().config().clone();
    let directory = tempfile::tempdir().unwrap();
    let names = ["adapter_model.safetensors", "adapter_config.json"];
    for name in names {
        std::fs::copy(fixtures().join("lora/first").join(name), directory.path().join(name)).unwrap();
    }
    let files = files_of(directory.path(), &names);
    for file in &files {
        survive(file.1.len(), |damage| {
            with_damaged(file, damage, || Adapter::open(directory.path(), &config, 1.0).map(drop))
        });
    }
}
