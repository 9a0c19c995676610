use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::file::MAX_BYTES;
use super::*;
use crate::shortlist::Shortlist;
use crate::{Class, Problem};

fn cpu() -> Cpu {
    "x86-64 +ssse3".parse().unwrap()
}

pub(crate) fn key() -> ProfileKey {
    let (cpu, features) = ("x86_64 GenuineTest".into(), cpu().to_string());
    ProfileKey { cpu, features, compiler: "0.1.0-abc".into(), threads: 2 }
}

pub(crate) fn entry(m: usize, k: usize, budget_ms: u64) -> ShapeEntry {
    let choice = Shortlist::new(k, &cpu(), 8, &|_, _| false).guess().unwrap();
    ShapeEntry {
        m,
        k,
        choice,
        results: Vec::new(),
        raced: 8,
        budget_ms,
        workload: Workload::default(),
        second_copies: 0,
        one_copy: None,
        alternatives: Vec::new(),
        energy: false,
        provisional: false,
    }
}

fn profile(entries: &[ShapeEntry]) -> MachineProfile {
    let mut profile = MachineProfile::new(key());
    entries.iter().for_each(|entry| profile.insert(entry.clone()));
    profile
}

fn in_directory() -> (tempfile::TempDir, CacheDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let cache = CacheDir::at(directory.path());
    let path = cache.profile_path(&key()).unwrap();
    (directory, cache, path)
}

#[test]
fn what_is_remembered_is_loaded_again() {
    let (_keep, cache, path) = in_directory();
    let written = profile(&[entry(256, 256, 300), entry(64, 256, 300)]);
    cache.remember(&written).unwrap();
    assert_eq!(cache.load(&key(), &cpu()), (written.clone(), Vec::new()));
    assert_eq!(cache.profiles(), (vec![(path, written)], Vec::new()));
}

#[test]
fn another_machine_compiler_or_team_knows_nothing() {
    let (_keep, cache, _) = in_directory();
    cache.remember(&profile(&[entry(256, 256, 300)])).unwrap();
    let others = [
        ProfileKey { cpu: "other".into(), ..key() },
        ProfileKey { features: "x86-64".into(), ..key() },
        ProfileKey { compiler: "0.1.0-abd".into(), ..key() },
        ProfileKey { threads: 3, ..key() },
    ];
    for other in others {
        assert_eq!(cache.load(&other, &cpu()), (MachineProfile::new(other.clone()), Vec::new()));
    }
}

#[test]
fn a_file_that_holds_another_key_is_not_believed() {
    let (_keep, cache, path) = in_directory();
    let other = MachineProfile { key: ProfileKey { threads: 9, ..key() }, ..profile(&[entry(256, 256, 300)]) };
    fs::write(&path, serde_json::to_string(&other).unwrap()).unwrap();
    assert!(cache.load(&key(), &cpu()).0.shapes.is_empty());
}

#[test]
fn two_writers_keep_each_others_shapes_and_the_longer_search_wins() {
    let (_keep, cache, _) = in_directory();
    cache.remember(&profile(&[entry(256, 256, 20_000), entry(64, 256, 300)])).unwrap();
    cache.remember(&profile(&[entry(256, 256, 300), entry(512, 256, 300)])).unwrap();
    let (merged, _) = cache.load(&key(), &cpu());
    let shapes: Vec<_> = merged.shapes.iter().map(|entry| (entry.m, entry.budget_ms)).collect();
    assert_eq!(shapes, [(64, 300), (256, 20_000), (512, 300)]);
}

#[test]
fn what_was_disturbed_gives_way_and_another_purpose_replaces() {
    let stays = |first: &ShapeEntry, second: &ShapeEntry| profile(&[first.clone(), second.clone()]).shapes[0] == *first;
    let search = entry(256, 256, 20_000);
    let disturbed = ShapeEntry { provisional: true, ..entry(256, 256, 60_000) };
    assert!(stays(&search, &disturbed) && !stays(&disturbed, &search));
    let prompts = Workload { prompt_share: 0.9, batch: 1 };
    let for_prompts = ShapeEntry { workload: prompts, ..entry(256, 256, 5_000) };
    assert!(!stays(&search, &for_prompts) && !stays(&for_prompts, &search));
    let with_copies = ShapeEntry { second_copies: 1 << 20, ..entry(256, 256, 5_000) };
    assert!(!stays(&search, &with_copies));
    let race = entry(256, 256, 300);
    assert!(stays(&for_prompts, &race) && !stays(&race, &for_prompts));
    assert!(stays(&disturbed, &race) && !stays(&race, &disturbed));
}

#[test]
fn what_is_known_suffices_for_its_purpose_and_for_any_start() {
    let problems = vec![Problem { m: 256, k: 256, count: 1 }];
    let search = Request::new(problems.clone(), Budget::search(Duration::from_secs(20)));
    let known = entry(256, 256, 20_000);
    assert!(known.suffices(&search));
    let others = [
        Request { workload: Workload { prompt_share: 0.9, batch: 1 }, ..search.clone() },
        Request { workload: Workload { batch: 8, ..Workload::default() }, ..search.clone() },
        Request { second_copies: Some(1), ..search.clone() },
        Request { energy: true, ..search.clone() },
        Request { budget: Budget::search(Duration::from_secs(60)), ..search.clone() },
    ];
    for other in others {
        assert!(!known.suffices(&other), "{other:?}");
        assert!(known.suffices(&Request { budget: Budget::RACE, ..other }));
    }
    // What a text makes of a third is the same third.
    let third = Workload { prompt_share: 0.333_333_333_333_333_3, batch: 1 };
    assert!(known.suffices(&Request { workload: third, ..search.clone() }));
    let provisional = ShapeEntry { provisional: true, ..known };
    assert!(!provisional.suffices(&search) && provisional.suffices(&Request::new(problems, Budget::RACE)));
}

#[test]
fn writers_at_the_same_time_lose_nothing() {
    let (_keep, cache, _) = in_directory();
    std::thread::scope(|scope| {
        for m in 1..=4 {
            let cache = &cache;
            scope.spawn(move || cache.remember(&profile(&[entry(m, 256, 300)])).unwrap());
        }
    });
    assert_eq!(cache.load(&key(), &cpu()).0.shapes.len(), 4);
}

#[test]
fn broken_foreign_and_newer_files_are_ignored_with_a_warning_and_replaced() {
    let good = serde_json::to_string(&profile(&[entry(256, 256, 300)])).unwrap();
    let broken = [
        String::new(),
        good[..good.len() / 2].to_owned(),
        "[]".to_owned(),
        "{}".to_owned(),
        good.replace("\"version\":2", "\"version\":3"),
        good.replace(FORMAT, "wisdom"),
        good.replace("layout=", "layout=x"),
        good.replace("\"choice\":", "\"chose\":"),
        "[".repeat(100_000),
        " ".repeat(MAX_BYTES as usize + 1),
    ];
    for text in broken {
        let (_keep, cache, path) = in_directory();
        fs::write(&path, &text).unwrap();
        let (loaded, warnings) = cache.load(&key(), &cpu());
        let start: String = text.chars().take(60).collect();
        assert!(loaded.shapes.is_empty(), "{start}");
        assert!(matches!(warnings[..], [Warning::Corrupt { .. }]), "{start}: {warnings:?}");
        assert!(!warnings[0].to_string().contains('\n'));
        cache.remember(&profile(&[entry(64, 256, 300)])).unwrap();
        assert_eq!(cache.load(&key(), &cpu()).0.shapes.len(), 1, "{start}");
    }
    let (_keep, cache, path) = in_directory();
    fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert!(matches!(cache.load(&key(), &cpu()).1[..], [Warning::Corrupt { .. }]));
    assert_eq!(cache.profiles().1.len(), 1);
}

#[test]
fn illegal_schedules_in_a_profile_are_dropped_with_a_warning() {
    let good = entry(256, 256, 300);
    let mut unlike = entry(64, 256, 300);
    let schedules = Schedule::candidates(&Class::Batch.spec(256), &cpu());
    let layouts = schedules.iter().fold(Vec::new(), |mut layouts: Vec<Schedule>, schedule| {
        if layouts.iter().all(|known| known.layout != schedule.layout) {
            layouts.push(*schedule);
        }
        layouts
    });
    unlike.choice.schedules[1..4].copy_from_slice(&layouts[..3]);
    let mut illegal = entry(64, 256, 300);
    illegal.choice.schedules[0].unroll = 3;
    for bad in [unlike, illegal] {
        let (_keep, cache, path) = in_directory();
        // As somebody's editor would leave it.
        fs::write(&path, serde_json::to_string(&profile(&[good.clone(), bad])).unwrap()).unwrap();
        let (loaded, warnings) = cache.load(&key(), &cpu());
        assert_eq!(loaded.shapes, std::slice::from_ref(&good));
        assert!(matches!(warnings[..], [Warning::Illegal { m: 64, k: 256, .. }]), "{warnings:?}");
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let cache = CacheDir::at(file.join("below"));
    let warning = cache.remember(&profile(&[entry(64, 256, 300)])).unwrap_err();
    assert!(matches!(warning, Warning::Unwritable { .. }), "{warning}");
    assert!(cache.load(&key(), &cpu()).0.shapes.is_empty());

    let nowhere = CacheDir::from_environment(&|_| None);
    assert_eq!(nowhere.remember(&profile(&[])), Err(Warning::NoCacheDirectory));
    assert_eq!(nowhere.load(&key(), &cpu()), (MachineProfile::new(key()), Vec::new()));
}

#[test]
fn a_write_leaves_no_other_file_but_the_lock() {
    let (directory, cache, path) = in_directory();
    cache.remember(&profile(&[entry(64, 256, 300)])).unwrap();
    let mut names: Vec<PathBuf> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert_eq!(names, [path.clone(), path.with_extension("lock")]);
}

const KILLED: &str = "TERNION_TEST_KILLED_WRITER";

/// The writer of the test below: this test binary, told by the environment where to write until it is killed.
#[test]
fn writer() {
    let Some(directory) = std::env::var_os(KILLED) else { return };
    let cache = CacheDir::at(PathBuf::from(directory));
    for m in 1.. {
        cache.remember(&profile(&[entry(m % 50 + 1, 256, 300)])).unwrap();
    }
}

#[test]
fn fifty_killed_writers_never_leave_a_corrupt_profile() {
    let (directory, cache, _) = in_directory();
    let mut noise = crate::stopwatch::scripted::Noise::new(3);
    let mut known = 0;
    for kill in 0..50 {
        let mut writer = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["profile::tests::writer", "--exact"])
            .env(KILLED, directory.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_micros(20_000 + (noise.uniform() * 20_000.0) as u64));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let (profile, warnings) = cache.load(&key(), &cpu());
        assert_eq!(warnings, [], "kill {kill}");
        assert!(profile.shapes.len() >= known, "kill {kill}: nothing that was known is lost");
        known = profile.shapes.len();
    }
    assert!(known > 0, "the writers have written");
    cache.remember(&profile(&[entry(99, 256, 300)])).unwrap();
}

#[test]
fn profiles_are_exported_imported_and_forgotten() {
    let (directory, cache, path) = in_directory();
    let written = profile(&[entry(256, 256, 300)]);
    let file = directory.path().join("mine.json");
    CacheDir::export(&written, &file).unwrap();
    assert!(!path.exists());
    let read = CacheDir::read_exported(&file).unwrap();
    assert_eq!(read, written);
    assert_eq!(cache.import(&read), Ok(path.clone()));
    assert_eq!(cache.load(&key(), &cpu()).0, written);
    assert_eq!(cache.forget(&key()), Ok(true));
    assert_eq!(cache.forget(&key()), Ok(false));
    assert!(matches!(CacheDir::read_exported(&path), Err(Warning::Unreadable { .. })));
    fs::write(&file, "{}").unwrap();
    assert!(matches!(CacheDir::read_exported(&file), Err(Warning::Corrupt { .. })));
}

#[cfg(target_os = "linux")]
#[test]
fn the_environment_says_where_the_cache_is() {
    let at = |pairs: &[(&str, &str)]| {
        let variable = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, path)| PathBuf::from(path));
        CacheDir::from_environment(&variable).path().map(Path::to_owned)
    };
    let home = ("HOME", "/home/a");
    assert_eq!(at(&[("TERNION_CACHE", "/c"), ("XDG_CACHE_HOME", "/x"), home]), Some("/c".into()));
    assert_eq!(at(&[("XDG_CACHE_HOME", "/x"), home]), Some("/x/ternion".into()));
    assert_eq!(at(&[("XDG_CACHE_HOME", "relative"), home]), Some("/home/a/.cache/ternion".into()));
    assert_eq!(at(&[]), None);
}
